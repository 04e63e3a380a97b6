"""The command line: a session's life, where settings come from, and what a person is told when something is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
import webbrowser

import httpx
import keyring
import keyring.backends.fail
import pytest
from click.testing import CliRunner
from conftest import eventually
from keyring_backends import FileKeyring, LockedKeyring

from interceptors import FileStore, KeyringStore, LoginRequired, OidcClient, Session, StoreError
from interceptors.cli import keeping, main
from interceptors.testing import FakeIssuer


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("INTERCEPTORS_") and "REQUIRE" not in name]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    previous = keyring.get_keyring()
    keyring.set_keyring(FileKeyring(tmp_path / "keyring.json"))
    yield tmp_path
    keyring.set_keyring(previous)


def run(*arguments, **environment):
    return CliRunner(env=environment).invoke(main, list(arguments))


def configure(home, text):
    folder = home / "config" / "interceptors"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(text)


def device_login(issuer, *arguments):
    issuer.device_interval = 0.01
    return run("login", "--device", "--issuer", issuer.url, "--client-id", issuer.client_id, *arguments)


@pytest.fixture
def logged_in(issuer):
    assert device_login(issuer).exit_code == 0
    return KeyringStore()


# A session's life


def test_a_device_login_shows_where_to_go_and_keeps_the_session_in_the_keyring(issuer):
    result = device_login(issuer)
    assert result.exit_code == 0
    assert f"Open {issuer.url}/device and enter the code " in result.stderr
    assert f"Logged in as Alice at {issuer.url}; the session is kept in the keyring" in result.stderr
    assert result.stdout == ""
    session = KeyringStore().load()
    assert session.identity == f"{issuer.url}#alice"


def test_a_browser_login_prints_the_address_and_keeps_the_session(issuer, monkeypatch):
    pages = []

    def open_browser(address):
        pages.append(httpx.get(address, follow_redirects=True).text)
        return True

    monkeypatch.setattr(webbrowser, "open", open_browser)
    result = run("login", "--issuer", issuer.url, "--client-id", issuer.client_id)
    assert result.exit_code == 0, result.stderr
    assert f"{issuer.url}/authorize?" in result.stderr
    assert "You are logged in" in pages[0]
    assert KeyringStore().load().subject == "alice"


def test_a_login_that_nobody_completes_ends_in_time(issuer, monkeypatch):
    monkeypatch.setattr(webbrowser, "open", lambda _: False)
    issuer.auto_approve = False
    result = run("login", "--issuer", issuer.url, "--client-id", issuer.client_id, "--timeout", "0.05")
    assert result.exit_code == 1
    assert 'run "interceptors login"' in result.stderr
    assert KeyringStore().load() is None


def test_a_device_login_that_nobody_completes_ends_in_time(issuer):
    issuer.auto_approve = False
    result = device_login(issuer, "--timeout", "0.2")
    assert result.exit_code == 1
    assert 'nobody has approved the login within 0.2 s: run "interceptors login" again' in result.stderr


@pytest.fixture
def visits(monkeypatch):
    """What a browser was sent to; whoever it belongs to logs in at once."""
    visits = []
    monkeypatch.setattr(webbrowser, "open", lambda address: visits.append(httpx.get(address, follow_redirects=True)))
    return visits


def browser_login(issuer, store):
    return run("login", "--issuer", issuer.url, "--client-id", issuer.client_id, "--store", f"file:{store._path}")


@pytest.mark.parametrize("kept", [True, False], ids=["over a session", "over none"])
@pytest.mark.parametrize("method", ["lock", "save"])
def test_nobody_logs_in_for_a_store_that_cannot_keep_it(issuer, home, visits, monkeypatch, method, kept):
    store = FileStore(home / "session.json")
    before = issuer.session() if kept else None
    if kept:
        store.save(before)

    def fail(*_):
        raise StoreError("the disk is full")

    monkeypatch.setattr(FileStore, method, fail)
    result = browser_login(issuer, store)
    assert (result.exit_code, result.stderr) == (1, "Error: the disk is full\n")
    assert (visits, issuer.requests) == ([], [])
    assert store.load() == before


def test_a_store_that_was_proven_is_left_as_it_was(issuer, home, visits):
    store = FileStore(home / "session.json")
    with issuer.down():
        assert browser_login(issuer, store).exit_code == 1
    assert store.load() is None
    before = issuer.session()
    store.save(before)
    with issuer.down():
        assert browser_login(issuer, store).exit_code == 1
    assert store.load() == before


def test_a_login_is_kept_though_the_lock_is_not_to_be_had(issuer, home, monkeypatch):
    store = FileStore(home / "session.json")
    lock = FileStore.lock

    def held_by_another_after_the_login(store, timeout=None):
        if issuer.token_requests:
            raise StoreError("it was locked by another process")
        return lock(store, timeout)

    monkeypatch.setattr(FileStore, "lock", held_by_another_after_the_login)
    assert device_login(issuer, "--store", f"file:{home}/session.json").exit_code == 0
    assert store.load().subject == "alice"


def test_a_login_that_cannot_be_kept_is_revoked_and_says_so(issuer, home, monkeypatch):
    store = FileStore(home / "session.json")
    save, lost = FileStore.save, []

    def full_after_the_login(store, session):
        if session.refresh_token:
            lost.append(session)
            raise StoreError("the disk is full")
        save(store, session)

    monkeypatch.setattr(FileStore, "save", full_after_the_login)
    monkeypatch.setattr(keeping, "_PAUSES", (0.01,))
    result = device_login(issuer, "--store", f"file:{home}/session.json")
    assert result.exit_code == 1
    assert "Error: the disk is full; so the new session was revoked: then run" in result.stderr
    with pytest.raises(LoginRequired):
        OidcClient(issuer.url, issuer.client_id).refresh(lost[0])
    assert store.load() is None


def test_a_refused_device_login_says_so_in_one_line(issuer):
    issuer.auto_approve = False
    refusing = threading.Thread(
        target=lambda: (
            eventually(lambda: any(r.path == "/device_authorization" for r in issuer.requests)),
            issuer.deny(),
        )
    )
    refusing.start()
    result = device_login(issuer)
    refusing.join()
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: the login was refused on the other device")


def test_status_tells_who_is_logged_in_and_for_how_long(issuer, logged_in):
    result = run("status")
    assert result.exit_code == 0
    assert "Alice <alice@example.com>" in result.stdout
    assert f"{issuer.url}#alice" in result.stdout
    assert "expires in 59 min" in result.stdout
    assert "due in 44 min" in result.stdout
    assert "the keyring" in result.stdout


def test_status_is_readable_for_programs(issuer, logged_in):
    report = json.loads(run("status", "--json").stdout)
    assert report["valid"] is True
    assert report["identity"] == f"{issuer.url}#alice"
    assert 3590 < report["expires_in"] <= 3600
    assert 2690 < report["refreshes_in"] <= 2700
    assert (report["profile"], report["client_id"]) == ("default", issuer.client_id)


def test_status_without_a_session_fails(issuer):
    result = run("status")
    assert result.exit_code == 1
    assert 'run "interceptors login"' in result.output
    result = run("status", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["valid"] is False


def test_status_of_a_session_that_has_ended_fails():
    KeyringStore().save(Session(access_token="a", issued_at=1.0, expires_at=2.0))
    result = run("status")
    assert result.exit_code == 1
    assert "expired at 1970-01-01 00:00:02 UTC" in result.output
    assert "there is no refresh token" in result.output


@pytest.mark.parametrize(
    ("expires_at", "says"), [(1e13, "a date that no calendar has"), (1e308, "h"), (-1e13, "expired at a date that no")]
)
def test_status_bears_any_expiry(expires_at, says):
    KeyringStore().save(Session(access_token="a", issued_at=1.0, expires_at=expires_at))
    assert says in run("status").stdout


def test_what_an_issuer_calls_somebody_does_nothing_to_the_terminal(issuer, logged_in):
    name = "Zoë \x1b[31m\nidentity  forged\ud800\u202e"
    logged_in.save(dataclasses.replace(logged_in.load(), name=name, email=None))
    assert run("status").stdout.splitlines()[0] == "user      Zoë �[31m�identity  forged��"
    assert json.loads(run("status", "--json").stdout)["name"] == name


def test_status_as_json_says_also_what_is_wrong_with_the_store(logged_in):
    keyring.set_password("interceptors", "default", "rubbish")
    result = run("status", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["valid"] is False
    assert "interceptors logout" in report["error"]
    assert report["error"] in result.stderr


@pytest.mark.parametrize(
    ("command", "redirection", "says"),
    [
        ("token", ">&-", "there is no output to print the token to"),
        ("token", "> /dev/full", "No space left on device"),
        ("status", "> /dev/full", "No space left on device"),
        ("--help", "> /dev/full", "No space left on device"),
    ],
)
def test_an_output_that_cannot_be_written_is_one_line(issuer, home, command, redirection, says):
    FileStore(home / "session.json").save(issuer.session())
    result = subprocess.run(
        f'exec "{sys.executable}" -m interceptors {command} {redirection}',
        shell=True,
        env={**os.environ, "INTERCEPTORS_STORE": f"file:{home}/session.json"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_terminal_that_cannot_show_a_name_shows_the_rest(issuer, home):
    FileStore(home / "session.json").save(dataclasses.replace(issuer.session(), name="Zoë 李"))
    result = subprocess.run(
        [sys.executable, "-m", "interceptors", "status", "--store", f"file:{home}/session.json"],
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
        capture_output=True,
        encoding="cp1252",
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "Zoë ? <" in result.stdout


def test_token_prints_nothing_but_the_token(issuer, logged_in):
    result = run("token")
    assert result.stdout == logged_in.load().access_token + "\n"
    assert result.stderr == ""
    assert issuer.refreshes == 0


@pytest.mark.parametrize("age", [2800.0, 4000.0], ids=["about to expire", "expired"])
def test_token_prints_a_fresh_token(issuer, logged_in, age):
    session = logged_in.load()
    old = Session(
        **{
            **{name: getattr(session, name) for name in session.__dataclass_fields__},
            "issued_at": session.issued_at - age,
            "expires_at": session.expires_at - age,
        }
    )
    logged_in.save(old)
    result = run("token")
    assert issuer.verify(result.stdout.strip())["exp"] > time.time() + 3000
    assert logged_in.load().access_token == result.stdout.strip()
    assert issuer.refreshes == 1


def terminal(*arguments):
    """What the command writes to a terminal, and its exit code."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "interceptors", *arguments], stdout=theirs, stderr=subprocess.PIPE, text=True
    )
    os.close(theirs)
    chunks = []
    try:
        while chunk := os.read(ours, 65536):
            chunks.append(chunk)
    except OSError:  # how a pseudo-terminal says that nobody is left on the other side
        pass
    os.close(ours)
    error = process.communicate()[1]
    return b"".join(chunks).decode(), error, process.returncode


