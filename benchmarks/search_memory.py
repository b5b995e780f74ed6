"""How much memory exact search takes over a database larger than the memory: all sizes at once, from a mapped file.

    python -m benchmarks.search_memory                       # ImageNet's 1,281,167 x 2048 in float32: 10 GiB of disk
    python -m benchmarks.search_memory --rows 100000 --queries 100 --scratch DIR

Prints one JSON line. "memory_beyond_page_cache_gib" is the peak of what the search added to the
process's own memory, pages of the file not counted (Linux).
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

CHUNK_ROWS = 10_000


def own_memory() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def write_vectors(path: Path, rows: int, width: int, rng: np.random.Generator) -> None:
    """Fill ``path`` with normal noise ``(rows, width)`` float32, as .npy."""
    vectors = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, width))
    with progress(show=True, total=rows, desc="write", unit="vector") as bar:
        for first in range(0, rows, CHUNK_ROWS):
            chunk = vectors[first : first + CHUNK_ROWS]
            rng.standard_normal(out=chunk, dtype=np.float32)
            bar.update(len(chunk))
    vectors.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_281_167, help="database vectors")
    parser.add_argument("--width", type=int, default=2048, help="coordinates of an embedding")
    parser.add_argument("--queries", type=int, default=500, help="queries")
    parser.add_argument("--k", type=int, default=200, help="neighbors per query")
    parser.add_argument("--scratch", metavar="DIR", help="where the file of rows x width x 4 bytes goes, for a while")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((args.queries, args.width), dtype=np.float32)
    dims = default_nesting_list(args.width)
    done = threading.Event()
    samples: list[int] = []

    def watch() -> None:
        while not done.wait(0.05):
            samples.append(own_memory())

    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        path = Path(folder) / "vectors.npy"
        write_vectors(path, args.rows, args.width, rng)
        database = np.load(path, mmap_mode="r")
        exact_search(queries[:1], database[:64], 1, dims)  # loads libraries, which are not what is asked about
        before = own_memory()
        watcher = threading.Thread(target=watch)
        watcher.start()
        started = time.perf_counter()
        try:
            exact_search(queries, database, args.k, dims, progress=True)
        finally:
            seconds = time.perf_counter() - started
            done.set()
            watcher.join()
    row = {
        "measurement": "memory of exact search, every size in one pass, database in a mapped file",
        **vars(args),
        "dims": dims,
        "file_gib": round(args.rows * args.width * 4 / 2**30, 2),
        "memory_beyond_page_cache_gib": round((max(samples) - before) / 2**30, 2),
        "seconds": round(seconds, 1),
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps({key: value for key, value in row.items() if key != "scratch"}))


if __name__ == "__main__":
    main()
