"""A session in a file that only its owner can read."""

from __future__ import annotations

import contextlib
import glob
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from interceptors.errors import LOGIN_HINT, StoreError
from interceptors.stores import format as session_format
from interceptors.stores.base import SessionStore
from interceptors.stores.locks import file_lock
from interceptors.stores.memory import check_session

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from interceptors.session import Session

_POSIX: Final = os.name == "posix"
_OTHERS: Final = 0o077


class FileStore(SessionStore):
    """Keeps a session in a file (0600, in a directory that is made with 0700), for machines without a keyring.

    The file is in plain text: whoever can read it can use the session, backups included. Prefer `KeyringStore`.

    Args:
        path: The file. A leading `~` is the home directory.

    Raises:
        TypeError: `path` is no path.
        ValueError: `path` is empty, a directory, or cannot be a path.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            text = os.fspath(path)
        except TypeError:
            text = None
        if not isinstance(text, str):
            msg = f"path must be a str or a path, not {type(path).__name__}"
            raise TypeError(msg)
        if "\0" in text:
            msg = f"path must not contain a NUL character: {text!r}"
            raise ValueError(msg)
        try:
            self._path = Path(text).expanduser().absolute()
        except RuntimeError:
            msg = f"path must not begin with the home directory of an unknown user: {text!r}"
            raise ValueError(msg) from None
        if not text or os.path.isdir(self._path):  # noqa: PTH112 - Path.is_dir raises where nobody may look
            msg = f"path must name a file, not a directory: {text!r}"
            raise ValueError(msg)

    def load(self) -> Session | None:
        """See `SessionStore.load`; also refuses a file that others can read."""
        try:
            file = open(self._path, "rb", opener=_open)  # noqa: SIM115 - Path.open takes no opener
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._error("cannot be read", error) from error
        with file:
            self._check_private(os.fstat(file.fileno()))
            try:
                content = file.read()
            except OSError as error:
                raise self._error("cannot be read", error) from error
        return session_format.loads(content, str(self), f"remove the file and {LOGIN_HINT}")

    def save(self, session: Session) -> None:
        """See `SessionStore.save`."""
        check_session(session)
        content = session_format.dumps(session).encode()
        directory = self._path.parent
        temporary = ""
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._remove_leftovers()
            # mkstemp makes the file for its owner only, whatever the umask.
            descriptor, temporary = tempfile.mkstemp(prefix=self._prefix, suffix=".tmp", dir=directory)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(self._path)
            temporary = ""
            if _POSIX:
                # The new name must survive a power cut as well.
                descriptor = os.open(directory, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        except OSError as error:
            raise self._error("cannot be written", error) from error
        finally:
            if temporary:
                with contextlib.suppress(OSError):
                    Path(temporary).unlink()

    def clear(self) -> None:
        """See `SessionStore.clear`."""
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            raise self._error("cannot be removed", error) from error

    def lock(self, timeout: float | None = None) -> AbstractContextManager[None]:
        """See `SessionStore.lock`: between threads and processes, through a file beside."""
        return file_lock(self._path.with_name(f"{self._path.name}.lock"), timeout, f"the session in {self}")

    def __repr__(self) -> str:
        return f"FileStore({str(self._path)!r})"

    def __str__(self) -> str:
        return f"file {self._path}"

    @property
    def _prefix(self) -> str:
        return f".{self._path.name}."

    def _check_private(self, status: os.stat_result) -> None:
        if not _POSIX:
            return
        if not stat.S_ISREG(status.st_mode):
            msg = f"{self} is not a regular file: choose another path"
            raise StoreError(msg)
        if status.st_uid != os.geteuid():
            msg = f"{self} belongs to another user: choose another path"
            raise StoreError(msg)
        if status.st_mode & _OTHERS:
            msg = (
                f"{self} can be read by others (mode {stat.S_IMODE(status.st_mode):04o}), so its session may be known: "
                f"run 'chmod 600 {self._path}' if you trust it, else remove it and {LOGIN_HINT}"
            )
            raise StoreError(msg)

    def _remove_leftovers(self) -> None:
        """Removes what writers that were killed have left behind; one that is at work now is not touched."""
        newest_to_remove = None
        # What mkstemp puts between prefix and suffix, so that no other file's are taken for this one's.
        pattern = f"{glob.escape(self._prefix)}{'[a-z0-9_]' * 8}.tmp"
        for leftover in self._path.parent.glob(pattern):
            with contextlib.suppress(OSError):
                if newest_to_remove is None:
                    newest_to_remove = _file_system_time(self._path.parent) - _LEFTOVER_SECONDS
                if leftover.stat().st_mtime < newest_to_remove:
                    leftover.unlink()

    def _error(self, what: str, error: OSError) -> StoreError:
        return StoreError(f"{self} {what} ({error.strerror or error}): make it accessible, or choose another path")


_LEFTOVER_SECONDS: Final = 60.0


def _open(path: str, flags: int) -> int:
    # A FIFO would wait for somebody to write.
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _file_system_time(directory: Path) -> float:
    # A network file system may have a clock of its own.
    with tempfile.TemporaryFile(dir=directory) as probe:
        return os.fstat(probe.fileno()).st_mtime
