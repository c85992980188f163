"""Rank demonstrations of mixed quality, train policies on the best two thirds, print tables.

    python benchmarks/curation.py avoid tabletop --seeds 0 1 2

Three rankings: by mutual information (train_mi.py); by the loss of plain flow matching on episodes
that it was not trained on; by chance. avoid-mixed and tabletop-mixed record the quality of each
demonstration, which tells how well a ranking finds the poor ones. The same command again continues
where it stopped, as evidence.py does.
"""

import shutil
import sys
from functools import partial
from pathlib import Path

import evidence
import numpy as np
import pyarrow.parquet as pq
import torch
from evidence import Row, Table
from report import show, spread
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import information, metrics, run
from common.checkpoint import open_policy
from common.data import scores
from common.data.generated import locate
from common.data.lerobot import LeRobotDataset
from common.data.loader import Data
from common.envs import registry  # noqa: F401 (for locate)
from common.envs.mixed import QUALITIES

NAIVE = "train_flow_matching.py"
POLICIES = {  # environment -> (label, script, config); the first one's losses rank
    "avoid": [
        ("naive", NAIVE, "configs/naive_flow_matching_policy/avoid/train_closed.yaml"),
        (
            "plain codes",
            "train_cfg_vqvae.py",
            "configs/cfg_vqvae_flow_matching/avoid/train_closed.yaml",
        ),
    ],
    "tabletop": [
        ("naive", NAIVE, "configs/naive_flow_matching_policy/tabletop/train.yaml"),
        ("vfp", "train_vfp.py", "configs/vfp_single_expert/tabletop/train.yaml"),
    ],
}
STEPS = {"avoid": (), "tabletop": ("train.total_steps=2000",)}
EVALUATE = {
    "avoid": {"env": "avoid", "replan_steps": 8, "episodes": 960, "batch": 960, "hold": 2},
    "tabletop": {"env": "tabletop", "replan_steps": 8, "episodes": 200, "batch": 200},
}
KEPT = {"mi": "by mutual information", "loss": "by validation loss", "random": "by chance"}
SHARE = 2 / 3


def rows(env, out):
    """Lines of the table: each policy on everything, and on what each ranking keeps."""
    selections = {"all demonstrations": []}
    for kind, label in KEPT.items():
        selections[f"the best 2/3 {label}"] = [
            f"data.scores={out}/rankings/{env}/seed_{{seed}}/{kind}.parquet",
            f"data.keep_top={SHARE:.4f}",
        ]
    for name, script, config in POLICIES[env]:
        for label, selection in selections.items():
            yield Row(
                label=f"{name}, {label}",
                script=script,
                config=config,
                overrides=[f"data.root={env}-mixed", *STEPS[env], *selection],
                evaluate=EVALUATE[env],
            )


def ranked(env, seed, out):
    """Write mi.parquet, loss.parquet and random.parquet of a generated set, if they are missing."""
    folder = out / f"rankings/{env}/seed_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "mi.parquet").exists():
        config = f"configs/mutual_information_estimator/{env}/train.yaml"
        settings = [f"seed={seed}", f"train.save_dir={folder}/mi"]
        evidence.call(["train_mi.py", "--config", config, *settings], folder / "mi.log")
        shutil.copy(folder / "mi/scores.parquet", folder / "mi.parquet")
    dataset = LeRobotDataset(locate(f"{env}-mixed"))
    numbers = np.array([episode.index for episode in dataset.episodes])
    if not (folder / "random.parquet").exists():
        chance = information.rank(np.random.default_rng(seed).random(len(numbers)), numbers)
        scores.save_scores(chance, folder / "random.parquet", dataset)
    if not (folder / "loss.parquet").exists():
        losses = [half_losses(env, seed, numbers, half, folder) for half in (0, 1)]
        order = np.concatenate([numbers[1::2], numbers[0::2]])
        by_loss = information.rank(-np.concatenate(losses), order)
        scores.save_scores(by_loss, folder / "loss.parquet", dataset)


def half_losses(env, seed, numbers, half, folder):
    """Train on every other episode; standardised flow-matching losses of the episodes left out."""
    save_dir = folder / f"loss_{half}"
    settings = [
        f"data.root={env}-mixed",
        f"data.episodes={numbers[half::2].tolist()}",
        "data.val_episodes=0.0",
        *STEPS[env],
        f"seed={seed}",
        f"train.save_dir={save_dir}",
    ]
    _, script, config = POLICIES[env][0]
    evidence.call([script, "--config", config, *settings], folder / "loss.log")
    policy, cfg = open_policy(save_dir)
    cfg.data.episodes = numbers[1 - half :: 2].tolist()
    data = Data(cfg.data)
    data.cache_frames()
    losses = []
    for number in tqdm(cfg.data.episodes, desc="losses", unit="episode"):
        rows = data.windows.rows([number])
        some = np.linspace(0, len(rows) - 1, min(len(rows), 32)).astype(int)
        loss = metrics.velocity_loss(policy, data.windows, rows[some], seed)
        losses.append(np.mean(loss["none"]))
    return (losses - np.mean(losses)) / np.std(losses)


def report(env, seeds, out):
    """Print how often a good episode scores higher than a poor one, for all and by kind of poor
    ones, and the share of good episodes among the best."""
    dataset = LeRobotDataset(locate(f"{env}-mixed"))
    recorded = {
        episode.index: int(columns["quality"][0, 0])
        for episode, columns in dataset.read(["quality"], dataset.episodes)
    }
    over = f"mean over {len(seeds)} seeds (lowest-highest)"
    print(f"\n{env}: AUC of good against poor demonstrations, {over}\n")
    kinds = " | ".join(QUALITIES[1:])
    print(f"| ranking | all poor ones | {kinds} | good ones among the best 2/3 |")
    print("|---" * (2 + len(QUALITIES)) + "|")
    for kind, label in KEPT.items():
        cells = []
        for seed in seeds:
            table = pq.read_table(out / f"rankings/{env}/seed_{seed}/{kind}.parquet")
            score = table["score"].to_numpy()
            quality = np.array([recorded[number] for number in table["episode"].to_pylist()])
            poor = [quality > 0, *(quality == i for i in range(1, len(QUALITIES)))]
            found = [metrics.auc(score[quality == 0], score[some]) for some in poor]
            best = quality[: round(SHARE * len(quality))]  # the table has the best first
            cells.append([*found, (best == 0).mean()])
        print(f"| {label} | {' | '.join(map(spread, zip(*cells, strict=True)))} |")


def main(argv=None):
    args = evidence.arguments(argv, POLICIES, __doc__)
    torch.set_num_threads(1)  # a ranking has one core
    pairs = [(env, seed) for env in args.tables for seed in args.seeds]
    evidence.on_cores([partial(ranked, *pair, args.out) for pair in pairs], args.jobs, "rankings")
    tables = {env: Table(rows=list(rows(env, args.out))) for env in args.tables}
    for env in tables:
        report(env, args.seeds, args.out)
    done = evidence.measure([row for table in tables.values() for row in table.rows], args)
    missing = [show(f"{env}_curation", table, done, args) for env, table in tables.items()]
    return max(missing)


if __name__ == "__main__":
    run.cli(main)
