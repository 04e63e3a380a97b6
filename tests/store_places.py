"""The places that keep sessions, for the contract that all of them fulfil."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import keyring
import pytest
import redis
from conftest import eventually, requires
from keyring_backends import FileKeyring

from interceptors import FileStore, KeyringStore, MemoryStore, RedisStore


class Place:
    """Makes stores of the same place: `store()` here; `environment` and `code` for other processes."""

    environment: dict[str, str]

    def __init__(self, make, code="", environment=None, corrupt=None):
        self.store = make
        self.code = code
        self.environment = {**os.environ, **(environment or {}), "PYTHONPATH": str(Path(__file__).parent)}
        self.corrupt = corrupt


@contextmanager
def memory(tmp_path):
    store = MemoryStore()
    yield Place(lambda: store)


@contextmanager
def file(tmp_path):
    path = tmp_path / "sessions" / "session.json"

    def corrupt(content):
        path.parent.mkdir(exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        path.write_text(content)

    yield Place(lambda: FileStore(path), f"from interceptors import *; store = FileStore({str(path)!r})", None, corrupt)


@contextmanager
def a_keyring(tmp_path):
    previous, backend = keyring.get_keyring(), FileKeyring(tmp_path / "keyring.json")
    environment = {
        "TEST_KEYRING": str(backend.path),
        "PYTHON_KEYRING_BACKEND": "keyring_backends.FileKeyring",
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", environment["XDG_STATE_HOME"])
        keyring.set_keyring(backend)

        def corrupt(content):
            backend.set_password("interceptors", "work", content)

        yield Place(
            lambda: KeyringStore("work"),
            "from interceptors import *; store = KeyringStore('work')",
            environment,
            corrupt,
        )
        keyring.set_keyring(previous)


@contextmanager
def gnome_keyring(tmp_path):
    """A real keyring of the Secret Service, with a session bus of its own, for other processes."""
    requires("gnome-keyring-daemon")
    requires("dbus-run-session")
    script = str(Path(__file__).parent / "with-keyring.sh")
    # It lives until its stdin is closed.
    running = subprocess.Popen(
        ["bash", script, "bash", "-c", "env -0; printf '\\n'; read -r"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    environment = dict(entry.split("=", 1) for entry in running.stdout.readline().decode().rstrip("\0\n").split("\0"))
    try:
        yield Place(
            lambda: pytest.fail("the keyring is one of other processes"),
            "from interceptors import *; store = KeyringStore('work', timeout=30)",
            {**environment, "PYTHON_KEYRING_BACKEND": "keyring.backends.SecretService.Keyring"},
        )
    finally:
        running.communicate()


@contextmanager
def redis_server():
    """The port of a Redis of our own."""
    program = requires("redis-server")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
        stdout=subprocess.DEVNULL,
    )
    client = redis.Redis(port=port)

    def up():
        try:
            return client.ping()
        except redis.ConnectionError:
            return False

    try:
        eventually(up)
        yield port
    finally:
        client.close()
        server.kill()
        server.wait()


@contextmanager
def a_redis(tmp_path):
    with redis_server() as port, ExitStack() as clients:

        def make(**options):
            return RedisStore(clients.enter_context(redis.Redis(port=port, **options)), "session")

        def corrupt(content):
            with redis.Redis(port=port) as client:
                client.hset("session", "session", content)

        place = Place(
            make,
            f"import redis; from interceptors import *; store = RedisStore(redis.Redis(port={port}), 'session')",
            None,
            corrupt,
        )
        place.port = port
        yield place


PLACES = {"memory": memory, "file": file, "keyring": a_keyring, "redis": a_redis}


def process(place, script, *, environment=None, **options):
    """Another process, with `store` at hand."""
    return subprocess.Popen(
        [sys.executable, "-c", f"{place.code}\n{script}"],
        env={**place.environment, **(environment or {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )
