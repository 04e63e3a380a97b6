"""What the person sees in the browser when a login ends."""

from __future__ import annotations

import html
from dataclasses import dataclass
from string import Template
from typing import Final

# No script, no font, no picture from anywhere; and the address, which holds the code, is told to nobody.
HEADERS: Final = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Connection": "close",
}

_TEMPLATE: Final = Template("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
body { font: 1.1rem/1.5 system-ui, sans-serif; max-width: 32rem; margin: 20vh auto; padding: 0 1rem }
h1 { font-size: 1.6rem }
p { overflow-wrap: anywhere }
</style>
<h1>$title</h1>
<p>$text</p>
<p>$what_to_do</p>
</html>
""")


@dataclass(frozen=True)
class Page:
    """A page and its HTTP status."""

    status: int
    body: bytes


def success() -> Page:
    """The login has worked."""
    return _page(200, "You are logged in", "This window is no longer needed.", "Close it and go back to the terminal.")


def failure(why: str) -> Page:
    """The login has failed."""
    return _page(400, "The login did not work", f"{why[:1].upper()}{why[1:]}.", "Go back to the terminal.")


def stray() -> Page:
    """A request that is no answer to this login; it goes on."""
    return _page(
        400,
        "Nothing happened",
        "This address does not belong to the login that is under way; perhaps to an earlier one.",
        "Finish the login in its own window, or go back to the terminal.",
    )


def not_found() -> Page:
    """Another address than the one that answers come to."""
    return _page(404, "Nothing is here", "This address only waits for a login.", "Go back to the terminal.")


def _page(status: int, title: str, text: str, what_to_do: str) -> Page:
    parts = {"title": title, "text": text, "what_to_do": what_to_do}
    return Page(status, _TEMPLATE.substitute({name: html.escape(part) for name, part in parts.items()}).encode())
