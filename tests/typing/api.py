"""What type checkers say of the public names; checked by `make types`, never run."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_type

import grpc

from interceptors import (
    StaticTokenSource,
    Token,
    authenticated_channel,
    intercept_channel,
    intercept_stub,
)

if TYPE_CHECKING:
    from interceptors.gen.kontext.agent.v1.heartbeat_pb2_grpc import HeartbeatServiceStub

source = StaticTokenSource("t")


def a_sync_channel_stays_one(channel: grpc.Channel) -> None:
    assert_type(intercept_channel(channel, source), grpc.Channel)
    assert_type(authenticated_channel("localhost:1", source), grpc.Channel)


def a_stub_keeps_its_type(stub: HeartbeatServiceStub) -> None:
    assert_type(intercept_stub(stub, source), "HeartbeatServiceStub")


def tokens() -> None:
    assert_type(source.token(), Token)
    assert_type(source.peek(), Token)
