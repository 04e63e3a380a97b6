"""One session, many processes: who refreshes, who adopts, and what is left when one of them is killed.

The issuers rotate refresh tokens and end a session whose old refresh token is used again, so a single refresh too many
ends these tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import pairwise

import grpc
import httpx
import joserfc.jwt
import pytest
from conftest import eventually
from filelock import FileLock
from joserfc.jwk import KeySet
from provider import Provider
from store_places import a_redis, file, gnome_keyring, process

from interceptors import FileStore, LoginRequired, authenticated_channel, open_session
from interceptors.gen.kontext.agent.v1 import heartbeat_pb2, heartbeat_pb2_grpc
from interceptors.testing import FakeIssuer, FakeServer
from interceptors.testing.issuer import DEVICE_GRANT, TokenRefused

LIFETIME = 2.0
# Sixty seconds' worth of refreshes on request, ten seconds' worth always.
REFRESHES = 36 if os.environ.get("INTERCEPTORS_LONG_TESTS") == "1" else 6


class Fake:
    """FakeIssuer, as these tests need an issuer."""

    # A token is refreshed in the last quarter of its life; its answer may have been slow.
    shortest_gap = LIFETIME / 2

    def __init__(self, **options):
        self.fake = FakeIssuer(access_token_lifetime=LIFETIME, **options)

    def __enter__(self):
        self.fake.start()
        self.url, self.client_id = self.fake.url, self.fake.client_id
        return self

    def __exit__(self, *_):
        self.fake.stop()

    def session(self):
        return self.fake.session()

    def verify(self, token):
        return self.fake.verify(token)

    def refreshes(self):
        """When each refresh was, in seconds, and its status."""
        return [(each.at, each.status) for each in self.fake.token_requests if each.grant_type == "refresh_token"]


class Certified:
    """npm's oidc-provider, likewise."""

    client_id = "native"
    shortest_gap = LIFETIME / 2

    def __enter__(self):
        self.provider = Provider(accessTtl=int(LIFETIME)).__enter__()
        self.url = self.provider.issuer
        self.keys = KeySet.import_key_set(httpx.get(f"{self.url}/jwks").json())
        return self

    def __exit__(self, *_):
        self.provider.__exit__()

    def session(self):
        return self.provider.session()

    def verify(self, token):
        claims = joserfc.jwt.decode(token, self.keys, algorithms=["RS256"]).claims
        # It rounds expiries down to whole seconds, for which servers allow some leeway.
        if claims["exp"] + 1 <= time.time():
            raise TokenRefused("expired")

    def refreshes(self):
        return [(each["at"] / 1000, each["status"]) for each in self.provider.token_requests()]


ISSUERS = {"fake issuer": Fake, "oidc-provider": Certified}
PROCESSES = 16


