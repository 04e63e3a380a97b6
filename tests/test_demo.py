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


def test_a_flavour_that_cannot_be_shown_is_refused():
    program = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "hypercorn" else find_spec(name, *rest)
from interceptors.cli import main
main(["demo", "--seconds", "5", "--flavour", "connect"])
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr == "Error: Connect needs a server that speaks it: pip install 'interceptors[testing]'\n"


def test_a_session_that_breaks_is_no_success():
    program = """
import interceptors.demo.calls as calls
from interceptors.demo import run

def broken(self):
    raise RuntimeError("as it happens")

calls.GrpcCalls.__enter__ = broken
raise SystemExit(run(5, ["grpc"], without=False))
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "grpc made no call" in done.stdout
    assert "grpc broke: RuntimeError: as it happens" in done.stdout
    assert "Nothing was lost" not in done.stdout
