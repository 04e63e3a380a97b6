"""A person with a browser: headless Chromium, driven over WebDriver."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
import time
from typing import Any, Self

import httpx
from conftest import requires

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # W3C WebDriver section 12.1


class Browser:
    """Headless Chromium, closed at the end of the context. It reaches nothing but loopback."""

    def __enter__(self) -> Self:
        chromium, driver = requires("chromium"), requires("chromedriver")
        with contextlib.ExitStack() as closing:
            profile = closing.enter_context(tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True))
            port = self._start(driver, closing)
            self._client = closing.enter_context(
                httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)
            )
            arguments = [
                "--headless=new",
                "--no-sandbox",
                "--disable-dev-shm-usage",
                "--disable-gpu",
                f"--user-data-dir={profile}",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            ]
            chrome = {"binary": chromium, "args": arguments}
            capabilities = {"browserName": "chrome", "pageLoadStrategy": "eager", "goog:chromeOptions": chrome}
            self._session = ""
            session = self._post("/session", {"capabilities": {"alwaysMatch": capabilities}})["sessionId"]
            self._session = f"/session/{session}"
            closing.callback(self._client.delete, self._session)
            self._closing = closing.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def _start(self, driver: str, closing: contextlib.ExitStack) -> str:
        process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        closing.callback(process.communicate)
        closing.callback(process.terminate)
        assert process.stdout is not None
        for line in process.stdout:
            listening = re.search(r"successfully on port (\d+)", line)
            if listening is not None:
                return listening[1]
        raise AssertionError("chromedriver ended before it listened")

    def go(self, url: str) -> None:
        self._post("/url", {"url": url})

    def find(self, selector: str) -> str | None:
        found = self._post("/elements", {"using": "css selector", "value": selector})
        return found[0][_ELEMENT] if found else None

    def type(self, element: str, text: str) -> None:
        self._post(f"/element/{element}/value", {"text": text})

    def click(self, element: str) -> None:
        self._post(f"/element/{element}/click", {})

    def heading(self) -> str:
        element = self.find("h1")
        return "" if element is None else self._get(f"/element/{element}/text")

    def text(self) -> str:
        return self._get(f"/element/{self.find('body')}/text")

    def source(self) -> str:
        return self._get("/source")

    def log_in(self, url: str, *, until: str, timeout: float = 60.0) -> None:
        """Does what the provider's pages ask for, until one has the heading `until`."""
        deadline = time.monotonic() + timeout
        self.go(url)
        while True:
            try:
                if until in self.heading():
                    return
                login, submit = self.find("input[name=login]"), self.find("button[type=submit], button[autofocus]")
                if login is not None:
                    self.type(login, "alice")
                    self.type(self.find("input[name=password]") or "", "secret")
                if submit is not None:
                    self.click(submit)
            except httpx.HTTPStatusError as error:
                # The page has changed meanwhile: look again.
                if "no such element" not in error.response.text and "stale element" not in error.response.text:
                    raise
            assert time.monotonic() < deadline, f"the browser never got to {until!r}"

    def _get(self, path: str) -> Any:
        return self._answer(self._client.get(self._session + path))

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._answer(self._client.post(self._session + path, json=body))

    def _answer(self, response: httpx.Response) -> Any:
        response.raise_for_status()
        return response.json()["value"]
