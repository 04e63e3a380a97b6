"""The issuer that users test with: a real one on a real socket, and every way in which it can be made to fail."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from joserfc import jwt
from joserfc.jwk import KeySet

from interceptors import LoginRequired, OidcClient, RefreshError
from interceptors.testing import FakeIssuer
from interceptors.testing.issuer import DEVICE_GRANT, TokenRefused


@pytest.fixture
def client(issuer):
    return OidcClient(issuer.url, issuer.client_id, timeout=5.0)


def token_request(issuer, **form):
    return httpx.post(f"{issuer.url}/token", data={"client_id": issuer.client_id, **form})


def test_both_discovery_documents_name_the_issuer(issuer):
    for name in ("openid-configuration", "oauth-authorization-server"):
        document = httpx.get(f"{issuer.url}/.well-known/{name}").json()
        assert document["issuer"] == issuer.url == issuer.issuer
        assert document["token_endpoint"].startswith(issuer.url)


def test_access_tokens_are_jwts_that_the_published_keys_verify(issuer):
    session = issuer.session()
    keys = KeySet.import_key_set(httpx.get(f"{issuer.url}/jwks").json())
    token = jwt.decode(session.access_token, keys, algorithms=["RS256"])
    assert token.header["kid"] == keys.keys[0].kid
    assert token.claims["iss"] == issuer.url
    assert token.claims["aud"] == issuer.audience
    assert token.claims["sub"] == session.subject == "alice"
    assert token.claims["exp"] - token.claims["iat"] == pytest.approx(3600)
    assert token.claims["jti"]


def test_a_token_is_good_until_it_expires(clock):
    with FakeIssuer(access_token_lifetime=0.5, clock=clock) as issuer:
        token = issuer.session().access_token
        clock.advance(0.4)
        assert issuer.verify(token)["sub"] == "alice"
        clock.advance(0.2)
        with pytest.raises(TokenRefused, match="expired"):
            issuer.verify(token)


def test_lifetimes_of_less_than_a_second_are_real():
    with FakeIssuer(access_token_lifetime=0.25) as issuer:
        session = OidcClient(issuer.url, issuer.client_id).refresh(issuer.session())
        assert session.expires_at - session.issued_at == 0.25


def test_a_whole_lifetime_is_sent_as_a_whole_number(issuer):
    answer = token_request(issuer, grant_type="refresh_token", refresh_token=issuer.session().refresh_token)
    assert '"expires_in": 3600,' in answer.text


@pytest.mark.parametrize("rubbish", ["", "a", "a.b.c", "é.é.é", "." * 100])
def test_rubbish_is_refused(issuer, rubbish):
    with pytest.raises(TokenRefused):
        issuer.verify(rubbish)


def test_an_id_token_is_no_access_token(issuer):
    with pytest.raises(TokenRefused):
        issuer.verify(issuer.session().id_token)


def test_another_issuers_token_is_refused(issuer):
    with FakeIssuer() as other, pytest.raises(TokenRefused):
        issuer.verify(other.session().access_token)


def test_a_revoked_token_is_refused_and_its_session_lives_on(issuer, client):
    session = issuer.session()
    issuer.revoke(session.access_token)
    with pytest.raises(TokenRefused, match="revoked"):
        issuer.verify(session.access_token)
    assert issuer.verify(client.refresh(session).access_token)


def test_refresh_tokens_rotate_and_an_old_one_ends_the_session(issuer, client):
    first = issuer.session()
    second = client.refresh(first)
    assert second.refresh_token != first.refresh_token
    with pytest.raises(LoginRequired):
        client.refresh(first)
    with pytest.raises(LoginRequired):
        client.refresh(second)
    assert (issuer.refreshes, issuer.reuses) == (1, 1)


def test_without_rotation_a_refresh_token_may_be_used_again():
    with FakeIssuer(rotate=False) as issuer:
        session = issuer.session()
        client = OidcClient(issuer.url, issuer.client_id)
        assert client.refresh(session).refresh_token == client.refresh(session).refresh_token


def test_of_concurrent_refreshes_with_one_token_one_succeeds_at_most(issuer, client):
    session = issuer.session()

    def attempt(_):
        try:
            return client.refresh(session)
        except LoginRequired:
            return None

    with ThreadPoolExecutor(8) as threads:
        assert sum(map(bool, threads.map(attempt, range(8)))) == 1
    assert issuer.reuses == 1


def test_an_ended_session_needs_a_login(issuer, client):
    session = issuer.session()
    issuer.end_session(session)
    with pytest.raises(LoginRequired):
        client.refresh(session)


def test_sessions_do_not_share_their_fate(issuer, client):
    one, other = issuer.session(), issuer.session()
    issuer.end_session(one)
    assert client.refresh(other)


def test_after_a_key_rotation_only_new_tokens_are_good(issuer, client):
    session = issuer.session()
    issuer.rotate_keys()
    with pytest.raises(TokenRefused):
        issuer.verify(session.access_token)
    assert issuer.verify(client.refresh(session).access_token)


def test_an_issuer_that_is_down_refuses_connections_and_comes_back_on_its_port(issuer, client):
    session, url = issuer.session(), issuer.url
    with issuer.down():
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)
        with pytest.raises(RefreshError):
            client.refresh(session)
    assert issuer.url == url
    assert client.refresh(session)


def test_a_held_issuer_answers_when_it_is_released(issuer, client):
    session = issuer.session()
    issuer.hold()
    with ThreadPoolExecutor(1) as threads:
        refreshed = threads.submit(client.refresh, session)
        issuer.wait_for_token_requests(1)
        assert not refreshed.done()
        assert issuer.token_requests == []
        issuer.release()
        assert refreshed.result(10)
    assert len(issuer.token_requests) == 1


def test_waiting_for_requests_that_do_not_come_ends(issuer):
    with pytest.raises(TimeoutError, match="0 token requests arrived"):
        issuer.wait_for_token_requests(1, timeout=0.01)


def test_a_slow_issuer_takes_its_time(issuer, client):
    issuer.delay = 0.1
    started = time.monotonic()
    client.refresh(issuer.session())
    assert time.monotonic() - started >= 0.1


def test_it_answers_what_it_is_told_as_often_as_it_is_told(issuer):
    issuer.fail_next(2, status=503)
    issuer.answer_with(200, b"\xff<html>", {"X-Odd": "yes"})
    session = issuer.session()
    answers = [token_request(issuer, grant_type="refresh_token", refresh_token=session.refresh_token) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [503, 503, 200, 200]
    assert answers[0].json() == {"error": "temporarily_unavailable"}
    assert answers[2].content == b"\xff<html>"
    assert answers[2].headers["X-Odd"] == "yes"
    assert answers[3].json()["access_token"]


def test_other_paths_can_be_made_to_fail_as_well(issuer):
    issuer.answer_with(500, path="/jwks")
    assert token_request(issuer, grant_type="nothing").status_code == 400
    assert [httpx.get(f"{issuer.url}/jwks").status_code for _ in range(2)] == [500, 200]


def test_requests_are_recorded_in_order(issuer, client):
    client.refresh(issuer.session())
    assert [(request.path, request.grant_type, request.status) for request in issuer.requests] == [
        ("/.well-known/openid-configuration", None, 200),
        ("/token", "refresh_token", 200),
        ("/jwks", None, 200),
    ]


@pytest.mark.parametrize(
    ("form", "error"),
    [
        ({"grant_type": "password"}, "unsupported_grant_type"),
        ({"grant_type": "client_credentials"}, "unsupported_grant_type"),
        ({"grant_type": "refresh_token"}, "invalid_grant"),
        ({"grant_type": "refresh_token", "client_id": "somebody-else"}, "invalid_client"),
        ({"grant_type": "authorization_code", "code": "x"}, "invalid_grant"),
        ({}, "unsupported_grant_type"),
    ],
)
def test_wrong_requests_are_told_what_is_wrong(issuer, form, error):
    answer = token_request(issuer, **form)
    assert answer.status_code in {400, 401}
    assert answer.json()["error"] == error


@pytest.mark.parametrize("header", ["Basic !", "Basic /w==", "Basic YTpi", "Bearer x"])
def test_a_wrong_client_authentication_is_refused(header):
    with FakeIssuer(client_secret="secret") as issuer:
        answer = httpx.post(f"{issuer.url}/token", headers={"Authorization": header})
        assert (answer.status_code, answer.json()) == (401, {"error": "invalid_client"})


def authorize(issuer, **changed):
    query = {
        "response_type": "code",
        "client_id": issuer.client_id,
        "redirect_uri": "http://127.0.0.1:1/callback",
        "scope": "openid",
        "code_challenge": "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM",  # RFC 7636 appendix B
        "code_challenge_method": "S256",
    }
    answer = httpx.get(f"{issuer.url}/authorize", params={**query, **changed})
    return httpx.URL(answer.headers["Location"]).params


def test_only_the_code_flow_is_supported(issuer):
    reply = authorize(issuer, response_type="token", state="x")
    assert (reply["error"], reply["state"]) == ("unsupported_response_type", "x")
    assert "code" not in reply


def test_a_code_is_good_once_and_only_with_its_verifier(issuer):
    def code():
        return authorize(issuer)["code"]

    form = {
        "grant_type": "authorization_code",
        "redirect_uri": "http://127.0.0.1:1/callback",
        "code_verifier": "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk",
    }
    assert token_request(issuer, **{**form, "code_verifier": "x"}, code=code()).status_code == 400
    good = code()
    assert token_request(issuer, **form, code=good).status_code == 200
    assert token_request(issuer, **form, code=good).status_code == 400


def a_device_login(issuer):
    return httpx.post(f"{issuer.url}/device_authorization", data={"client_id": issuer.client_id}).json()


def polled(issuer, begun):
    answer = token_request(issuer, grant_type=DEVICE_GRANT, device_code=begun["device_code"]).json()
    return answer.get("error", "approved")


def test_who_polls_too_often_is_told_to_slow_down_until_somebody_has_approved(issuer):
    issuer.auto_approve = False
    begun = a_device_login(issuer)
    assert [polled(issuer, begun) for _ in range(3)] == ["authorization_pending", "slow_down", "slow_down"]
    issuer.approve(begun["user_code"])
    assert polled(issuer, begun) == "approved"


def test_who_polls_as_often_as_the_issuer_says_is_not_slowed_down(issuer):
    issuer.auto_approve, issuer.device_interval = False, 0.02
    begun = a_device_login(issuer)
    answers = []
    for _ in range(5):
        answers.append(polled(issuer, begun))
        time.sleep(begun["interval"])
    assert answers == ["authorization_pending"] * 5


def test_a_device_code_is_no_authorization_code_and_stays_good(issuer):
    begun = a_device_login(issuer)
    answer = token_request(issuer, grant_type="authorization_code", code=begun["device_code"])
    assert answer.json() == {"error": "invalid_grant"}
    assert polled(issuer, begun) == "approved"


@pytest.mark.parametrize("token", ["rubbish", "a.b.c", "é.é.é", "e30.e30.e30", "an id token"])
def test_revoking_what_is_no_token_of_its_is_no_error(issuer, token):
    session = issuer.session()
    answer = httpx.post(f"{issuer.url}/revoke", data={"token": session.id_token if token == "an id token" else token})
    assert answer.status_code == 200
    assert issuer.verify(session.access_token)


@pytest.mark.parametrize("login", ["browser", "device"])
def test_a_login_that_is_not_to_last_is_a_persons_all_the_same(issuer, login):
    # Given a client that does not ask for offline access
    client = OidcClient(issuer.url, issuer.client_id, scope="openid email")
    # When somebody logs in
    if login == "browser":
        session = client.login(open_browser=lambda url: httpx.get(url, follow_redirects=True), timeout=10)
    else:
        issuer.device_interval = 0.01
        session = client.device_login(lambda _: None)
    # Then the session is theirs, though it cannot be refreshed
    assert (session.subject, session.refresh_token) == ("alice", None)
    assert issuer.verify(session.access_token)["sub"] == "alice"
    assert session.id_token is not None


def test_a_client_on_its_own_behalf_is_nobody(issuer):
    issuer.client_secret = "secret"
    client = OidcClient(issuer.url, issuer.client_id, client_secret="secret", scope="openid")
    session = client.client_credentials()
    assert issuer.verify(session.access_token)["sub"] == issuer.client_id
    assert session.id_token is None


def test_many_requests_at_once_are_all_counted(issuer, client):
    sessions = [issuer.session() for _ in range(32)]
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(client.refresh, sessions))
    assert issuer.refreshes == 32


def test_it_leaves_no_thread_behind():
    with FakeIssuer() as issuer:
        OidcClient(issuer.url, issuer.client_id).refresh(issuer.session())
    deadline = time.monotonic() + 10
    while any(thread.name == "fake-issuer" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
