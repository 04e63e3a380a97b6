"""OidcClient against issuers that err: what is believed, what is refused, and what a person is told to do."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
import traceback
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from joserfc import jwt
from joserfc.errors import SecurityWarning
from joserfc.jwk import ECKey, OKPKey, RSAKey

from interceptors import AuthError, LoginRequired, OidcClient, RefreshError, Session
from interceptors.oidc import http
from interceptors.oidc.answers import Refused
from interceptors.oidc.device import poll
from interceptors.testing import FakeIssuer

OIDC_DOCUMENT = "/.well-known/openid-configuration"
OAUTH_DOCUMENT = "/.well-known/oauth-authorization-server"
BEARER = {"access_token": "at", "token_type": "Bearer", "expires_in": 60}


class Web:
    """A server whose `answers` are what a test puts there: `path -> (status, headers, content)`, or a function
    of the handler that returns that, or None if it has answered itself.
    """

    def __init__(self):
        self.answers = {}
        self.seen = []
        web = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                web.seen.append((urlsplit(self.path).path, body.decode(), dict(self.headers)))
                told = web.answers.get(urlsplit(self.path).path, (404, {}, b""))
                told = told(self) if callable(told) else told
                if told is None:
                    return
                status, headers, content = told
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = answer  # noqa: N815 - http.server's names

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def document(self, **changed):
        content = {"issuer": self.url, "token_endpoint": f"{self.url}/token", **changed}
        return (200, {}, {name: value for name, value in content.items() if value is not None})


@pytest.fixture
def web():
    with Web() as web:
        web.answers[OIDC_DOCUMENT] = web.document()
        web.answers["/token"] = (200, {}, BEARER)
        yield web


@pytest.fixture
def client(issuer):
    return OidcClient(issuer.url, issuer.client_id, timeout=5)


def a_session(**more):
    return Session(**{"access_token": "old", "issued_at": 1.0, "refresh_token": "s3cret-refresh", **more})


def refuse(error):
    raise Refused("not yet", error=error)


def refresh(web, **options):
    return OidcClient(web.url, "c", **{"timeout": 5, **options}).refresh(a_session())


# Discovery


def test_an_issuer_with_a_path_has_its_documents_where_each_standard_puts_them(web):
    issuer = f"{web.url}/tenant"
    web.answers[f"{OAUTH_DOCUMENT}/tenant"] = web.document(issuer=issuer)
    assert OidcClient(issuer, "c").refresh(a_session()).access_token == "at"
    assert [path for path, _, _ in web.seen] == [f"/tenant{OIDC_DOCUMENT}", f"{OAUTH_DOCUMENT}/tenant", "/token"]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"issuer": "https://another.example.com"}, r"names the issuer 'https://another.example.com', expected"),
        ({"issuer": None}, "names the issuer None"),
        ({"token_endpoint": "http://login.example.com/token"}, "expected an https URL"),
        ({"token_endpoint": None}, "names no token_endpoint"),
        ({"token_endpoint": 5}, "expected an https URL"),
        ({"jwks_uri": "ftp://login.example.com/jwks"}, "jwks_uri"),
        ({"revocation_endpoint": "http://login.example.com/revoke"}, "revocation_endpoint"),
    ],
)
def test_a_document_that_cannot_be_believed_is_refused_and_no_token_sent(web, changed, says):
    web.answers[OIDC_DOCUMENT] = web.document(**changed)
    with pytest.raises(RefreshError, match=says):
        refresh(web)
    assert "s3cret-refresh" not in str(web.seen)


@pytest.mark.parametrize("content", [b"<html>", b"[]", b"", b"\xff\xfe", b"[" * 100_000], ids=lambda c: str(c[:6]))
def test_an_unreadable_document_is_named(web, content):
    web.answers[OIDC_DOCUMENT] = (200, {}, content)
    with pytest.raises(RefreshError, match=r"no discovery document, a JSON object, at .*openid-configuration or "):
        refresh(web)
    web.answers[OAUTH_DOCUMENT] = web.document()
    assert refresh(web).access_token == "at"


def test_without_any_document_both_places_are_named(web):
    del web.answers[OIDC_DOCUMENT]
    with pytest.raises(RefreshError, match=r"openid-configuration or .*oauth-authorization-server.*check the issuer"):
        refresh(web)


def test_an_endpoint_that_is_empty_is_none(web):
    web.answers[OIDC_DOCUMENT] = web.document(device_authorization_endpoint="", revocation_endpoint="")
    client = OidcClient(web.url, "c")
    client.revoke(client.refresh(a_session()))
    with pytest.raises(AuthError, match="offers no login on another device"):
        client.device_login(print)
    web.answers[OIDC_DOCUMENT] = web.document(token_endpoint="")
    with pytest.raises(RefreshError, match="names no token_endpoint"):
        refresh(web)


def test_the_document_is_asked_for_once(web):
    client = OidcClient(web.url, "c")
    for _ in range(3):
        client.refresh(a_session())
    assert [path for path, _, _ in web.seen].count(OIDC_DOCUMENT) == 1


# Refreshing


def test_an_answer_changes_what_it_says_and_nothing_else(web):
    before = a_session(scope="a b", subject="ada", name="Ada", email="ada@example.com", issuer=web.url, client_id="c")
    started = time.time()
    after = OidcClient(web.url, "c").refresh(before)
    assert (after.access_token, after.refresh_token, after.scope) == ("at", "s3cret-refresh", "a b")
    assert (after.subject, after.name, after.email) == ("ada", "Ada", "ada@example.com")
    assert started <= after.issued_at <= time.time()
    assert after.expires_at == after.issued_at + 60


def test_expiry_counts_from_before_the_request(web):
    arrived = []

    def slowly(_):
        arrived.append(time.time())
        time.sleep(0.2)  # the slowness is what this is about
        return 200, {}, BEARER

    web.answers["/token"] = slowly
    assert refresh(web).expires_at <= arrived[0] + 60


def test_what_is_sent_is_the_refresh_grant(web):
    refresh(web)
    _, body, headers = web.seen[-1]
    assert parse_qs(body) == {
        "grant_type": ["refresh_token"],
        "refresh_token": ["s3cret-refresh"],
        "client_id": ["c"],
    }
    assert headers["Content-Type"] == "application/x-www-form-urlencoded"
    assert "Authorization" not in headers


@pytest.mark.parametrize("methods", [None, ["client_secret_post"]])
def test_a_confidential_client_authenticates_as_its_issuer_understands(web, methods):
    web.answers[OIDC_DOCUMENT] = web.document(token_endpoint_auth_methods_supported=methods)
    refresh(web, client_secret="a b%")
    _, body, headers = web.seen[-1]
    if methods:
        assert parse_qs(body)["client_secret"] == ["a b%"]
        assert "Authorization" not in headers
    else:
        assert headers["Authorization"] == "Basic YzphK2IlMjU="  # c:a+b%25
        assert "client_secret" not in body


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"token_type": "mac"}, "token_type is not Bearer"),
        ({"token_type": None}, "token_type is not Bearer"),
        ({"access_token": None}, "access token"),
        ({"access_token": ""}, "access token"),
        ({"access_token": "a\r\nx-injected: 1"}, "access token"),
        ({"access_token": "å"}, "access token"),
        ({"access_token": ["at"]}, "access token"),
        ({"refresh_token": "r\n"}, "refresh_token"),
        ({"error": 5}, "HTTP 200 without what OAuth asks for"),
    ],
)
def test_an_answer_that_makes_no_sense_is_refused_and_not_shown(web, changed, says):
    web.answers["/token"] = (200, {}, {**BEARER, **changed})
    with pytest.raises(RefreshError, match=says) as caught:
        refresh(web)
    assert not isinstance(caught.value, LoginRequired)
    assert "x-injected" not in str(caught.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"expires_in": "soon"},
        {"expires_in": ""},
        {"expires_in": -1},
        {"expires_in": True},
        {"expires_in": "NaN"},
        {"scope": 5},
        {"scope": ["a", "b"]},
        {"scope": "a é"},
        {"error": ""},
    ],
    ids=str,
)
def test_what_makes_no_sense_beside_a_new_refresh_token_does_not_lose_it(web, changed):
    web.answers["/token"] = (200, {}, {**BEARER, "refresh_token": "next", **changed})
    session = OidcClient(web.url, "c").refresh(a_session(scope="a b"))
    assert session.refresh_token == "next"
    assert session.scope == "a b"
    assert session.expires_at == (None if "expires_in" in changed else session.issued_at + 60)


@pytest.mark.parametrize("expires_in", ["60", 60, 60.0])
def test_lifetimes_come_in_many_forms(web, expires_in):
    web.answers["/token"] = (200, {}, {**BEARER, "expires_in": expires_in})
    session = refresh(web)
    assert session.expires_at == session.issued_at + 60


def test_an_issuer_need_not_say_how_long_a_token_lives(web):
    web.answers["/token"] = (200, {}, {"access_token": "at", "token_type": "bearer"})
    assert refresh(web).expires_at is None


@pytest.mark.parametrize("error", ["invalid_grant", "interaction_required", "login_required", "consent_required"])
def test_what_only_a_login_can_mend_says_so(web, error):
    web.answers["/token"] = (400, {}, {"error": error, "error_description": "s3cret-description"})
    with pytest.raises(LoginRequired, match=rf'has ended \({error}\): run "interceptors login"') as caught:
        refresh(web)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "headers", "content", "says"),
    [
        (400, {}, {"error": "invalid_client"}, "check how the client 'c' is registered"),
        (401, {}, {"error": "unauthorized_client"}, "unauthorized_client"),
        (400, {}, {"error": "s3cret token!"}, "an unknown error"),
        (400, {}, {"error": 5}, "HTTP 400"),
        (400, {}, b"<html>", "HTTP 400"),
        (200, {}, b"<html>", "HTTP 200 without what OAuth asks for"),
        (200, {}, b"", "HTTP 200"),
        (302, {"Location": "http://127.0.0.1:1/elsewhere"}, b"", "HTTP 302"),
        (404, {}, b"", "HTTP 404"),
        (500, {}, {"error": "server_error"}, "HTTP 500: try again later"),
        (503, {}, b"", "HTTP 503: try again later"),
        (429, {}, b"", "HTTP 429: try again later"),
    ],
)
def test_everything_else_is_worth_another_attempt_later(web, status, headers, content, says):
    web.answers["/token"] = (status, headers, content)
    with pytest.raises(RefreshError, match=says) as caught:
        refresh(web)
    assert not isinstance(caught.value, LoginRequired)
    assert "s3cret" not in str(caught.value)
    assert len([path for path, _, _ in web.seen if path != OIDC_DOCUMENT]) == 1  # no redirect, no second try


@pytest.mark.parametrize(("retry_after", "seconds"), [("7", 7.0), ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0), ("x", None)])
def test_an_issuer_may_say_when_to_come_back(web, retry_after, seconds):
    web.answers["/token"] = (429, {"Retry-After": retry_after}, b"")
    with pytest.raises(RefreshError) as caught:
        refresh(web)
    assert caught.value.retry_after == seconds


def test_an_answer_without_end_is_cut_off_in_time(web):
    over = threading.Event()

    def drip(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            while not over.wait(0.05):
                handler.wfile.write(b" ")
        except OSError:
            pass

    web.answers["/token"] = drip
    started = time.monotonic()
    with pytest.raises(RefreshError, match=r"did not answer within 0\.5 s"):
        refresh(web, timeout=0.5)
    assert time.monotonic() - started < 5
    over.set()


def test_an_answer_without_measure_is_cut_off(web):
    web.answers["/token"] = (200, {}, b" " * 3_000_000)
    with pytest.raises(RefreshError, match="more than"):
        refresh(web)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    status=st.sampled_from([200, 400, 401, 500]),
    content=st.dictionaries(
        st.sampled_from(["access_token", "token_type", "expires_in", "refresh_token", "id_token", "error", "scope"]),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=8)
        | st.lists(st.integers(), max_size=1),
    ),
)
def test_whatever_an_issuer_answers_is_a_session_or_an_error_of_ours(web, status, content):
    web.answers["/token"] = (status, {}, content)
    client = OidcClient(web.url, "c")
    try:
        session = client.refresh(a_session())
    except AuthError:
        return
    assert session.access_token == content["access_token"]


@pytest.mark.parametrize(
    ("name", "setting", "says"),
    [
        ("SSL_CERT_FILE", "/nowhere", r"SSL_CERT_FILE or SSL_CERT_DIR names cannot be read \(No such file"),
        ("ALL_PROXY", "socks5://me:hunter2@127.0.0.1:1", r"pip install httpx\[socks\]"),
        ("HTTPS_PROXY", "foo://me:hunter2@127.0.0.1:1", "HTTPS_PROXY or ALL_PROXY names is no http://HOST:PORT"),
    ],
)
def test_an_environment_that_lets_nothing_out_is_named(monkeypatch, name, setting, says):
    http._tls.cache_clear()
    monkeypatch.setenv(name, setting)
    with pytest.raises(RefreshError, match=says) as caught:
        OidcClient("https://login.example.com", "c").refresh(a_session())
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_time_limit_may_be_longer_than_can_be_waited_for(web):
    assert refresh(web, timeout=1e10).access_token == "at"


def test_a_device_login_waits_no_longer_at_once_than_can_be_waited_for():
    now, waits = [0.0], []

    def sleep(seconds):
        waits.append(seconds)
        now[0] += seconds

    with pytest.raises(LoginRequired):
        poll(lambda: refuse("slow_down"), interval=1e300, expires_in=1e10, clock=lambda: now[0], sleep=sleep)
    assert max(waits) <= threading.TIMEOUT_MAX


# Whose session it is


@pytest.mark.parametrize("more", [{"issuer": "https://another.example.com"}, {"client_id": "another"}])
def test_a_session_is_shown_to_nobody_else(issuer, client, more):
    session = dataclasses.replace(issuer.session(), **more)
    for act in (client.refresh, client.revoke):
        with pytest.raises(LoginRequired, match="another"):
            act(session)
    assert issuer.requests == []


def test_without_a_session_or_refresh_token_only_a_login_helps(client):
    with pytest.raises(LoginRequired, match="nobody is logged in"):
        client.refresh(None)
    with pytest.raises(LoginRequired, match="has no refresh token"):
        client.refresh(a_session(refresh_token=None))


def test_an_id_token_for_another_subject_is_refused(issuer, client):
    session = issuer.session()
    issuer.subject = "mallory"
    with pytest.raises(RefreshError, match="another subject"):
        client.refresh(session)


def test_a_key_rotation_goes_unnoticed(issuer, client):
    session = client.refresh(issuer.session())
    issuer.rotate_keys()
    assert client.refresh(session).subject == "alice"
    assert len([each for each in issuer.requests if each.path == "/jwks"]) == 2


def test_keys_that_cannot_be_had_do_not_lose_a_rotated_session(issuer, client):
    session = issuer.session()
    issuer.answer_with(503, path="/jwks")
    refreshed = client.refresh(session)
    assert refreshed.refresh_token != session.refresh_token
    assert refreshed.subject == "alice"
    assert client.refresh(refreshed).access_token != refreshed.access_token


def test_a_key_that_is_not_published_yet_does_not_lose_a_rotated_session(issuer, client):
    old_keys = httpx.get(f"{issuer.url}/jwks").json()
    issuer.rotate_keys()
    issuer.answer_with(200, old_keys, path="/jwks", times=2)
    session = issuer.session()
    refreshed = client.refresh(session)
    assert refreshed.refresh_token != session.refresh_token
    assert (refreshed.subject, refreshed.id_token) == ("alice", session.id_token)
    assert client.refresh(refreshed).access_token != refreshed.access_token
    assert issuer.reuses == 0


def test_an_id_token_that_another_key_has_signed_is_refused(issuer, client):
    published = httpx.get(f"{issuer.url}/jwks").json()
    issuer.rotate_keys()
    for key, name in zip(published["keys"], [issuer._keys[0].kid], strict=False):
        key["kid"] = name
    issuer.answer_with(200, published, path="/jwks", times=2)
    with pytest.raises(RefreshError, match="its signature is not the issuer's"):
        client.refresh(issuer.session())


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_keys_of_several_kinds_may_share_an_id(web, algorithm):
    parameters = {"kid": "k", "use": "sig"}
    keys = {
        "ES256": ECKey.generate_key("P-256", parameters),
        "RS256": RSAKey.generate_key(2048, parameters),
        "EdDSA": OKPKey.generate_key("Ed25519", parameters),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecurityWarning)  # it is not to be seen from here on
        claims = {"iss": web.url, "sub": "ada", "aud": "c", "exp": time.time() + 60}
        id_token = jwt.encode({"alg": algorithm, "kid": "k"}, claims, keys[algorithm], algorithms=[algorithm])
    web.answers[OIDC_DOCUMENT] = web.document(
        jwks_uri=f"{web.url}/jwks", id_token_signing_alg_values_supported=list(keys)
    )
    web.answers["/jwks"] = (200, {}, {"keys": [key.as_dict(private=False) for key in keys.values()]})
    web.answers["/token"] = (200, {}, {**BEARER, "id_token": id_token})
    assert refresh(web).subject == "ada"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"iss": ["{url}", "https://another.example.com"]}, "its iss is missing or wrong"),
        ({"exp": float("nan")}, "its exp is missing or wrong"),
        ({"sub": 42}, "its sub is missing or wrong"),
        ({"sub": ""}, "its sub is missing or wrong"),
        ({"aud": "another"}, "its aud is missing or wrong"),
        ({"aud": ["c", "another"]}, "azp"),
    ],
    ids=str,
)
def test_claims_that_are_not_as_they_must_be_are_refused(web, changed, says):
    key = RSAKey.generate_key(2048, {"kid": "k"})
    claims = {"iss": web.url, "sub": "ada", "aud": "c", "exp": time.time() + 60, **changed}
    if "iss" in changed:
        claims["iss"] = [each.format(url=web.url) for each in claims["iss"]]
    web.answers[OIDC_DOCUMENT] = web.document(jwks_uri=f"{web.url}/jwks")
    web.answers["/jwks"] = (200, {}, {"keys": [key.as_dict(private=False)]})
    web.answers["/token"] = (200, {}, {**BEARER, "id_token": jwt.encode({"alg": "RS256", "kid": "k"}, claims, key)})
    with pytest.raises(RefreshError, match=says):
        refresh(web)


def test_keys_that_do_not_come_hold_up_a_refreshed_session_for_a_moment_only_and_once(web):
    over = threading.Event()

    def never(_):
        over.wait(60)
        return 500, {}, b""

    web.answers[OIDC_DOCUMENT] = web.document(jwks_uri=f"{web.url}/jwks")
    web.answers["/jwks"] = never
    web.answers["/token"] = (200, {}, {**BEARER, "id_token": "a.b.c", "refresh_token": "next"})
    client = OidcClient(web.url, "c", timeout=30)
    started = time.monotonic()
    session = client.refresh(a_session(subject="ada"))
    assert time.monotonic() - started < 15
    assert (session.refresh_token, session.subject) == ("next", "ada")
    client.refresh(session)
    assert [path for path, _, _ in web.seen].count("/jwks") == 1
    over.set()


def test_what_an_answer_is_read_with_is_not_looked_for_after_it_has_come(web):
    def answer(_):
        # Another thread, whose own request was answered with rubbish, has had the document forgotten.
        client._discovered = None
        web.answers[OIDC_DOCUMENT] = (503, {}, b"")
        return 200, {}, {**BEARER, "id_token": "a.b.c", "refresh_token": "next"}

    web.answers["/token"] = answer
    client = OidcClient(web.url, "c")
    assert client.refresh(a_session()).refresh_token == "next"


# Logging in


def answering(**changed):
    """A browser that answers a login's redirect with parameters of its own."""

    def browser(address):
        asked = {name: values[0] for name, values in parse_qs(urlsplit(address).query).items()}
        answer = {"code": "c", "state": asked["state"]} | changed
        answer = {name: value for name, value in answer.items() if value is not None}
        pages.append(httpx.get(f"{asked['redirect_uri']}?{urlencode(answer)}"))

    pages = browser.pages = []
    return browser


