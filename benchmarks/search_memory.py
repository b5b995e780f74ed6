"""Measure the memory of exact search at all sizes over a memory-mapped file larger than the memory (Linux).

    python -m benchmarks.search_memory                       # ImageNet's 1,281,167 x 2048 in float32: 10 GiB of disk
    python -m benchmarks.search_memory --rows 100000 --queries 100 --scratch DIR

Prints one JSON line. "memory_beyond_page_cache_gib" is the peak memory that the search added, without file pages.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from mrl import exact_search
from mrl.matryoshka import default_nesting_list
from mrl.progress import progress

CHUNK = 10_000


def own_memory() -> int:
    """Return the bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_281_167, help="database vectors")
    parser.add_argument("--width", type=int, default=2048, help="coordinates of an embedding")
    parser.add_argument("--queries", type=int, default=500, help="queries")
    parser.add_argument("--k", type=int, default=200, help="neighbors per query")
    parser.add_argument("--scratch", metavar="DIR", help="folder for the temporary file of rows x width x 4 bytes")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((args.queries, args.width), dtype=np.float32)
    dims = default_nesting_list(args.width)
    done = threading.Event()
    samples: list[int] = []

    def watch() -> None:
        while not done.wait(0.05):
            samples.append(own_memory())

    with tempfile.NamedTemporaryFile(dir=args.scratch) as file:
        shape = (args.rows, args.width)
        database = np.memmap(file, np.float32, "w+", shape=shape)
        for first in progress(range(0, args.rows, CHUNK), desc="write", unit="chunk"):
            rng.standard_normal(out=database[first : first + CHUNK], dtype=np.float32)
        database.flush()
        database = np.memmap(file, np.float32, "r", shape=shape)
        exact_search(queries[:1], database[:64], 1, dims)  # load the libraries first
        before = own_memory()
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        started = time.perf_counter()
        exact_search(queries, database, args.k, dims, progress=True)
        seconds = time.perf_counter() - started
        done.set()
        watcher.join()
    row = {
        "measurement": "memory of exact search, every size in one pass, database in a mapped file",
        **{"rows": args.rows, "width": args.width, "queries": args.queries, "k": args.k, "dims": dims},
        "file_gib": round(args.rows * args.width * 4 / 2**30, 2),
        "memory_beyond_page_cache_gib": round((max(samples) - before) / 2**30, 2),
        "seconds": round(seconds, 1),
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
