"""What asking a source for a fresh token costs, beside google-auth."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from benchmarks.grpc_sync import GoogleCredentials
from interceptors import MemoryStore, RefreshingTokenSource, Session


def fresh(rounds: int, calls: int) -> None:
    now = time.time()
    session = Session(access_token="t" * 800, issued_at=now, expires_at=now + 3600)
    with RefreshingTokenSource(MemoryStore(session), lambda _: session) as source:
        source.token()
        google_auth = GoogleCredentials()
        google_auth.expiry = (datetime.now(UTC) + timedelta(hours=1)).replace(tzinfo=None)
        variants: dict[str, Callable[[], object]] = {
            "source.peek()": source.peek,
            "source.token()": source.token,
            "google-auth before_request()": lambda: google_auth.before_request(None, "POST", "", {}),
        }
        print(f"\na fresh token: microseconds a call, median of {rounds} rounds of {calls} calls")
        for threads in (1, 64):
            for name, ask in variants.items():
                times = [_seconds(ask, threads, calls // threads) for _ in range(rounds)]
                print(f"{f'{name}, {threads} threads':<42}{statistics.median(times) * 1e6:8.3f}")


def _seconds(ask: Callable[[], object], threads: int, calls: int) -> float:
    barrier = threading.Barrier(threads + 1)

    def run() -> None:
        barrier.wait()
        for _ in range(calls):
            ask()
        barrier.wait()

    workers = [threading.Thread(target=run) for _ in range(threads)]
    for worker in workers:
        worker.start()
    barrier.wait()
    start = time.perf_counter()
    barrier.wait()
    elapsed = time.perf_counter() - start
    for worker in workers:
        worker.join()
    return elapsed / (threads * calls)
