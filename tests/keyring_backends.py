"""Keyrings for tests: one in a file, with Windows' limit; one that is locked, one that hangs, one without a bus."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import keyring.backend
import keyring.errors


class FileKeyring(keyring.backend.KeyringBackend):
    """As little safe with several processes as real ones: each change reads and writes the whole file."""

    priority = 0  # never chosen by itself
    limit = 2560

    def __init__(self, path=None):
        super().__init__()
        self.path = Path(path or os.environ.get("TEST_KEYRING", os.devnull))

    def _entries(self):
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def entries(self):
        return self._entries()

    def _write(self, entries):
        temporary = self.path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        temporary.write_text(json.dumps(entries))
        temporary.replace(self.path)

    def get_password(self, service, username):
        return self._entries().get(f"{service} {username}")

    def set_password(self, service, username, password):
        if len(password.encode("utf-16-le")) > self.limit:
            raise keyring.errors.PasswordSetError("the secret is too long")
        self._write({**self._entries(), f"{service} {username}": password})

    def delete_password(self, service, username):
        entries = self._entries()
        if entries.pop(f"{service} {username}", None) is None:
            raise keyring.errors.PasswordDeleteError
        self._write(entries)


class LockedKeyring(FileKeyring):
    def get_password(self, service, username):
        raise keyring.errors.KeyringLocked("secret-in-error")

    def set_password(self, service, username, password):
        raise keyring.errors.KeyringLocked("secret-in-error")


class HangingKeyring(FileKeyring):
    released = threading.Event()

    def get_password(self, service, username):
        self.released.wait(60)

    def set_password(self, service, username, password):
        self.released.wait(60)


class GatedKeyring(FileKeyring):
    """Waits with each write until its gate is open, as one with a prompt does."""

    def __init__(self, path):
        super().__init__(path)
        self.gate = threading.Event()
        self.gate.set()
        self.writes = 0

    def set_password(self, service, username, password):
        self.writes += 1
        assert self.gate.wait(60)
        super().set_password(service, username, password)


class BrokenKeyring(FileKeyring):
    def get_password(self, service, username):
        raise FileNotFoundError(2, "No such file or directory")

    def set_password(self, service, username, password):
        raise FileNotFoundError(2, "No such file or directory")