def test_token_refuses_a_terminal_unless_forced(issuer, home):
    store = f"file:{home}/session.json"
    assert device_login(issuer, "--store", store).exit_code == 0
    shown, error, code = terminal("token", "--store", store)
    assert (shown, code) == ("", 1)
    assert error == ("Error: a token does not belong on a screen: use it in $(interceptors token), or pass --force\n")
    shown, _, code = terminal("token", "--store", store, "--force")
    assert (issuer.verify(shown.strip())["sub"], code) == ("alice", 0)


def test_refresh_refreshes_whatever_is_left(issuer, logged_in):
    before = logged_in.load()
    result = run("refresh")
    assert result.exit_code == 0
    assert "Token refreshed; it is good for 59 min" in result.stderr
    assert logged_in.load().access_token != before.access_token
    assert issuer.refreshes == 1


def test_refresh_of_a_session_that_has_ended_says_what_to_do(issuer, logged_in):
    issuer.end_session(logged_in.load())
    result = run("refresh")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert 'run "interceptors login"' in result.stderr


def test_refresh_that_fails_does_not_claim_success(issuer, logged_in):
    with issuer.down():
        result = run("refresh")
    assert result.exit_code == 1
    assert "Token refreshed" not in result.stderr
    assert result.stderr.count("\n") == 1
    assert logged_in.load() is not None


