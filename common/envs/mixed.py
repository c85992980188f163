"""Demonstrations of mixed quality: a third is jittered, paused or detoured; all are successful.

The dataset's column `quality` is an index into QUALITIES. It is there for tests and benchmarks;
training does not read it.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.random import Generator

from common.envs import avoid, tabletop
from common.envs.demonstrations import shuffled, write

QUALITIES = ("expert", "jittered", "paused", "detoured")
SHARES = (0, 0, 0, 0, 0, 0, 1, 2, 3)  # qualities of every nine demonstrations, in random order
FEATURE = {"quality": {"dtype": "int64", "shape": [1], "names": None}}


def disturb(
    targets: np.ndarray, quality: int, rng: Generator, reach: float
) -> tuple[np.ndarray, np.ndarray]:
    """An expert's position targets (n, points, 2) made worse.

    Returns (m >= n, points, 2), and the step (m,) of the expert that each belongs to.
    jittered: normal noise of reach / 8 on each target. paused: two stops of 5 to 9 steps. detoured:
    0.7 to 1 reach away in a random direction and back, in 10 to 14 steps. reach in metres.
    """
    kind = QUALITIES[quality]
    n = len(targets)
    first = n // 8  # disturbances begin neither in the first nor in the last eighth
    last = 7 * n // 8
    repeats = np.ones(n, int)
    offset = 0.0
    if kind == "jittered":
        offset = rng.normal(0, reach / 8, targets.shape)
    elif kind == "paused":
        stops = rng.choice(np.arange(first, last), 2, replace=False)
        repeats[stops] += rng.integers(5, 10, 2)
    elif kind == "detoured":
        start = rng.integers(first, last)
        steps = rng.integers(10, 15)
        angle = rng.uniform(0, 2 * np.pi)
        repeats[start] += steps
        away = np.zeros(n + steps)
        away[start : start + steps + 1] = np.sin(np.linspace(0, np.pi, steps + 1))
        away *= reach * rng.uniform(0.7, 1)
        offset = away[:, None, None] * [np.cos(angle), np.sin(angle)]
    step = np.repeat(np.arange(n), repeats)
    return targets[step] + offset, step


def with_quality(episode: dict, quality: int) -> dict:
    """The episode's columns and the column `quality`."""
    return episode | {"quality": np.full((len(episode["action"]), 1), quality)}


def disturbed_paths() -> Iterator[dict]:
    """Episodes of avoid's demonstrations; a disturbance is drawn again until it is feasible."""
    rng = np.random.default_rng([0, 1])
    _, _, paths = avoid.demonstrations(avoid.Avoid.COUNTS)
    qualities = rng.permutation(np.resize(SHARES, len(paths)))
    for path, quality in zip(paths, qualities, strict=True):
        performed = path
        done = quality == 0
        while not done:
            moved, _ = disturb(path[1:, None], quality, rng, reach=0.2)
            performed = np.concatenate([path[:1], moved[:, 0].astype(np.float32)])
            done = avoid.feasible(performed[None])[0]
        yield with_quality(avoid.columns(performed), quality)


def generate_avoid(root: Path) -> None:
    """Write avoid's 960 demonstrations, of 25 to 43 steps, to `root`."""
    write(root, avoid.Avoid, avoid.FEATURES | FEATURE, disturbed_paths())


def demonstrate(seed: int, env_type: type[tabletop.Tabletop], image_size: tuple) -> dict | None:
    """tabletop.demonstrate(); for a third of the seeds with disturbed actions that succeed too."""
    quality = SHARES[shuffled(seed, len(SHARES))]
    run = partial(tabletop.demonstrate, seed, env_type, image_size)
    episode = run(render=quality == 0)
    if episode and quality:
        rng = np.random.default_rng([seed, 3])
        targets = episode["action"].reshape(-1, 2, 3)
        episode = None
        while not episode:
            moved, step = disturb(targets[..., :2], quality, rng, reach=0.16)
            grips = targets[step, :, 2:]
            actions = np.concatenate([moved, grips], -1).reshape(-1, 6).astype(np.float32)
            episode = run(actions, render=False) and run(actions)
    return episode and with_quality(episode, quality)


generate_tabletop = partial(
    tabletop.generate,
    demonstrate=demonstrate,
    extra_features=FEATURE,
)
