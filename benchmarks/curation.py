"""Rank demonstrations of mixed quality, train policies on the best two thirds, and print what the README's tables hold.

    python benchmarks/curation.py avoid tabletop --seeds 0 1 2

Rankings: by mutual information (train_mi.py); by the loss of plain flow matching, trained on every other episode, on
those that it has not seen; by chance. How well they find the poor demonstrations is told from the qualities that
avoid-mixed and tabletop-mixed record. Typed again it goes on where it stopped, as evidence.py does.
"""

import shutil
import sys
from functools import partial

import evidence
import numpy as np
import pyarrow.parquet as pq
from evidence import CLOSED, NAIVE, ROOT, SCRIPTS, TABLETOP, VFP, Row
from tqdm import tqdm

sys.path.insert(0, str(ROOT))
from common import information, metrics
from common.checkpoint import open_policy
from common.data import scores
from common.data.generated import locate
from common.data.lerobot import LeRobotDataset
from common.data.loader import Data
from common.envs import registry  # noqa: F401 (for locate)
from common.envs.mixed import QUALITIES

CONFIG = {"avoid": "avoid/train_closed.yaml", "tabletop": "tabletop/train.yaml"}
STEPS = {"avoid": (), "tabletop": ("train.total_steps=2000",)}
EVALUATE = {"avoid": CLOSED["2"], "tabletop": TABLETOP}
KEPT = {"mi": "by mutual information", "loss": "by validation loss", "random": "by chance"}
SHARE = 2 / 3


def rows(env, out):
    """Lines of the table: each policy on everything, and on what each ranking keeps."""
    for name, policy in (("naive", NAIVE), ("vfp", VFP)):
        settings = (f"data.root={env}-mixed", *STEPS[env])
        yield Row(f"{name}, all demonstrations", policy, CONFIG[env], settings, EVALUATE[env])
        for kind, label in KEPT.items():
            kept = (
                f"data.scores={out}/rankings/{env}/seed_{{seed}}/{kind}.parquet",
                f"data.keep_top={SHARE:.4f}",
            )
            yield Row(
                f"{name}, the best 2/3 {label}",
                policy,
                CONFIG[env],
                (*settings, *kept),
                EVALUATE[env],
            )


def ranked(env, seed, out, core):
    """Write mi.parquet, loss.parquet and random.parquet of a generated set, unless they are there."""
    folder = out / f"rankings/{env}/seed_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "mi.parquet").exists():
        settings = [
            "--config",
            f"configs/mutual_information_estimator/{env}/train.yaml",
            f"seed={seed}",
        ]
        evidence.call(
            ["train_mi.py", *settings, f"train.save_dir={folder}/mi"], folder / "mi.log", core
        )
        shutil.copy(folder / "mi/scores.parquet", folder / "mi.parquet")
    dataset = LeRobotDataset(locate(f"{env}-mixed"))
    numbers = np.array([episode.index for episode in dataset.episodes])
    if not (folder / "random.parquet").exists():
        chance = information.rank(np.random.default_rng(seed).random(len(numbers)), numbers)
        scores.save_scores(chance, folder / "random.parquet", dataset)
    if not (folder / "loss.parquet").exists():
        losses = np.concatenate(
            [half_losses(env, seed, numbers, half, folder, core) for half in (0, 1)]
        )
        order = np.concatenate([numbers[1::2], numbers[0::2]])
        scores.save_scores(information.rank(-losses, order), folder / "loss.parquet", dataset)


def half_losses(env, seed, numbers, half, folder, core):
    """Train on every other episode; the flow-matching loss of each of those that were left out, standardised."""
    run = folder / f"loss_{half}"
    settings = [
        f"data.root={env}-mixed",
        f"data.episodes={numbers[half::2].tolist()}",
        "data.val_episodes=0.0",
    ]
    settings += [*STEPS[env], f"seed={seed}", f"train.save_dir={run}"]
    config = f"configs/{NAIVE}/{CONFIG[env]}"
    evidence.call([SCRIPTS[NAIVE], "--config", config, *settings], folder / "loss.log", core)
    policy, cfg = open_policy(run)
    cfg.data.episodes = numbers[1 - half :: 2].tolist()
    data, losses = Data(cfg.data), []
    data.cache_frames()
    for number in tqdm(cfg.data.episodes, desc="losses", unit="episode"):
        some = data.windows.rows([number])
        data.val_rows = some[np.linspace(0, len(some) - 1, min(len(some), 32)).astype(int)]
        losses.append(np.mean(metrics.velocity_loss(policy, data, seed)["none"]))
    return (losses - np.mean(losses)) / np.std(losses)


def report(env, seeds, out):
    """How often a good one scores higher than a poor one, of all and by kind; the share of good ones among the best."""
    dataset = LeRobotDataset(locate(f"{env}-mixed"))
    made = {
        e.index: int(columns["quality"][0, 0])
        for e, columns in dataset.read(["quality"], dataset.episodes)
    }
    print(
        f"\n{env}: AUC of good against poor demonstrations, mean over {len(seeds)} seeds (lowest-highest)\n"
    )
    print(
        f"| ranking | all poor ones | {' | '.join(QUALITIES[1:])} | good ones among the best 2/3 |"
    )
    print("|---" * (2 + len(QUALITIES)) + "|")
    for kind, label in KEPT.items():
        cells = []
        for seed in seeds:
            table = pq.read_table(out / f"rankings/{env}/seed_{seed}/{kind}.parquet")
            score, quality = (
                table["score"].to_numpy(),
                np.array([made[e] for e in table["episode"].to_pylist()]),
            )
            poor = [quality > 0, *(quality == i for i in range(1, len(QUALITIES)))]
            found = [metrics.auc(score[quality == 0], score[some]) for some in poor]
            cells.append(
                [*found, (quality[: round(SHARE * len(quality))] == 0).mean()]
            )  # the table has the best first
        print(f"| {label} | {' | '.join(map(evidence.spread, zip(*cells, strict=True)))} |")


def main(argv=None):
    args = evidence.arguments(argv, CONFIG, __doc__)
    envs, args.out = args.tables, args.out.expanduser().resolve()
    pairs = [(env, seed) for env in envs for seed in args.seeds]
    evidence.on_cores([partial(ranked, *pair, args.out) for pair in pairs], args.jobs, "rankings")
    tables = {env: list(rows(env, args.out)) for env in envs}
    for env in envs:
        report(env, args.seeds, args.out)
    done = evidence.measure([row for table in tables.values() for row in table], args)
    for env in envs:
        evidence.show(f"{env}_curation", tables[env], ("success", "entropy"), done, args)
    return int(len(done) < sum(map(len, tables.values())) * len(args.seeds))


if __name__ == "__main__":
    sys.exit(main())