def test_a_refresh_that_ctrl_c_interrupts_is_finished_and_saved(issuer, home):
    store = FileStore(home / "session.json")
    before = issuer.session()
    store.save(before)
    issuer.hold()
    process = subprocess.Popen(
        [sys.executable, "-m", "interceptors", "refresh", "--store", f"file:{home}/session.json"],
        stderr=subprocess.PIPE,
        text=True,
    )
    issuer.wait_for_token_requests(1)
    process.send_signal(signal.SIGINT)
    assert "Aborted!" in [process.stderr.readline().strip() for _ in range(2)]
    issuer.release()
    process.communicate(timeout=30)
    assert process.returncode == 1
    assert issuer.refreshes == 1
    assert store.load().refresh_token != before.refresh_token
    assert run("refresh", "--store", f"file:{home}/session.json").exit_code == 0


@pytest.mark.parametrize("command", ["refresh", "token"])
def test_a_store_that_cannot_be_written_is_noticed_before_the_refresh_token_is_spent(
    issuer, home, monkeypatch, command
):
    store = FileStore(home / "session.json")
    before = dataclasses.replace(issuer.session(), expires_at=time.time())
    store.save(before)

    def full(_, session):
        raise StoreError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(FileStore, "save", full)
        result = run(command, "--store", f"file:{home}/session.json")
    assert result.exit_code == 1
    assert result.stderr == "Error: the disk is full\n"
    assert issuer.token_requests == []
    assert store.load() == before


