"""What importing the package adds to `import grpc`."""

from __future__ import annotations

import statistics
import subprocess
import sys

_SCRIPT = """
import time
import grpc
start = time.perf_counter()
import interceptors
from interceptors import {names}
print((time.perf_counter() - start) * 1000)
"""


def over_grpc(rounds: int) -> None:
    print(f"\nimport time over `import grpc`: milliseconds, median of {rounds}")
    for names in (
        "Token",
        "intercept_channel, RefreshingTokenSource",
        "intercept_channel, FileStore, OidcClient",
    ):
        script = _SCRIPT.format(names=names)
        times = [
            float(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)
            for _ in range(rounds)
        ]
        print(f"from interceptors import {names:<60}{statistics.median(times):7.1f}")
