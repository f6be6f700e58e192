"""Compare all analyses with their frozen results, or store these: see `python -m tests.frozen --help`."""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor

from .comparison import compare, store
from .margins import ECHO
from .runs import RUNS, results


def started(environment: Mapping[str, str]) -> ProcessPoolExecutor:
    """A process of its own with these environment variables."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return pool


def main() -> int:
    """Return 0 if nothing that is stored is missing or differs, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.frozen", description=__doc__)
    parser.add_argument("analyses", nargs="*", help="names of analyses; none means all")
    parser.add_argument("--store", action="store_true", help="measure twice and store")
    parser.add_argument("--threads", default="1", help="threads that measure, when comparing")
    options = parser.parse_args()
    if unknown := set(options.analyses) - set(RUNS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(RUNS)}")
    clean = True
    threads = {"OMP_NUM_THREADS": "1" if options.store else options.threads}
    with started(threads) as plain, started(threads | ECHO) as echo:
        for name in options.analyses or RUNS:
            first = plain.submit(results, name)
            second = echo.submit(results, name) if options.store else None
            found = first.result()
            if second is not None:
                store(name, found, second.result())
            comparison = compare(name, found)
            clean &= comparison.clean
            print(f"{comparison}\n  {found.seconds:.0f} s of processor time", flush=True)
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
