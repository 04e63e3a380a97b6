"""`make bench`: prints every number that the README names."""

from __future__ import annotations

import argparse
import os
import platform

import grpc

from benchmarks import connect, grpc_aio, grpc_sync, importing, measuring, sources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="paired rounds of each comparison")
    rounds = parser.parse_args().rounds
    print(f"CPython {platform.python_version()}, grpcio {grpc.__version__}, {os.cpu_count()} CPUs")
    print("ratios: median [interquartile range] over paired rounds; 1 is metadata passed by hand")
    with measuring.serving() as (plain, local, url):
        grpc_sync.unary(plain, local, rounds * 5, 60)
        grpc_sync.streams(plain, rounds, 2000)
        grpc_aio.unary(plain, rounds * 4, 60)
        grpc_aio.streams(plain, rounds, 1000)
        connect.unary(url, rounds * 4, 40)
        connect.unary_async(url, rounds * 4, 40)
    sources.fresh(7, 64 * 3000)
    importing.over_grpc(7)


if __name__ == "__main__":
    main()
