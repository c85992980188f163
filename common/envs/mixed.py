"""Demonstrations of mixed quality: a third of them jittered, paused or detoured, and all of them successful.

The column `quality` of the dataset says which, an index into QUALITIES, for tests and benchmarks; nothing that trains
reads it.
"""

import numpy as np

from common.envs import avoid, tabletop

QUALITIES = ("expert", "jittered", "paused", "detoured")
KINDS = (0, 0, 0, 0, 0, 0, 1, 2, 3)  # of every nine demonstrations, in random order
FEATURE = {"quality": {"dtype": "int64", "shape": [1], "names": None}}


def disturb(targets, quality, rng, reach):
    """Position targets (n, points, 2) of an expert, done less well: (m >= n, points, 2), and the step each is of (m,).

    jittered: each target off by a deviation of reach / 8; paused: standing still, twice, for 5 to 9 steps; detoured:
    out by 0.7 to 1 reach in any direction and back, in 10 to 14 steps. reach in metres.
    """
    n, offset = len(targets), 0.0
    repeats = np.ones(n, int)
    if quality == 1:
        offset = rng.normal(0, reach / 8, targets.shape)
    elif quality == 2:
        repeats[rng.choice(np.arange(n // 8, 7 * n // 8), 2, replace=False)] += rng.integers(
            5, 10, 2
        )
    elif quality == 3:
        at, steps, angle = (
            rng.integers(n // 8, 7 * n // 8),
            rng.integers(10, 15),
            rng.uniform(0, 2 * np.pi),
        )
        repeats[at] += steps
        way = np.zeros(n + steps)
        way[at : at + steps + 1] = np.sin(np.linspace(0, np.pi, steps + 1))
        offset = reach * rng.uniform(0.7, 1) * way[:, None, None] * [np.cos(angle), np.sin(angle)]
    step = np.repeat(np.arange(n), repeats)
    return targets[step] + offset, step


def generate_avoid(root, seed=0):
    """Write avoid's 960 demonstrations to `root`, of 25 to 43 steps; none enters a disc or leaps."""
    from common.data.writer import (
        DatasetWriter,
    )  # here: acting in the environment needs neither pyarrow nor av

    rng, paths = np.random.default_rng([seed, 1]), avoid.demonstrations(avoid.Avoid.COUNTS, seed)[2]
    features = {
        "observation.state": {"dtype": "float32", "shape": [4], "names": ["x", "y", "vx", "vy"]}
    }
    features |= {"action": {"dtype": "float32", "shape": [2], "names": ["x", "y"]}} | FEATURE
    writer = DatasetWriter(root, avoid.FPS, features, "avoid")
    for path, quality in zip(paths, rng.permutation(np.resize(KINDS, len(paths))), strict=True):
        poor, bad = path, quality > 0
        while bad:
            moved, _ = disturb(path[1:, None], quality, rng, reach=0.2)
            poor = np.concatenate([path[:1], moved[:, 0].astype(np.float32)])
            leaps = np.hypot(*np.diff(poor, axis=0).T).max() > avoid.STEP_LIMIT
            bad = leaps or poor[-1, 1] < avoid.FINISH or avoid.collides(poor[None])[0]
        columns = {"observation.state": avoid.states(poor[None])[0, :-1], "action": poor[1:]}
        writer.add_episode(
            columns | {"quality": np.full((len(poor) - 1, 1), quality)}, task=avoid.TASK
        )
    writer.finish()


def demonstrate(seed, world, image_size):
    """tabletop.demonstrate(), for a third of the seeds with actions that are disturbed and succeed all the same."""
    quality = KINDS[
        np.random.default_rng([seed // len(KINDS), 2]).permutation(len(KINDS))[seed % len(KINDS)]
    ]
    good = tabletop.demonstrate(seed, world, image_size, look=not quality)
    if good is None:
        return None
    rng, rows = np.random.default_rng([seed, 3]), None if quality else good
    targets = good["action"].reshape(-1, 2, 3)
    while rows is None:
        moved, step = disturb(targets[..., :2], quality, rng, reach=0.16)
        actions = (
            np.concatenate([moved, targets[step, :, 2:]], -1).reshape(-1, 6).astype(np.float32)
        )
        if tabletop.demonstrate(seed, world, image_size, actions, look=False):
            rows = tabletop.demonstrate(seed, world, image_size, actions)
    return rows | {"quality": np.full((len(rows["action"]), 1), quality)}


def generate_tabletop(root, episodes=300, seed=0, image_size=(96, 96)):
    """Write tabletop's demonstrations to `root`; see tabletop.generate."""
    tabletop.generate(root, episodes, seed, image_size, demonstrate=demonstrate, more=FEATURE)
