"""The mutual information estimator: time and memory of what follows the encoders, on random latents.

python benchmarks/mi.py [--transitions 100000] [--threads 2]
"""

import argparse
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.information import contributions, rank


def speed(transitions, threads):
    torch.set_num_threads(threads)
    s, a = torch.randn(transitions, 16), torch.randn(transitions, 12)
    step, scoring = (
        np.arange(transitions),
        SimpleNamespace(k=[5, 6, 7], batch=1024, shuffles=4, window=1.0),
    )
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    rank(contributions(s, a, step // 100, step % 100 / 20, scoring, seed=0)[0], step // 100)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    grown = (after.ru_maxrss - before.ru_maxrss) / 1024
    print(
        "| transitions | threads | wall s | CPU s | memory beyond the latents, MiB |\n|---|---|---|---|---|"
    )
    print(
        f"| {transitions:,} | {threads} | {wall:.1f} | {after.ru_utime - before.ru_utime:.1f} | {grown:.0f} |"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--transitions", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    speed(options.transitions, options.threads)


if __name__ == "__main__":
    main()
