"""The mutual information estimator: time and memory of scoring, and how well it tells good demonstrations from poor.

    python benchmarks/mi.py [--transitions 100000] [--threads 2]
    python benchmarks/mi.py --runs ~/runs/mi_avoid ~/runs/mi_tabletop

The first command times what follows the encoders, on random latents; the second compares the scores of runs on
avoid-mixed and tabletop-mixed with the qualities that these sets record.
"""

import argparse
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.data.lerobot import LeRobotDataset
from common.data.loader import locate
from common.envs.mixed import QUALITIES
from common.information import contributions, rank
from common.metrics import auc


def speed(transitions, threads):
    torch.set_num_threads(threads)
    s, a = torch.randn(transitions, 16), torch.randn(transitions, 12)
    step, scoring = np.arange(transitions), SimpleNamespace(k=[5, 6, 7], batch=1024, shuffles=4, window=1.0)
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    rank(contributions(s, a, step // 100, step % 100 / 20, scoring, seed=0)[0], step // 100)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    grown = (after.ru_maxrss - before.ru_maxrss) / 1024
    print("| transitions | threads | wall s | CPU s | memory beyond the latents, MiB |\n|---|---|---|---|---|")
    print(f"| {transitions:,} | {threads} | {wall:.1f} | {after.ru_utime - before.ru_utime:.1f} | {grown:.0f} |")


def compare(runs):
    print(
        "| run | episodes | AUC |", *(f"against {name} |" for name in QUALITIES[1:]), "good among as many as are good |"
    )
    print("|---|---|---|---|---|---|---|")
    for run in runs:
        dataset = LeRobotDataset(locate(yaml.safe_load((run / "config.yaml").read_text())["data"]["root"]))
        table = pq.read_table(run / "scores.parquet")
        made = {
            episode.index: int(column["quality"][0, 0])
            for episode, column in dataset.read(["quality"], dataset.episodes)
        }
        score, quality = table["score"].to_numpy(), np.array([made[number] for number in table["episode"].to_pylist()])
        good = score[quality == 0]
        found = [
            auc(good, score[some]) for some in (quality > 0, *(quality == kind for kind in range(1, len(QUALITIES))))
        ]
        share = (quality[: len(good)] == 0).mean()  # the table has the best first
        print(f"| {run.name} | {len(score)} |", *(f"{value:.3f} |" for value in found), f"{share:.3f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transitions", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=Path, nargs="+", default=[], help="run folders of train_mi.py")
    options = parser.parse_args()
    compare(options.runs) if options.runs else speed(options.transitions, options.threads)


if __name__ == "__main__":
    main()
