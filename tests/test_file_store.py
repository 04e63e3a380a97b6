"""What only files do: others can read them, names cannot be names, and something else lies in their place."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from test_store_contract import LONG, SESSION

from interceptors import FileStore, StoreError

posix = pytest.mark.skipif(os.name != "posix", reason="a matter of POSIX file systems")


def descriptors():
    return list(Path("/proc/self/fd").glob("*"))


@posix
def test_only_its_owner_can_read_it_and_what_others_can_read_is_refused(tmp_path):
    store = FileStore(tmp_path / "sessions" / "session.json")
    store.save(SESSION)
    path = tmp_path / "sessions" / "session.json"
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    path.chmod(0o640)
    with pytest.raises(StoreError, match=r"can be read by others .*chmod 600"):
        store.load()


@posix
def test_a_fifo_in_its_place_is_an_error_and_waits_for_nobody(tmp_path):
    path = tmp_path / "session.json"
    os.mkfifo(path, 0o600)
    with pytest.raises(StoreError, match="is not a regular file: choose another path"):
        FileStore(path).load()


def test_a_directory_that_has_come_in_its_place_is_an_error_for_each_access(tmp_path):
    path = tmp_path / "session.json"
    store = FileStore(path)
    path.mkdir()
    before = descriptors()
    for act in (store.load, lambda: store.save(SESSION), store.clear):
        with pytest.raises(StoreError, match="choose another path"):
            act()
    assert len(descriptors()) == len(before)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("", "must name a file"),
        (".", "must name a file"),
        ("a\0b", "must not contain a NUL"),
        ("~no-such-user-here/session.json", "unknown user"),
    ],
)
def test_what_cannot_be_a_file_is_said_at_once(path, says):
    with pytest.raises(ValueError, match=rf"^path .*{says}"):
        FileStore(path)


@pytest.mark.parametrize("length", [250, 255, 5000])
def test_a_name_that_is_too_long_is_an_error_of_the_store(tmp_path, length):
    store = FileStore(tmp_path / ("n" * length))
    with pytest.raises(StoreError, match="choose another path"):
        store.save(SESSION)
    if length > 255:
        with pytest.raises(StoreError, match="choose another path"):
            store.load()
    if length > 250:
        with pytest.raises(StoreError, match="cannot be locked"), store.lock(0):
            pass
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize("name", ["session.json", "[a]*?.json"])
def test_what_killed_writers_have_left_is_removed_and_nothing_else(tmp_path, name):
    of_this, of_another = tmp_path / f".{name}.abcd_123.tmp", tmp_path / f".{name}.other.abcd_123.tmp"
    new = tmp_path / f".{name}.abcd_456.tmp"
    for path in (of_this, of_another, new):
        path.touch()
    for path in (of_this, of_another):
        os.utime(path, (time.time() - 3600,) * 2)
    store = FileStore(tmp_path / name)
    store.save(LONG)
    assert store.load() == LONG
    assert set(tmp_path.iterdir()) == {tmp_path / name, of_another, new}


def test_a_lock_inside_a_lock_is_an_error_and_waits_for_nobody(tmp_path):
    store = FileStore(tmp_path / "session.json")
    with store.lock(), pytest.raises(StoreError, match="locked by this very thread"), store.lock():
        pass
    with store.lock(0):
        pass
