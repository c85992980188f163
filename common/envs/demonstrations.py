"""Shared by the environments' generators of demonstrations."""

from collections.abc import Iterable
from pathlib import Path

import gymnasium
import numpy as np

Observation = dict[str, np.ndarray]


def vector(names: Iterable[str]) -> dict:
    """info.json's entry of a float32 column, one number per name."""
    names = list(names)
    return {"dtype": "float32", "shape": [len(names)], "names": names}


def shuffled(seed: int, count: int) -> int:
    """A number below `count`; every `count` seeds in a row have each once, in random order."""
    block, place = divmod(seed, count)
    return np.random.default_rng([block, 2]).permutation(count)[place]


def write(
    root: Path,
    env_type: type[gymnasium.Env],
    features: dict,
    episodes: Iterable[dict[str, np.ndarray]],
) -> None:
    """Write `episodes` of an environment with name, task and fps as a LeRobot v3.0 dataset."""
    from common.data.writer import DatasetWriter  # here: the environment needs no pyarrow, no av

    with DatasetWriter(root, env_type.fps, features, env_type.name) as writer:
        for episode in episodes:
            writer.add_episode(episode, env_type.task)
        writer.finish()
