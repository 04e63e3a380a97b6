"""The ways in: what they take and give, and that a token is not sent in plain text over a network."""

from __future__ import annotations

import datetime
import ipaddress
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from interceptors import (
    BearerInterceptor,
    StaticTokenSource,
    aio_bearer_interceptors,
    authenticated_channel,
    intercept_channel,
    intercept_stub,
)
from interceptors.channels import is_local
from interceptors.gen.kontext.agent.v1 import heartbeat_pb2, heartbeat_pb2_grpc

SOURCE = StaticTokenSource("token")
REQUEST = heartbeat_pb2.HeartbeatRequest(session_id="s", sequence=7)


@pytest.mark.parametrize(
    "target",
    [
        "127.0.0.1:50051",
        "127.8.9.10:1",
        "localhost:50051",
        "localhost",
        "[::1]:50051",
        "::1",
        "dns:localhost:50051",
        "dns:///localhost:50051",
        "ipv4:127.0.0.1:1,127.0.0.2:1",
        "ipv6:[::1]:1",
        "unix:/run/api.sock",
        "unix:///run/api.sock",
        "unix-abstract:api",
    ],
)
def test_plain_text_is_good_enough_for_what_stays_on_this_machine(target):
    assert is_local(target)
    authenticated_channel(target, SOURCE).close()
    authenticated_channel(target, SOURCE, credentials=grpc.local_channel_credentials()).close()


@pytest.mark.parametrize(
    "target",
    [
        "api.example.com:443",
        "api.example.com",
        "10.0.0.1:50051",
        "0.0.0.0:50051",
        "localhost.example.com:443",
        "127.0.0.1.example.com:443",
        "dns://8.8.8.8/localhost:443",
        "ipv4:127.0.0.1:1,10.0.0.1:1",
        "ipv6:[2001:db8::1]:1",
        "user@localhost:1",
        "xds:///localhost",
        "[::ffff:10.0.0.1]:1",
    ],
)
def test_over_a_network_tokens_go_by_tls_only(target):
    assert not is_local(target)
    authenticated_channel(target, SOURCE).close()
    for plain_text in (grpc.local_channel_credentials(), grpc.experimental.insecure_channel_credentials()):
        with pytest.raises(ValueError, match=r"in plain text.*ssl_channel_credentials"):
            authenticated_channel(target, SOURCE, credentials=plain_text)


@given(st.text(max_size=40))
def test_any_target_is_either_local_or_not(target):
    assert is_local(target) in {True, False}


@pytest.fixture(scope="module")
def certificate():
    """A certificate for localhost and its key, both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName(
                [
                    x509.DNSName("localhost"),
                    x509.DNSName("api.example.com"),
                    x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
                ]
            ),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    no_password = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, no_password)
    return certificate.public_bytes(serialization.Encoding.PEM), pem


class Heartbeats(heartbeat_pb2_grpc.HeartbeatServiceServicer):
    def __init__(self):
        self.tokens = []

    def Heartbeat(self, request, context):  # noqa: N802 - as the service calls it
        self.tokens += [value for key, value in context.invocation_metadata() if key == "authorization"]
        return heartbeat_pb2.HeartbeatResponse(sequence=request.sequence)


def test_tls_reaches_a_server_that_is_trusted_and_no_other(certificate):
    root, key = certificate
    heartbeats, server = Heartbeats(), grpc.server(ThreadPoolExecutor(1))
    heartbeat_pb2_grpc.add_HeartbeatServiceServicer_to_server(heartbeats, server)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, root)]))
    server.start()
    trusting, distrusting = grpc.ssl_channel_credentials(root), grpc.ssl_channel_credentials()
    with authenticated_channel(f"127.0.0.1:{port}", SOURCE, credentials=trusting) as channel:
        stub = heartbeat_pb2_grpc.HeartbeatServiceStub(channel)
        assert stub.Heartbeat(REQUEST, timeout=10).sequence == 7
    with (
        authenticated_channel(f"127.0.0.1:{port}", SOURCE, credentials=distrusting) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        heartbeat_pb2_grpc.HeartbeatServiceStub(channel).Heartbeat(REQUEST, timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert heartbeats.tokens == ["Bearer token"]
    server.stop(None).wait()


def test_an_authenticated_channel_calls(server, source):
    with authenticated_channel(server.target, source, compression=grpc.Compression.Gzip) as channel:
        assert isinstance(channel, grpc.Channel)
        assert heartbeat_pb2_grpc.HeartbeatServiceStub(channel).Heartbeat(REQUEST, timeout=10).sequence == 7


def test_a_channel_stays_of_its_kind(server):
    with grpc.insecure_channel(server.target) as plain:
        assert isinstance(intercept_channel(plain, SOURCE), grpc.Channel)
        assert not isinstance(intercept_channel(plain, SOURCE), grpc.aio.Channel)


def test_a_stub_stays_of_its_type_and_the_given_one_is_not_changed(server, source):
    with grpc.insecure_channel(server.target) as plain:
        stub = heartbeat_pb2_grpc.HeartbeatServiceStub(plain)
        authenticated = intercept_stub(stub, source)
        assert type(authenticated) is type(stub)
        assert authenticated.Heartbeat(REQUEST, timeout=10).sequence == 7
        with pytest.raises(grpc.RpcError):
            stub.Heartbeat(REQUEST, timeout=10)


def test_a_channel_looks_like_the_one_beneath(server, source):
    seen = []
    before = set(threading.enumerate())
    with intercept_channel(grpc.insecure_channel(server.target), source) as channel:
        channel.subscribe(seen.append, try_to_connect=True)
        grpc.channel_ready_future(channel).result(10)
        channel.unsubscribe(seen.append)
        # gRPC's polling thread fails on a channel that is closed beneath it.
        for thread in set(threading.enumerate()) - before:
            thread.join(10)
    assert grpc.ChannelConnectivity.READY in seen
    assert source.token().value not in repr(channel)


def test_messages_are_serialised_and_not_copied_whatever_was_imported_first():
    # In a process of its own: gRPC imports the module of its channels only when one is opened.
    program = """
