"""Paired rounds: every variant is measured in every round, in changing order, against the same server."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def serving() -> Iterator[tuple[str, str, str]]:
    """The targets of the server process: gRPC in plain text and with local credentials, and the URL for Connect."""
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        plain, local, url = process.stdout.readline().split()
        try:
            yield f"127.0.0.1:{plain}", f"127.0.0.1:{local}", url
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(10)


def paired(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(CPU seconds of this process, wall seconds) of each variant in each round."""
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    order = list(variants)
    for run in variants.values():
        run()
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            cpu, wall = time.process_time(), time.perf_counter()
            variants[name]()
            measured[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return measured


def ratios(
    measured: dict[str, list[tuple[float, float]]], base: str, which: int
) -> dict[str, tuple[float, float, float]]:
    """Median and quartiles, over the rounds, of each variant's ratio to `base` in the same round."""
    result = {}
    for name, rounds in measured.items():
        values = sorted(mine[which] / other[which] for mine, other in zip(rounds, measured[base], strict=True))
        low, median, high = statistics.quantiles(values, n=4)
        result[name] = (median, low, high)
    return result


def row(label: str, *cells: tuple[float, float, float]) -> str:
    """A line of a table: each cell the median and the interquartile range."""
    return f"{label:<34}" + "".join(f"  {median:6.3f} [{low:.3f} - {high:.3f}]" for median, low, high in cells)
