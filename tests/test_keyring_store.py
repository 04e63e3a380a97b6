"""What only keyrings do: hang, be locked, be missing; and what Windows' limit asks for."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager
from pathlib import Path

import keyring
import keyring.backends.fail
import keyring.backends.null
import keyring_backends
import pytest
from conftest import eventually, requires
from test_store_contract import LONG, SESSION

from interceptors import KeyringStore, StoreError


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def backend(tmp_path):
    backend = keyring_backends.FileKeyring(tmp_path / "keyring.json")
    with using(backend):
        yield backend


@contextmanager
def using(backend):
    previous = keyring.get_keyring()
    keyring.set_keyring(backend)
    yield backend
    keyring.set_keyring(previous)


def test_a_long_session_is_spread_over_secrets_that_windows_can_keep(backend):
    store = KeyringStore()
    store.save(LONG)
    entries = backend.entries()
    assert len(entries) > 5
    assert all(len(secret.encode("utf-16-le")) <= 2560 for secret in entries.values())
    store.save(SESSION)
    assert len(backend.entries()) == 1
    store.save(LONG)
    store.clear()
    assert backend.entries() == {}


@pytest.mark.parametrize("writes", range(16))
def test_a_writer_that_dies_between_two_secrets_leaves_the_old_session_or_the_new_one(backend, writes):
    store = KeyringStore()
    store.save(LONG)
    newer = dataclasses.replace(LONG, refresh_token="newer", scope="x" * 1500)
    left = [writes]

    class Killed(BaseException):
        pass

    def dying(act):
        def wrapped(*arguments):
            if not left[0]:
                raise Killed
            left[0] -= 1
            return act(*arguments)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "set_password", dying(backend.set_password))
        patch.setattr(backend, "delete_password", dying(backend.delete_password))
        try:
            store.save(newer)
        except Killed:
            pass
        else:
            assert left[0] > 0
    assert store.load() in ([LONG, newer] if left[0] == 0 else [newer])
    for session in (newer, LONG, SESSION):
        store.save(session)
        assert store.load() == session
    assert len(backend.entries()) == 1


@pytest.mark.parametrize("deletions", range(1, 8))
@pytest.mark.parametrize("killed", ["clear", "save"])
def test_what_a_removal_that_was_killed_has_left_is_removed_by_the_next_one(backend, killed, deletions):
    store = KeyringStore()
    store.save(LONG)
    delete, left = backend.delete_password, [deletions]

    class Killed(BaseException):
        pass

    def dying(*arguments):
        if not left[0]:
            raise Killed
        left[0] -= 1
        delete(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "delete_password", dying)
        with pytest.raises(Killed):
            store.clear() if killed == "clear" else store.save(SESSION)
    store.clear()
    assert backend.entries() == {}


def test_a_missing_part_is_an_error_and_not_a_shorter_session(backend):
    store = KeyringStore()
    store.save(LONG)
    entries = backend.entries()
    del entries[next(name for name in entries if "\t" in name)]
    backend.path.write_text(json.dumps(entries))
    with pytest.raises(StoreError, match="damaged"):
        store.load()
    store.clear()
    assert store.load() is None


def test_profiles_and_services_are_side_by_side(backend):
    stores = [KeyringStore(), KeyringStore("work"), KeyringStore("work", service="other")]
    for i, store in enumerate(stores):
        store.save(dataclasses.replace(LONG, subject=str(i)))
    assert [store.load().subject for store in stores] == ["0", "1", "2"]
    stores[1].clear()
    assert [store.load() and store.load().subject for store in stores] == ["0", None, "2"]
    with stores[0].lock(), stores[1].lock(0), stores[2].lock(0):
        pass


def test_a_keyring_that_hangs_is_given_up(tmp_path):
    store = KeyringStore(timeout=0.2)
    with using(keyring_backends.HangingKeyring(tmp_path / "keyring.json")) as backend:
        try:
            for act in (store.load, lambda: store.save(SESSION), store.clear):
                with pytest.raises(StoreError, match=r"did not answer within 0.2 s: unlock it.* FileStore"):
                    act()
        finally:
            backend.released.set()


def accesses():
    return sum(thread.name == "interceptors-keyring" for thread in threading.enumerate())


@pytest.fixture
def gated(tmp_path):
    with using(keyring_backends.GatedKeyring(tmp_path / "keyring.json")) as backend:
        yield backend
        backend.gate.set()
        eventually(lambda: not accesses())


def test_while_a_keyring_hangs_one_access_waits_for_it_and_the_others_for_that_one(gated):
    store = KeyringStore(timeout=0.1)
    gated.gate.clear()
    for _ in range(5):
        with pytest.raises(StoreError, match=r"did not answer within 0.1 s: unlock it"):
            store.save(SESSION)
    assert accesses() == gated.writes == 1
    gated.gate.set()
    eventually(lambda: not accesses())
    store.save(LONG)
    assert store.load() == LONG


def test_a_write_that_was_given_up_stops_and_what_was_kept_before_stays_whole(gated):
    store = KeyringStore(timeout=0.1)
    store.save(LONG)
    gated.gate.clear()
    writes = gated.writes
    with pytest.raises(StoreError, match="did not answer"):
        store.save(dataclasses.replace(LONG, refresh_token="newer"))
    gated.gate.set()
    eventually(lambda: not accesses())
    assert gated.writes == writes + 1
    assert store.load() == LONG


def test_a_write_that_was_given_up_never_lands_after_a_newer_one(gated):
    late, patient = KeyringStore(timeout=0.1), KeyringStore(timeout=20)
    newer = dataclasses.replace(SESSION, refresh_token="newer")
    gated.gate.clear()
    with pytest.raises(StoreError, match="did not answer"):
        late.save(SESSION)
    prompt, gated.gate = gated.gate, threading.Event()
    gated.gate.set()
    saving = threading.Thread(target=patient.save, args=(newer,))
    saving.start()
    saving.join(0.3)  # time enough to overtake, if it could
    prompt.set()
    saving.join(20)
    eventually(lambda: not accesses())
    assert patient.load() == newer


@pytest.mark.parametrize(
    ("backend", "says"),
    [
        (keyring.backends.fail.Keyring(), "no keyring"),
        (keyring.backends.null.Keyring(), "no keyring"),
        (keyring_backends.LockedKeyring(), "is locked: unlock it"),
        (keyring_backends.BrokenKeyring(), "cannot be used"),
        (type("PlaintextKeyring", (keyring_backends.FileKeyring,), {})(), "plain text"),
    ],
    ids=["fail", "null", "locked", "no bus", "plain text"],
)
def test_a_keyring_that_cannot_be_used_is_an_error_that_names_the_way_out(backend, says):
    store = KeyringStore()
    with using(backend):
        for act in (store.load, lambda: store.save(SESSION)):
            with pytest.raises(StoreError, match=says) as caught:
                act()
            assert "FileStore" in str(caught.value)
            assert "secret-in-error" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"profile": ""}, ValueError),
        ({"profile": "a\nb"}, ValueError),
        ({"profile": None}, TypeError),
        ({"service": ""}, ValueError),
        ({"timeout": 0}, ValueError),
        ({"timeout": "10"}, TypeError),
    ],
)
def test_bad_arguments(arguments, error):
    with pytest.raises(error, match=next(iter(arguments))):
        KeyringStore(**arguments)


def test_a_real_keyring_of_the_secret_service(tmp_path):
    requires("gnome-keyring-daemon")
    requires("dbus-run-session")
    script = textwrap.dedent(
        """
        import sys, threading
        sys.path.insert(0, sys.argv[1])
        from test_store_contract import LONG, SESSION
        from interceptors import KeyringStore
        store = KeyringStore("real")
        for session in (LONG, SESSION):
            store.save(session)
            assert KeyringStore("real").load() == session
        def work():
            store.save(LONG)
            assert store.load() == LONG
        threads = [threading.Thread(target=work) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        store.clear()
        assert store.load() is None
        print("all is well")
        """
    )
    done = with_keyring([sys.executable, "-c", script, str(Path(__file__).parent)])
    assert done.stdout.endswith("all is well\n"), done.stderr


def test_without_a_bus_there_is_a_clear_error(tmp_path):
    script = "from interceptors import KeyringStore; KeyringStore(timeout=5).load()"
    nowhere = f"unix:path={tmp_path}/no-bus"
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "DBUS_SESSION_BUS_ADDRESS": nowhere,
        "PYTHON_KEYRING_BACKEND": "keyring.backends.SecretService.Keyring",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 1
    assert "StoreError" in done.stderr.splitlines()[-1]
    assert "FileStore" in done.stderr.splitlines()[-1]


def with_keyring(command, **options):
    script = str(Path(__file__).parent / "with-keyring.sh")
    return subprocess.run(
        ["bash", script, *command], check=False, capture_output=True, text=True, timeout=90, **options
    )
