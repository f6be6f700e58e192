"""Run cases until they are done: `python -m tests.adversary --cases N --seed S`, or one of them: `--case SEED`."""

import argparse
import logging
import sys
import time
import warnings
from collections import Counter

import torch

from adversary.cases import Result, run_case

BAD = ("wrong", "raw")


def shown(seed: int, result: Result) -> str:
    return f"{result.verdict}: python -m tests.adversary --case {seed}\n    {result.description}\n    {result.why}"


def summary(counts: Counter[tuple[str, str]]) -> str:
    verdicts = ("right", "refused", "wrong", "raw", "void")
    lines = [f"{'':10}" + "".join(f"{v:>9}" for v in verdicts)]
    for kind in [*sorted({kind for kind, _ in counts}), "all"]:
        numbers = [sum(n for (k, w), n in counts.items() if w == v and kind in (k, "all")) for v in verdicts]
        lines.append(f"{kind:10}" + "".join(f"{n:9}" for n in numbers))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.adversary", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="the first seed; go on with seed + cases")
    parser.add_argument("--case", type=int, help="run this seed alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("curvlab").setLevel(logging.CRITICAL)
    if options.case is not None:
        result = run_case(options.case)
        print(shown(options.case, result))
        return int(result.verdict in BAD)
    counts: Counter[tuple[str, str]] = Counter()
    start = time.monotonic()
    for done, seed in enumerate(range(options.seed, options.seed + options.cases), 1):
        result = run_case(seed)
        counts[result.kind, result.verdict] += 1
        if result.verdict in BAD:
            print(shown(seed, result), flush=True)
        if done % 500 == 0:
            rate = done / (time.monotonic() - start)
            print(
                f"{done} of {options.cases} cases, {rate:.0f} a second, next seed {seed + 1}",
                file=sys.stderr,
                flush=True,
            )
    print(summary(counts))
    return int(any(verdict in BAD for _, verdict in counts))


if __name__ == "__main__":
    sys.exit(main())
