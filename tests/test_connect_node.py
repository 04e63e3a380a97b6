"""Interoperation: a server in another language that refuses stale tokens, in all three protocols."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import httpx
import pytest
from behaviour_drivers import EXPECTED, KINDS
from conftest import REQUIRE_ALL, requires
from connect_drivers import ConnectAioDriver, ConnectDriver, asynchronous, ingest_requests
from connectrpc.client import ResponseMetadata
from connectrpc.code import Code
from connectrpc.errors import ConnectError
from google.protobuf import descriptor_pb2

from interceptors.gen.kontext.agent.v1 import event_pb2, heartbeat_pb2
from interceptors.testing import FakeIssuer

FOLDER = Path(__file__).parent / "connect_node"
# gRPC needs HTTP/2; the name of a way says which port it is served at.
WAYS = {"connect-h1": "h1", "connect": "h2c", "grpc": "h2c", "grpc_web": "h1"}


def kinds(way):
    """Node does not talk in both directions over HTTP/1.1."""
    return [kind for kind in KINDS if kind != "bidi" or WAYS[way] == "h2c"]


def with_what_they_import(found, *files):
    for file in files:
        with_what_they_import(found, *file.dependencies)
        found[file.name] = file
    return found


class NodeServer:
    """The server, in a process of its own; `url` is what the drivers call."""

    def __init__(self, issuer, descriptors):
        node = requires("node")
        if not (FOLDER / "node_modules").is_dir():
            reason = "connect-node is not installed: npm ci --prefix tests/connect_node"
            if REQUIRE_ALL:
                pytest.fail(reason)
            pytest.skip(reason)
        files = descriptor_pb2.FileDescriptorSet()
        for file in with_what_they_import({}, heartbeat_pb2.DESCRIPTOR, event_pb2.DESCRIPTOR).values():
            file.CopyToProto(files.file.add())
        descriptors.write_bytes(files.SerializeToString())
        jwks = httpx.get(f"{issuer.url}/jwks").json()
        self._process = subprocess.Popen(
            [node, "server.mjs", json.dumps({"descriptors": str(descriptors), "jwks": jwks})],
            cwd=FOLDER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ports = json.loads(self._process.stdout.readline())
        self.url = ""

    def at(self, way):
        self.url = f"http://127.0.0.1:{self._ports[WAYS[way]]}"
        return self

    def refuse(self, token, **how):
        httpx.post(f"http://127.0.0.1:{self._ports['h1']}/_test/refuse", json={"token": token.value, **how})

    def log(self):
        return httpx.post(f"http://127.0.0.1:{self._ports['h1']}/_test/log").json()

    def close(self):
        self._process.communicate()


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    with FakeIssuer() as issuer:
        server = NodeServer(issuer, tmp_path_factory.mktemp("node") / "descriptors")
        server.issuer = issuer
        yield server
        server.close()


@pytest.fixture
def issuer(node):
    return node.issuer


@pytest.fixture(params=[ConnectDriver, ConnectAioDriver], ids=["sync", "async"])
def driver(request, node, way, source):
    driver = request.param(node.at(way), source, way)
    node.log()
    yield driver
    driver.close()


@pytest.mark.parametrize(("way", "kind"), [(way, kind) for way in WAYS for kind in kinds(way)])
def test_a_stale_token_is_refused_renewed_and_the_call_executed_once(node, driver, source, kind):
    stale = source.token()
    node.refuse(stale)
    answer = getattr(driver, kind)(metadata=(("x-kept", "yes"),), timeout=10)
    assert answer == EXPECTED.get(kind, answer)
    first, second = node.log()
    assert (first["outcome"], second["outcome"]) == ("refused", "executed")
    assert first["token"] == stale.value
    assert second["token"] == source.token().value != stale.value
    assert first["kept"] == second["kept"] == "yes"
    assert second["timeout"]


@pytest.mark.parametrize("way", WAYS)
def test_a_stream_that_is_refused_in_its_middle_is_replayed(node, driver, source):
    node.refuse(source.token(), after=2)
    assert driver.client_stream("12345") == list("12345")
    assert [entry["outcome"] for entry in node.log()] == ["refused", "executed"]


@pytest.mark.parametrize("way", WAYS)
def test_insufficient_scope_is_the_callers(node, driver, source, way):
    refreshes = node.issuer.refreshes
    node.refuse(source.token(), challenge='Bearer error="insufficient_scope"')
    for kind in kinds(way):
        with pytest.raises(ConnectError) as caught:
            getattr(driver, kind)()
        assert caught.value.code is Code.UNAUTHENTICATED
    assert node.issuer.refreshes == refreshes
    assert len(node.log()) == len(kinds(way))


@pytest.mark.parametrize("way", WAYS)
def test_what_the_caller_sees_is_the_final_attempts_only(node, driver, source):
    node.refuse(source.token())
    if isinstance(driver, ConnectDriver):
        with ResponseMetadata() as response:
            driver.events.ingest_events(ingest_requests("12"))
    else:

        async def call():
            with ResponseMetadata() as response:
                await driver.events.ingest_events(asynchronous(ingest_requests("12")))
            return response

        response = driver.run(call())
    assert response.headers.getall("x-attempt") == ["accepted"]
    assert response.trailers.getall("x-trailing") == ["accepted"]
    assert "www-authenticate" not in {*response.headers, *response.trailers}
