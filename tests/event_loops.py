"""The event loops on which asyncio's flavours are tested: all that are here."""

from __future__ import annotations

import asyncio

LOOPS = {"asyncio": asyncio.new_event_loop}
try:
    import uvloop
except ImportError:  # there is none for Windows
    pass
else:
    LOOPS["uvloop"] = uvloop.new_event_loop

if hasattr(asyncio, "eager_task_factory"):  # from Python 3.12 on

    def new_eager_loop():
        loop = asyncio.new_event_loop()
        loop.set_task_factory(asyncio.eager_task_factory)
        return loop

    LOOPS["eager"] = new_eager_loop