def person(address):
    httpx.get(address, follow_redirects=True)


def test_a_login_asks_for_what_it_should(issuer, client):
    addresses = []
    session = client.login(open_browser=lambda address: (addresses.append(address), person(address)), timeout=10)
    assert session.identity == f"{issuer.url}#alice"
    asked = {name: values[0] for name, values in parse_qs(urlsplit(addresses[0]).query).items()}
    assert asked["response_type"] == "code"
    assert asked["code_challenge_method"] == "S256"
    assert asked["redirect_uri"].startswith("http://127.0.0.1:")
    assert len(asked["state"]) >= 32
    assert len(asked["nonce"]) >= 32
    assert asked["prompt"] == "consent"


def test_where_no_browser_opens_the_address_is_printed(issuer, client, capfd):
    def no_browser(address):
        threading.Thread(target=person, args=(address,), daemon=True).start()
        raise OSError("there is none")

    assert client.login(open_browser=no_browser, timeout=10).subject == "alice"
    printed = capfd.readouterr()
    assert f"{issuer.url}/authorize?" in printed.err
    assert "No browser could be opened (OSError): visit the address above" in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"iss": "https://another.example.com"}, AuthError, "does not come from"),
        ({"iss": None}, AuthError, "does not come from"),
        ({"code": None, "error": "access_denied"}, LoginRequired, "refused in the browser"),
        ({"code": None, "error": "temporarily_unavailable"}, RefreshError, "again later"),
        ({"code": None, "error": "invalid_scope"}, AuthError, "check how the client is registered"),
        ({"code": "wrong"}, LoginRequired, "did not accept the login"),
    ],
)
def test_a_login_that_goes_wrong_tells_the_person_in_both_places(issuer, client, changed, error, says):
    browser = answering(**{"iss": issuer.url, **changed})
    with pytest.raises(error, match=says):
        client.login(open_browser=browser, timeout=10)
    deadline = time.monotonic() + 10
    while not browser.pages and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "The login did not work" in browser.pages[0].text


