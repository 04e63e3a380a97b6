"""`interceptors demo`, as a person runs it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.long


def demo(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "interceptors", "demo", "--seconds", "6", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_nothing_is_lost_in_any_flavour():
    done = demo()
    assert done.returncode == 0, done.stdout + done.stderr
    for flavour in ("grpc", "aio", "connect", "connect-aio"):
        assert f"{flavour}: conversation" in done.stdout
    assert "Nothing was lost, nothing was doubled." in done.stdout
    assert "\x1b" not in done.stdout  # no terminal, no colours
    assert done.stderr == ""


@pytest.mark.parametrize("ending", ["ctrl-c", "nobody reads"])
def test_a_demo_that_is_broken_off_ends(ending):
    process = subprocess.Popen(
        [sys.executable, "-m", "interceptors", "demo", "--seconds", "60", "--flavour", "grpc"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "tokens live" not in process.stdout.readline():
        pass
    if ending == "ctrl-c":
        process.send_signal(signal.SIGINT)
    else:
        process.stdout.close()
        process.stdout = None
    try:
        assert process.wait(30) == 1
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("flavour", ["grpc", "connect-aio"])
def test_the_old_way_loses_calls(flavour):
    done = demo("--without", "--flavour", flavour)
    assert done.returncode == 1, done.stdout + done.stderr
    assert " lost, " in done.stdout
    assert f"{flavour}: heartbeat" in done.stdout
    assert done.stderr == ""
