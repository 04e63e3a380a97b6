"""What the tests are about: an issuer, a server, a session, a source; and parts that a machine may lack."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from interceptors import MemoryStore, OidcClient, RefreshingTokenSource, Session
from interceptors.testing import FakeIssuer, FakeServer

REQUIRE_ALL = os.environ.get("INTERCEPTORS_REQUIRE_ALL") == "1"


def requires(program: str) -> str:
    """The path of an optional program; without it the test is skipped, or fails where everything must be there."""
    # What pip installs lies beside this Python.
    path = shutil.which(program) or shutil.which(program, path=str(Path(sys.executable).parent))
    if path is None:
        reason = f"{program} is not installed"
        if REQUIRE_ALL:
            pytest.fail(reason)
        pytest.skip(reason)
    return path


class FakeClock:
    """A wall clock that stands still until it is told to move."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def issuer():
    with FakeIssuer() as issuer:
        yield issuer


@pytest.fixture
def server(issuer):
    with FakeServer(issuer) as server:
        yield server


@pytest.fixture
def source(issuer):
    client = OidcClient(issuer.url, issuer.client_id)
    with RefreshingTokenSource(MemoryStore(issuer.session()), client.refresh) as source:
        source.token()
        yield source


def session_of(name: str, now: float, lifetime: float | None = 3600.0, **more) -> Session:
    return Session(
        access_token=name,
        issued_at=now,
        expires_at=None if lifetime is None else now + lifetime,
        refresh_token="r",
        **more,
    )


@asynccontextmanager
async def ticking():
    """Ticks every 10 ms while it is entered; yields the seconds between two ticks, oldest first."""
    gaps = []

    async def tick():
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.01)
            gaps.append(time.monotonic() - last)
            last += gaps[-1]

    task = asyncio.create_task(tick())
    try:
        yield gaps
    finally:
        task.cancel()


def assert_not_blocked(gaps):
    """The loop ticked on; now and then it was late, as other tests keep the machine busy."""
    assert len(gaps) > 25
    assert max(gaps) < 1.0
    assert sorted(gaps)[-5] < 0.1


def eventually(condition, timeout: float = 10.0) -> None:
    """Waits for what another thread is about to do and tells nobody of."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)
