"""What type checkers say of the public names; checked by `make types`, never run."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_type

import grpc
import grpc.aio

from interceptors import (
    ConnectBearerInterceptor,
    StaticTokenSource,
    Token,
    aio_bearer_interceptors,
    authenticated_channel,
    intercept_channel,
    intercept_stub,
)
from interceptors.gen.kontext.agent.v1.heartbeat_connect import HeartbeatServiceClient, HeartbeatServiceClientSync

if TYPE_CHECKING:
    from interceptors.gen.kontext.agent.v1.heartbeat_pb2_grpc import HeartbeatServiceStub

source = StaticTokenSource("t")


def a_channel_of_either_kind_is_one_of_both(target: str, *, aio: bool) -> None:
    assert_type(authenticated_channel(target, source, aio=aio), grpc.Channel | grpc.aio.Channel)


def a_sync_channel_stays_one(channel: grpc.Channel) -> None:
    assert_type(intercept_channel(channel, source), grpc.Channel)
    assert_type(authenticated_channel("localhost:1", source), grpc.Channel)


def an_aio_channel_stays_one(channel: grpc.aio.Channel) -> None:
    assert_type(intercept_channel(channel, source), grpc.aio.Channel)
    assert_type(authenticated_channel("localhost:1", source, aio=True), grpc.aio.Channel)
    grpc.aio.insecure_channel("localhost:1", interceptors=aio_bearer_interceptors(source))


def connect_clients_take_the_interceptor() -> None:
    HeartbeatServiceClient("http://localhost:1", interceptors=[ConnectBearerInterceptor(source)])
    HeartbeatServiceClientSync("http://localhost:1", interceptors=[ConnectBearerInterceptor(source)])


def a_stub_keeps_its_type(stub: HeartbeatServiceStub) -> None:
    assert_type(intercept_stub(stub, source), "HeartbeatServiceStub")


def tokens() -> None:
    assert_type(source.token(), Token)
    assert_type(source.peek(), Token)