def test_another_logins_answer_is_not_taken_for_ours(issuer, client):
    def browser(address):
        stray = answering(iss=issuer.url, state="another")
        stray(address)
        assert stray.pages[0].status_code == 400
        person(address)

    assert client.login(open_browser=browser, timeout=10).subject == "alice"


def test_an_id_token_of_another_login_is_refused(issuer, client):
    def browser(address):
        parts = urlsplit(address)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()} | {"nonce": "another"}
        person(parts._replace(query=urlencode(query)).geturl())

    with pytest.raises(RefreshError, match="nonce"):
        client.login(open_browser=browser, timeout=10)


def test_a_login_that_nobody_makes_ends_in_time(client):
    with pytest.raises(LoginRequired, match=r'nobody has logged in within 0\.05 s: run "interceptors login" again'):
        client.login(open_browser=lambda _: None, timeout=0.05)


def test_a_device_login(issuer, client):
    issuer.device_interval = 0.01
    issuer.auto_approve = False
    told = []
    session = client.device_login(lambda login: (told.append(login), issuer.approve(login.user_code)))
    assert session.subject == "alice"
    assert told[0].verification_uri == f"{issuer.url}/device"
    assert told[0].verification_uri_complete == f"{issuer.url}/device?user_code={told[0].user_code}"
    assert told[0].expires_in == 300