import grpc
from interceptors import BearerInterceptor, StaticTokenSource, intercept_channel, intercept_stub

class Message:
    def __deepcopy__(self, memo):
        print("copied")

class Stub:
    def __init__(self, channel):
        self.call = channel.unary_unary("/a/b", lambda message: print("serialised") or b"")

plain = grpc.insecure_channel("127.0.0.1:1")
source = StaticTokenSource("token")
for stub in (Stub(intercept_channel(plain, source)), intercept_stub(Stub(plain), source)):
    try:
        stub.call(Message(), timeout=10)
    except grpc.RpcError as error:
        print(error.code().name)
"""
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert printed == ["serialised", "UNAVAILABLE"] * 2


@pytest.mark.parametrize("wrong", [None, "token", lambda: "token", object(), StaticTokenSource])
def test_a_source_that_is_none_is_named_at_once(server, wrong):
    with grpc.insecure_channel(server.target) as plain:
        stub = heartbeat_pb2_grpc.HeartbeatServiceStub(plain)
        for make in (
            lambda: intercept_channel(plain, wrong),
            lambda: intercept_stub(stub, wrong),
            lambda: authenticated_channel(server.target, wrong),
            lambda: BearerInterceptor(wrong),
            lambda: aio_bearer_interceptors(wrong),
        ):
            with pytest.raises(TypeError, match="source must be a TokenSource"):
                make()


@pytest.mark.parametrize("wrong", [None, "localhost:1", object()])
def test_a_channel_or_stub_that_is_none_is_named_at_once(wrong):
    with pytest.raises(TypeError, match=r"channel must be a grpc\.Channel or a grpc\.aio\.Channel"):
        intercept_channel(wrong, SOURCE)
    with pytest.raises(TypeError, match="stub must be a generated gRPC stub"):
        intercept_stub(wrong, SOURCE)


@pytest.mark.parametrize(
    ("target", "options", "error", "says"),
    [
        ("https://api.example.com", {}, ValueError, "without https://"),
        ("grpc://api.example.com", {}, ValueError, "gRPC target"),
        ("", {}, ValueError, "gRPC target"),
        (None, {}, TypeError, "target must be a str"),
        ("api.example.com:443", {"credentials": "tls"}, TypeError, r"grpc\.ChannelCredentials"),
        ("localhost:1", {"replay_limit": -1}, ValueError, "0 bytes or more"),
        ("localhost:1", {"replay_limit": "256k"}, TypeError, "number of bytes"),
        ("localhost:1", {"replay_limit": True}, TypeError, "number of bytes"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_once(target, options, error, says):
    with pytest.raises(error, match=says):
        authenticated_channel(target, SOURCE, **options)