@pytest.fixture
def to_itself(tmp_path_factory):
    """Keeps other tests like this one waiting: two crowds of processes are more than a small machine can bear."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "crowds.lock"):
        yield


def keep(place, session):
    """Has another process save `session`, as a login in another terminal does."""
    saving = process(place, f"with store.lock(30): store.save(Session(**{asdict(session)!r}))")
    saving.communicate()
    assert saving.returncode == 0


def kept(place):
    """What another process finds stored."""
    loading = process(place, "from dataclasses import asdict; s = store.load(); print(repr(s and asdict(s)))")
    output, _ = loading.communicate(timeout=60)
    assert loading.returncode == 0
    return eval(output)


@contextmanager
def workers(place, issuer, server, environments):
    script = f"from session_worker import run\nrun(store, {issuer.url!r}, {issuer.client_id!r}, {server.target!r})"
    running = [process(place, script, environment=environment) for environment in environments]
    try:
        yield running
    finally:
        for each in running:
            each.kill()
            each.communicate()


def reports(running):
    """Tells all to stop, and reads what became of their calls."""
    for each in running:
        each.stdin.write("stop\n")
        each.stdin.flush()
    return [json.loads(each.communicate(timeout=60)[0].splitlines()[-1]) for each in running]


def run_for(refreshes, place, issuer, environments):
    with FakeServer(verify=issuer.verify) as server:
        keep(place, issuer.session())
        with workers(place, issuer, server, environments) as running:
            for each in running:
                assert each.stdout.readline() == "ready\n"
            before = len(issuer.refreshes())
            eventually(lambda: len(issuer.refreshes()) >= before + refreshes, timeout=110)
            return reports(running)


def assert_one_refresh_per_lifetime(issuer, results):
    for result in results:
        assert result["failures"] == []
        assert result["calls"] > REFRESHES
    refreshes = issuer.refreshes()
    assert {status for _, status in refreshes} == {200}  # each refresh token was used once
    times = [at for at, _ in refreshes]
    assert min(after - before for before, after in pairwise(times)) > issuer.shortest_gap
    made = sum(sum(result["stats"][cause] for cause in ("proactive", "mandatory", "reactive")) for result in results)
    assert made == len(refreshes)
    assert sum(result["stats"]["adoptions"] for result in results) >= (len(results) - 1) * (REFRESHES - 2)


@pytest.mark.long
@pytest.mark.usefixtures("to_itself")
@pytest.mark.parametrize("issuer", ISSUERS)
def test_sixteen_processes_on_one_keyring_refresh_once_per_lifetime(tmp_path, issuer):
    with gnome_keyring(tmp_path) as place, ISSUERS[issuer]() as asked:
        results = run_for(REFRESHES, place, asked, [{}] * PROCESSES)
        assert_one_refresh_per_lifetime(asked, results)


@pytest.mark.long
@pytest.mark.usefixtures("to_itself")
def test_sixteen_processes_on_one_file_refresh_once_per_lifetime(tmp_path):
    with file(tmp_path) as place, Fake() as asked:
        results = run_for(REFRESHES, place, asked, [{}] * PROCESSES)
        assert_one_refresh_per_lifetime(asked, results)


@pytest.mark.long
@pytest.mark.usefixtures("to_itself")
@pytest.mark.parametrize("issuer", ISSUERS)
def test_two_hosts_that_share_a_redis_refresh_once_per_lifetime(tmp_path, issuer):
    hosts = [{"HOME": str(tmp_path / host), "XDG_STATE_HOME": str(tmp_path / host / "state")} for host in "ab"]
    with a_redis(tmp_path) as place, ISSUERS[issuer]() as asked:
        results = run_for(REFRESHES, place, asked, hosts * 2)
        assert_one_refresh_per_lifetime(asked, results)


REFRESH = """
import sys
source = RefreshingTokenSource(store, OidcClient({url!r}, {client_id!r}).refresh)
print("token", source.token().value, flush=True)
"""


@pytest.mark.parametrize("make", [file, gnome_keyring], ids=["file", "gnome-keyring"])
def test_a_refreshing_process_that_is_killed_leaves_a_session_and_no_lock(tmp_path, make):
    with make(tmp_path) as place, Fake() as asked:
        session = replace(asked.session(), expires_at=1.0)
        keep(place, session)
        asked.fake.hold()
        # Given a process that holds the lock, and waits for the issuer
        killed = process(place, REFRESH.format(url=asked.url, client_id=asked.client_id))
        asked.fake.wait_for_token_requests(1)
        # When it is killed
        killed.kill()
        killed.communicate()
        # Then the session is whole, and the next process need not wait
        assert kept(place) == asdict(session)
        next_ = process(place, "with store.lock(0): print('locked')")
        assert next_.communicate(timeout=60)[0] == "locked\n"
        asked.fake.release()


def test_a_process_that_is_killed_at_any_moment_leaves_a_whole_session(tmp_path):
    with file(tmp_path) as place, Fake() as asked:
        sessions = [asked.session(), replace(asked.session(), name="x" * 5000)]
        keep(place, sessions[0])
        script = (
            f"a, b = [Session(**fields) for fields in {[asdict(each) for each in sessions]!r}]\n"
            "print('ready', flush=True)\nwhile True:\n  with store.lock(30): store.save(a); store.save(b)"
        )
        store = place.store()
        for moment in range(10):
            killed = process(place, script)
            assert killed.stdout.readline() == "ready\n"
            time.sleep(0.003 * moment)  # it is the moment that matters here
            killed.kill()
            killed.communicate()
            with store.lock(0):
                assert store.load() in sessions


def interceptors(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "interceptors", *arguments], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def heartbeat(tmp_path, issuer):
    """A call of a running session, which is kept in a file, and has served one call already."""
    store = FileStore(tmp_path / "session.json")
    store.save(issuer.session())
    with (
        FakeServer(issuer) as server,
        open_session(issuer.url, issuer.client_id, store=store) as source,
        authenticated_channel(server.target, source) as channel,
    ):
        stub = heartbeat_pb2_grpc.HeartbeatServiceStub(channel)
        request = heartbeat_pb2.HeartbeatRequest(session_id="s", sequence=1)
        stub.Heartbeat(request, timeout=10)
        yield lambda: stub.Heartbeat(request, timeout=10)


def assert_logged_out(heartbeat):
    with pytest.raises(grpc.RpcError) as caught:
        heartbeat()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert isinstance(caught.value.__cause__, LoginRequired)
    assert 'run "interceptors login"' in str(caught.value.__cause__)
    return caught.value


def test_a_login_in_another_terminal_heals_a_running_session_within_one_call(tmp_path, issuer, heartbeat):
    store = FileStore(tmp_path / "session.json")
    issuer.device_interval = 0.01
    # Given a session that has ended
    issuer.end_session(store.load())
    issuer.revoke(store.load().access_token)
    for _ in range(3):
        assert_logged_out(heartbeat)
    asked = len(issuer.token_requests)
    # When somebody logs in in another terminal
    where = ("--store", f"file:{tmp_path}/session.json")
    interceptors("login", "--device", "--issuer", issuer.url, "--client-id", issuer.client_id, *where)
    # Then the next call succeeds, and meanwhile the issuer was asked by the login alone
    heartbeat()
    assert [each.grant_type for each in issuer.token_requests[asked:]] == [DEVICE_GRANT]


def test_a_logout_in_another_terminal_ends_a_running_session_with_what_to_do(tmp_path, issuer, heartbeat):
    interceptors("logout", "--store", f"file:{tmp_path}/session.json")
    errors = [assert_logged_out(heartbeat) for _ in range(20)]
    assert 'run "interceptors login"' in errors[-1].details()
    assert issuer.token_requests == []
