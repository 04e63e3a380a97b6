"""A certified OpenID Provider, npm's oidc-provider, for the tests that should not trust our own fake."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
from conftest import REQUIRE_ALL, requires

from interceptors import Session

FOLDER = Path(__file__).parent / "oidc_provider"


class Provider:
    """The provider, in a process of its own on a free port. Clients: `native`, and `service` with `service-secret`.

    Options: `accessTtl`, `refreshTtl`, `deviceTtl` (seconds), `rotate`, `audience`, `port`.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options

    def __enter__(self) -> Self:
        node = requires("node")
        if not (FOLDER / "node_modules").is_dir():
            reason = "oidc-provider is not installed: npm ci --prefix tests/oidc_provider"
            if REQUIRE_ALL:
                pytest.fail(reason)
            pytest.skip(reason)
        self._process = subprocess.Popen(
            [node, "server.mjs", json.dumps(self._options)],
            cwd=FOLDER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        self.issuer = json.loads(self._process.stdout.readline())["issuer"]
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def token_requests(self) -> list[dict[str, int]]:
        """Every token request so far: `at` (milliseconds), `status`."""
        return httpx.get(f"{self.issuer}/_test/log").json()

    def session(self, scope: str = "openid offline_access api.read") -> Session:
        """A session that has to be refreshed before it is of use, without a login."""
        minted = httpx.get(f"{self.issuer}/_test/mint", params={"scope": scope}).json()
        return Session(
            access_token="expired",
            issued_at=0.0,
            expires_at=1.0,
            refresh_token=minted["refresh_token"],
            issuer=self.issuer,
            client_id="native",
            subject="alice",
            scope=scope,
        )