def test_a_device_login_survives_an_issuer_that_stumbles(issuer, client):
    issuer.device_interval = 0.01
    issuer.fail_next(2)
    assert client.device_login(lambda _: None).subject == "alice"


@pytest.mark.parametrize("error", ["access_denied", "expired_token"])
def test_a_device_login_that_ends_says_what_to_do(issuer, client, error):
    issuer.device_interval = 0.01
    issuer.answer_with(400, {"error": error})
    with pytest.raises(LoginRequired, match="interceptors login"):
        client.device_login(lambda _: None)


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({"verification_url": "https://login.example.com/device"}, None),
        ({"verification_uri": "https://login.example.com/device", "verification_uri_complete": "http://x/"}, None),
        ({"verification_uri": "https://login.example.com/device", "verification_uri_complete": 5}, None),
        (
            {
                "verification_uri": "https://login.example.com/device",
                "verification_uri_complete": "https://login.example.com/device?u",
            },
            "https://login.example.com/device?u",
        ),
    ],
)
def test_a_device_login_shows_what_is_safe_to_open(web, changed, shown):
    web.answers[OIDC_DOCUMENT] = web.document(device_authorization_endpoint=f"{web.url}/device")
    web.answers["/device"] = (200, {}, {"device_code": "d", "user_code": "u", "interval": 0.01, **changed})
    told = []
    OidcClient(web.url, "c").device_login(told.append)
    assert (told[0].verification_uri, told[0].verification_uri_complete) == ("https://login.example.com/device", shown)


