"""OidcClient against a certified OpenID Provider that is not ours."""

from __future__ import annotations

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from browser import Browser
from provider import Provider

from interceptors import AuthError, LoginRequired, MemoryStore, OidcClient, RefreshError, RefreshingTokenSource

SCOPE = "openid offline_access email profile api.read"


@pytest.fixture(scope="module")
def provider():
    with Provider(accessTtl=60) as provider:
        yield provider


@pytest.fixture
def client(provider):
    return OidcClient(provider.issuer, "native", scope=SCOPE)


def test_a_session_is_refreshed_and_its_refresh_token_rotates(provider, client):
    first = provider.session()
    second = client.refresh(first)
    third = client.refresh(second)
    assert len({session.refresh_token for session in (first, second, third)}) == 3
    assert third.access_token != second.access_token
    assert third.expires_at == pytest.approx(time.time() + 60, abs=10)
    assert third.identity == f"{provider.issuer}#alice"


def test_an_old_refresh_token_ends_the_whole_session(provider, client):
    first = provider.session()
    second = client.refresh(first)
    with pytest.raises(LoginRequired, match="interceptors login"):
        client.refresh(first)
    with pytest.raises(LoginRequired):
        client.refresh(second)


def test_many_threads_that_share_a_source_do_not_trip_over_rotation(provider, client):
    before = len(provider.token_requests())
    with (
        RefreshingTokenSource(MemoryStore(provider.session()), client.refresh) as source,
        ThreadPoolExecutor(32) as threads,
    ):
        tokens = set(threads.map(lambda _: source.token().value, range(64)))
        assert len(tokens) == 1
        source.reject(source.token())
        assert source.token().value not in tokens
    assert [request["status"] for request in provider.token_requests()[before:]] == [200, 200]


def test_a_revoked_session_is_over(provider, client):
    session = client.refresh(provider.session())
    client.revoke(session)
    with pytest.raises(LoginRequired):
        client.refresh(session)


@pytest.mark.parametrize(("client_id", "secret"), [("service", "service-secret"), ("awkward", "a%b+c/d:e f&g=h")])
def test_a_service_needs_no_person(provider, client_id, secret):
    client = OidcClient(provider.issuer, client_id, client_secret=secret, scope="api.read")
    with RefreshingTokenSource(MemoryStore(), client.client_credentials) as source:
        first = source.token()
        source.reject(first)
        assert source.token() != first


def test_a_wrong_secret_is_named_as_the_reason(provider):
    client = OidcClient(provider.issuer, "service", client_secret="not-the-secret")
    with pytest.raises(RefreshError, match=r"invalid_client.*'service'.*registered") as caught:
        client.client_credentials()
    assert "not-the-secret" not in str(caught.value)


def test_an_unknown_client_is_refused_before_anybody_waits(provider):
    with pytest.raises(AuthError, match="invalid_client"):
        OidcClient(provider.issuer, "nobody").device_login(print)


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


def test_a_person_logs_in_with_the_browser(provider, client, browser):
    done = threading.Event()
    pages = []

    def person(url):
        try:
            browser.log_in(url, until="You are logged in")
            pages.append(browser.text())
        finally:
            done.set()

    session = client.login(open_browser=person, timeout=60)
    assert done.wait(30)
    assert "go back to the terminal" in pages[0]
    assert session.identity == f"{provider.issuer}#alice"
    assert (session.name, session.email) == ("Alice", "alice@example.com")
    assert session.expires_at == pytest.approx(time.time() + 60, abs=10)
    refreshed = client.refresh(session)
    assert refreshed.refresh_token not in {None, session.refresh_token}


def test_a_person_who_refuses_in_the_browser_is_told_what_happened(client, browser):
    done = threading.Event()
    pages = []

    def person(url):
        try:
            browser.go(url)
            cancel = re.search(r'href="([^"]*/abort)"', browser.source())
            assert cancel is not None
            browser.go(client.issuer + cancel[1].removeprefix(client.issuer))
            pages.append(browser.text())
        finally:
            done.set()

    with pytest.raises(LoginRequired, match=r"refused in the browser \(access_denied\): run \"interceptors login\""):
        client.login(open_browser=person, timeout=60)
    assert done.wait(30)
    assert "The login did not work" in pages[0]


def approve(issuer: str, login) -> None:
    """A person on another device, whose browser understands forms only."""
    with httpx.Client(follow_redirects=True) as device:
        page = device.get(login.verification_uri_complete).text
        xsrf = re.search(r'name="xsrf" value="([^"]+)"', page)
        assert xsrf is not None
        form = {"xsrf": xsrf[1], "user_code": login.user_code, "confirm": "yes"}
        page = device.post(f"{issuer}/device", data=form).text
        while action := re.search(r'action="([^"]+/interaction/[^"]+|/interaction/[^"]+)"', page):
            prompt = re.search(r'name="prompt" value="(\w+)"', page)
            assert prompt is not None
            url = action[1] if action[1].startswith("http") else issuer + action[1]
            page = device.post(url, data={"prompt": prompt[1], "login": "alice", "password": "secret"}).text
        assert "Sign-in Success" in page, page


def test_a_person_logs_in_on_another_device(provider, client):
    logins = []
    # The provider names no interval, which means five seconds.
    session = client.device_login(lambda login: (logins.append(login), approve(provider.issuer, login)))
    assert len(logins) == 1
    assert logins[0].user_code
    assert logins[0].verification_uri.startswith(provider.issuer)
    assert logins[0].expires_in == 600
    assert session.identity == f"{provider.issuer}#alice"
    assert client.refresh(session).refresh_token not in {None, session.refresh_token}