def test_saving_a_refreshed_session_is_tried_again(issuer, home, monkeypatch):
    store = FileStore(home / "session.json")
    before = issuer.session()
    store.save(before)
    save, tried = FileStore.save, []

    def full_for_a_moment(store, session):
        if session != before:
            tried.append(session)
        if len(tried) == 1:
            raise StoreError("the disk is full")
        save(store, session)

    monkeypatch.setattr(FileStore, "save", full_for_a_moment)
    assert run("refresh", "--store", f"file:{home}/session.json").exit_code == 0
    assert len(tried) == 2
    assert store.load() == tried[0]


def test_logout_revokes_then_forgets(issuer, logged_in):
    session = logged_in.load()
    result = run("logout")
    assert result.exit_code == 0
    assert "Logged out." in result.stderr
    assert logged_in.load() is None
    with pytest.raises(Exception, match="revoked"):
        issuer.verify(session.access_token)
    assert run("status").exit_code == 1


def test_logout_forgets_also_when_the_issuer_is_away(issuer, logged_in):
    with issuer.down():
        result = run("logout")
    assert result.exit_code == 0
    assert "the session may still be valid at its issuer" in result.stderr
    assert logged_in.load() is None


def test_logout_without_a_session_is_no_error():
    result = run("logout")
    assert result.exit_code == 0
    assert "Nobody is logged in" in result.stderr


# Stores and profiles


def test_profiles_live_side_by_side(issuer):
    for profile in ("work", "home"):
        assert device_login(issuer, "--profile", profile).exit_code == 0
    assert run("token", "--profile", "work").stdout != run("token", "--profile", "home").stdout
    assert run("logout", "--profile", "work").exit_code == 0
    assert run("status", "--profile", "work").exit_code == 1
    assert run("status", "--profile", "home").exit_code == 0


def test_a_file_for_each_profile(issuer, home):
    assert device_login(issuer, "--store", "file", "--profile", "work").exit_code == 0
    kept = home / "state" / "interceptors" / "session-work.json"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert FileStore(kept).load().subject == "alice"
    assert run("status", "--store", "file", "--profile", "work").exit_code == 0
    assert run("status", "--store", "file").exit_code == 1


def test_a_profile_that_is_no_file_name_is_refused():
    result = run("status", "--store", "file", "--profile", "../../etc/passwd")
    assert result.exit_code == 2
    assert "cannot be a file's name" in result.stderr


@pytest.mark.parametrize("store", ["vault", "files:/x", ""])
def test_an_unknown_store_is_named_with_the_ones_there_are(store):
    result = run("status", f"--store={store}")
    assert result.exit_code == (1 if store == "" else 2)
    assert store == "" or "keyring, file, file:PATH or a redis:// URL" in result.stderr


@pytest.mark.parametrize(
    "store",
    [
        "redis://:hunter2@127.0.0.1:1/0",
        "Redis://me:hunter2@127.0.0.1:1",
        "redis://:hunter2/3@127.0.0.1:1",
        "redis://127.0.0.1:1?password=hunter2",
        "redis://:hunter2@[",
    ],
)
def test_a_password_in_a_flag_is_refused_and_not_repeated(store):
    result = run("status", "--store", store)
    assert result.exit_code == 2
    assert "INTERCEPTORS_STORE" in result.stderr
    assert "hunter2" not in result.output


