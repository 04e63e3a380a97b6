"""What a user meets first: the package's names, what importing them costs, and the README."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import interceptors

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
DESIGN = [
    "intercept_channel",
    "authenticated_channel",
    "intercept_stub",
    "BearerInterceptor",
    "aio_bearer_interceptors",
    "ConnectBearerInterceptor",
    "Token",
    "TokenSource",
    "StaticTokenSource",
    "CallableTokenSource",
    "RefreshingTokenSource",
    "Session",
    "SessionStore",
    "KeyringStore",
    "FileStore",
    "MemoryStore",
    "RedisStore",
    "OidcClient",
    "open_session",
    "AuthError",
    "LoginRequired",
    "RefreshError",
    "StoreError",
]


def python(code):
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_is_there():
    assert set(DESIGN) <= set(interceptors.__all__)
    for name in interceptors.__all__:
        assert getattr(interceptors, name).__doc__
        assert name in dir(interceptors)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Tokens'"):
        interceptors.Tokens  # noqa: B018 - looking is what is tested


@pytest.mark.parametrize(
    ("names", "unneeded"),
    [
        ("Token", ["grpc", "connectrpc", "httpx", "authlib", "joserfc", "keyring", "redis", "platformdirs"]),
        ("intercept_channel, RefreshingTokenSource, FileStore", ["connectrpc", "httpx", "authlib", "keyring", "redis"]),
        ("ConnectBearerInterceptor", ["grpc", "httpx", "authlib", "keyring", "redis"]),
    ],
)
def test_who_uses_one_part_does_not_import_the_others(names, unneeded):
    loaded = python(f"from interceptors import {names}; import sys; print(*sys.modules)").split()
    assert [name for name in unneeded if name in loaded] == []


def test_the_package_is_typed():
    assert files("interceptors").joinpath("py.typed").is_file()


def test_the_command_line_is_there():
    done = subprocess.run(
        [sys.executable, "-m", "interceptors", "--version"], capture_output=True, text=True, check=True
    )
    assert "interceptors" in done.stdout


def test_the_readmes_code_names_what_there_is():
    for block in BLOCKS:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = __import__(node.module, fromlist=["_"])
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_the_readmes_test_works_as_it_is_written():
    block = next(block for block in BLOCKS if "FakeIssuer" in block)
    call = (
        "heartbeat_pb2_grpc.HeartbeatServiceStub(channel)"
        ".Heartbeat(heartbeat_pb2.HeartbeatRequest(session_id='s'), timeout=10)"
    )
    assert "..." in block
    code = re.sub(r"\.\.\.  #.*", call, block)
    code += "        assert (issuer.refreshes, server.refusals, len(server.calls)) == (1, 1, 1)\n"
    python(f"from interceptors.gen.kontext.agent.v1 import heartbeat_pb2, heartbeat_pb2_grpc\n{code}")


def test_the_readme_names_every_command():
    from interceptors.cli import main

    for command in main.commands:
        assert f"interceptors {command}" in README or f"make {command}" in README