def test_an_issuer_without_a_grant_says_which_to_use_instead(web):
    client = OidcClient(web.url, "c")
    with pytest.raises(AuthError, match="without --device"):
        client.device_login(print)
    with pytest.raises(AuthError, match="--device"):
        client.login(open_browser=print, timeout=1)


def test_client_credentials():
    with FakeIssuer(client_secret="secret") as issuer:
        session = OidcClient(issuer.url, issuer.client_id, client_secret="secret").client_credentials()
        assert issuer.verify(session.access_token)
        assert session.refresh_token is None
    with pytest.raises(AuthError, match="pass client_secret"):
        OidcClient(issuer.url, issuer.client_id).client_credentials()


# Logging out


def test_revoking_ends_the_session_and_its_access_token(issuer, client):
    session = issuer.session()
    client.revoke(session)
    with pytest.raises(LoginRequired):
        client.refresh(session)
    with pytest.raises(Exception, match="revoked"):
        issuer.verify(session.access_token)


def test_revoking_where_it_cannot_be_done_is_no_error_but_failing_is(web):
    client = OidcClient(web.url, "c")
    client.revoke(a_session())
    assert [path for path, _, _ in web.seen] == [OIDC_DOCUMENT]
    web.answers[OIDC_DOCUMENT] = web.document(revocation_endpoint=f"{web.url}/revoke")
    web.answers["/revoke"] = (400, {}, b"")
    with pytest.raises(RefreshError, match=r"did not revoke the session \(HTTP 400\): try again later"):
        OidcClient(web.url, "c").revoke(a_session())
    web.answers["/revoke"] = (401, {}, {"error": "invalid_client"})
    with pytest.raises(RefreshError, match=r"\(HTTP 401\): check the client 'c' and its secret"):
        OidcClient(web.url, "c").revoke(a_session())