@pytest.mark.parametrize(
    "store",
    [
        "valkey://:hunter2@127.0.0.1:1",
        "redis://:hunter2/3@127.0.0.1:1",
        "redis://:hunter2#3@127.0.0.1:1",
        "redis://:hunter2@[",
        "redis://:hunter2@127.0.0.1:1?nonsense=1",
        "redis://:hunter2@127.0.0.1:1?socket_timeout=soon",
    ],
)
def test_a_url_that_is_no_store_is_not_repeated(home, store):
    results = [run("status", "--verbose", INTERCEPTORS_STORE=store)]
    configure(home, f'store = "{store}"')
    results.append(run("status", "--verbose"))
    for result in results:
        assert result.exit_code == 2
        assert result.stderr.startswith("Error: store ")
        assert "hunter2" not in result.output


def test_a_scheme_may_be_in_capital_letters():
    assert "cannot be read (ConnectionError)" in run("status", "--store", "Redis://127.0.0.1:1").stderr


def test_a_redis_that_is_away_is_one_line_without_its_password():
    result = run("status", "--verbose", INTERCEPTORS_STORE="redis://:hunter2@127.0.0.1:1/0")
    assert result.exit_code == 1
    assert "Redis" in result.stderr
    assert "hunter2" not in result.output


def test_a_file_that_cannot_be_is_one_line():
    result = run("status", "--store", f"file:{'a' * 300}")
    assert result.exit_code == 1
    assert "cannot be read (File name too long)" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_machine_without_a_keyring_names_the_way_out(issuer):
    keyring.set_keyring(keyring.backends.fail.Keyring())
    result = device_login(issuer)
    assert result.exit_code == 1
    assert "--store file" in result.stderr
    assert "enter the code" not in result.stderr  # nobody logs in in vain


def test_a_locked_keyring_says_to_unlock_it_and_nothing_of_its_own(home):
    keyring.set_keyring(LockedKeyring(home / "keyring.json"))
    result = run("status", "--verbose")
    assert result.exit_code == 1
    assert "is locked: unlock it" in result.stderr
    assert "secret-in-error" not in result.output


def test_a_damaged_session_is_mended_by_logging_out_or_in(issuer, logged_in):
    keyring.set_password("interceptors", "default", "rubbish")
    result = run("status")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "interceptors logout" in result.stderr
    assert run("logout").exit_code == 0
    assert logged_in.load() is None
    keyring.set_password("interceptors", "default", "rubbish")
    assert device_login(issuer).exit_code == 0
    assert logged_in.load().subject == "alice"


# Settings


def test_flags_go_before_the_environment_and_that_before_the_file(issuer, home):
    issuer.device_interval = 0.01
    nowhere = "https://nowhere.invalid"
    configure(home, f'issuer = "{nowhere}"\nclient_id = "{issuer.client_id}"\nprofile = "from-file"\n')
    assert run("login", "--device", INTERCEPTORS_ISSUER=issuer.url).exit_code == 0
    assert KeyringStore("from-file").load() is not None
    result = run("login", "--device", "--issuer", issuer.url, INTERCEPTORS_ISSUER=nowhere, INTERCEPTORS_PROFILE="env")
    assert result.exit_code == 0
    assert KeyringStore("env").load() is not None
    assert run("login", "--device").exit_code == 1  # it asks where the file says


def test_a_profile_has_settings_of_its_own(issuer, home):
    issuer.device_interval = 0.01
    configure(
        home,
        'issuer = "https://nowhere.invalid"\nclient_id = "nobody"\n'
        f'[profiles.work]\nissuer = "{issuer.url}"\nclient_id = "{issuer.client_id}"\n'
        'store = "file"\nscope = "openid"\n',
    )
    assert run("login", "--device", "--profile", "work").exit_code == 0
    session = FileStore(home / "state" / "interceptors" / "session-work.json").load()
    assert session.scope == "openid"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("issuer = ", "cannot be read"),
        ("isuer = 'x'", "unknown key 'isuer'"),
        ("issuer = 3", "issuer must be a string"),
        ("client_secret = 'hunter2'", "INTERCEPTORS_CLIENT_SECRET"),
        ("profiles = 3", "profiles must be tables"),
        ("[profiles]\nwork = 3", "profiles must be tables"),
        ("[profiles.work]\nprofile = 'x'", "unknown key 'profile' in [profiles.work]"),
    ],
)
def test_a_wrong_configuration_file_is_named_with_what_is_wrong(home, text, message):
    configure(home, text)
    result = run("status")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert "config.toml" in result.stderr
    assert "hunter2" not in result.output