def test_revoking_tries_both_tokens(web):
    web.answers[OIDC_DOCUMENT] = web.document(revocation_endpoint=f"{web.url}/revoke")
    answers = []
    web.answers["/revoke"] = lambda _: (answers.pop(0), {}, b"")

    def revoke(*statuses):
        answers[:] = statuses
        OidcClient(web.url, "c").revoke(a_session())

    for statuses in [(200, 200), (204, 204), (200, 400)]:  # some issuers cannot revoke access tokens
        revoke(*statuses)
    for statuses in [(400, 200), (503, 200), (200, 503)]:
        with pytest.raises(RefreshError):
            revoke(*statuses)
        assert answers == []


# Arguments


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"issuer": "http://login.example.com"}, ValueError, "https URL"),
        ({"issuer": "login.example.com"}, ValueError, "https URL"),
        ({"issuer": "https://login.example.com/?x=1"}, ValueError, "without user, query or fragment"),
        ({"issuer": "https://me:hunter2@login.example.com"}, ValueError, "not another"),
        ({"issuer": None}, TypeError, "issuer must be a str"),
        ({"client_id": ""}, ValueError, "registered with the issuer"),
        ({"client_secret": ""}, ValueError, "leave it out"),
        ({"client_secret": 5}, TypeError, "client_secret"),
        ({"timeout": 0}, ValueError, "timeout"),
        ({"timeout": "10"}, TypeError, "timeout"),
        ({"scope": ["openid"]}, TypeError, "scope must be a str"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_once(arguments, error, says):
    with pytest.raises(error, match=says) as caught:
        OidcClient(**{"issuer": "https://login.example.com", "client_id": "c", **arguments})
    assert "hunter2" not in str(caught.value)


def test_a_client_shows_no_secret():
    assert "hunter2" not in repr(OidcClient("https://login.example.com", "c", client_secret="hunter2"))