def test_a_configuration_file_may_begin_with_a_byte_order_mark(home):
    configure(home, "\ufeffprofile = 'work'")
    assert json.loads(run("status", "--json").stdout)["profile"] == "work"


def test_what_is_missing_is_asked_for_with_all_ways_to_say_it():
    result = run("login")
    assert result.exit_code == 2
    assert "--issuer is missing: pass it, set INTERCEPTORS_ISSUER, or write it into " in result.stderr
    result = run("login", "--issuer", "https://login.example.com")
    assert "--client-id is missing: pass it, set INTERCEPTORS_CLIENT_ID" in result.stderr


def test_a_session_is_not_shown_to_another_issuer_or_client(issuer, logged_in):
    with FakeIssuer() as another:
        result = run("token", "--issuer", another.url)
        assert result.exit_code == 1
        assert "choose another --profile, or log in again" in result.stderr
        assert another.requests == []
    assert run("token", "--client-id", "somebody-else").exit_code == 1


def test_a_confidential_client_has_its_secret_from_the_environment_alone():
    with FakeIssuer(client_secret="hunter2-secret") as issuer:
        issuer.device_interval = 0.01
        arguments = ("login", "--device", "--issuer", issuer.url, "--client-id", issuer.client_id)
        result = run(*arguments, INTERCEPTORS_CLIENT_SECRET="wrong-secret")
        assert result.exit_code == 1
        assert "wrong-secret" not in result.output
        assert run(*arguments, INTERCEPTORS_CLIENT_SECRET="hunter2-secret").exit_code == 0
    assert "--client-secret" not in run("login", "--help").output


# What a person is told


@pytest.mark.parametrize(
    "arguments",
    [
        ["--bogus"],
        ["bogus"],
        ["login", "--bogus"],
        ["login", "--issuer"],
        ["login", "--issuer", "http://login.example.com", "--client-id", "x"],
        ["login", "--timeout", "0"],
        ["login", "--timeout", "soon"],
        ["login", "--timeout", "nan"],
        ["login", "--timeout", "inf"],
        ["status", "--store", "redis://["],
        ["status", "--store", "redis://127.0.0.1:port"],
        ["status", "--store", "redis://127.0.0.1?nonsense=1"],
        ["status", "--store", "file:~nosuchuser/x"],
        ["status", "--store", "file:a\0b"],
        ["demo", "--flavour", "soap"],
        ["completion"],
        ["completion", "tcsh"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_meant_is_one_line(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1


def test_an_issuer_that_is_away_is_one_line_and_verbose_says_why(issuer):
    with issuer.down():
        plain = device_login(issuer)
        verbose = device_login(issuer, "--verbose")
    assert plain.exit_code == verbose.exit_code == 1
    assert plain.stderr.count("\n") == 1
    assert issuer.url in plain.stderr
    assert verbose.stderr.startswith(plain.stderr.strip())
    assert "because of ConnectionRefusedError" in verbose.stderr


def test_help_without_a_command():
    result = run()
    for command in ("login", "status", "token", "refresh", "logout", "demo", "completion"):
        assert command in result.output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_the_command(shell):
    result = run("completion", shell)
    assert result.exit_code == 0
    assert "_INTERCEPTORS_COMPLETE" in result.stdout


def test_completion_knows_the_commands():
    result = subprocess.run(
        [sys.executable, "-m", "interceptors"],
        env={
            **os.environ,
            "_INTERCEPTORS_COMPLETE": "bash_complete",
            "COMP_WORDS": "interceptors lo",
            "COMP_CWORD": "1",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == ["plain,login", "plain,logout"]


def test_no_command_ever_shows_a_token(issuer):
    results = [device_login(issuer)]
    session = KeyringStore().load()
    results += [run(command, *options) for command in ("status", "refresh") for options in ([], ["--verbose"])]
    results += [run("status", "--json"), run("logout", "--verbose")]
    for result in results:
        for secret in (session.access_token, session.refresh_token, session.id_token):
            assert secret not in result.output
