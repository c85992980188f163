"""Which recorded episodes a checkpoint is evaluated on, and whether they are of its kind of data.

The checkpoint says which episodes were held out, whatever has become of the dataset since.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import schema
from common.config import DataError, UserError, show
from common.data.columns import joint_names
from common.data.frames import VideoFrames
from common.data.generated import locate
from common.data.lerobot import LeRobotDataset, check_files
from common.data.normalizer import Normalizer, differences
from common.data.windows import Windows

MOMENTS = {"mean": np.mean, "std": np.std, "min": np.min, "max": np.max}


class Recordings:
    """Recorded episodes of a dataset, to compare a policy with.

    data: the `data` section of the checkpoint; meta: its meta.json; stats: of its training data;
    root: a dataset in place of the one trained on; new_episodes: evaluate episodes, too, that the
    run has never seen; other_units: do not compare the statistics.

    dataset, windows; episodes: those to evaluate; new: those of them that the run has never seen;
    names: of the numbers of an action. Raises UserError if the dataset is of another kind than the
    training data, or if there is nothing to evaluate.
    """

    def __init__(
        self,
        data: schema.Data,
        meta: dict[str, Any],
        stats: Normalizer,
        root: str | None = None,
        new_episodes: bool = False,
        other_units: bool = False,
    ):
        self.data = data
        self.stats = stats.state_dict()
        self.trained_on: list[int] = meta["episodes"]["trained on"]
        self.held_out: list[int] = meta["episodes"]["held out"]
        if not self.held_out and not new_episodes:
            raise UserError(
                "this run held no episodes out (data.val_episodes): nothing to compare with; give "
                "--env, or --new_episodes if there are recordings that the run has never seen"
            )
        self.dataset = LeRobotDataset(locate(root or data.root))
        self.title = f"--data: {self.dataset.root}" if root else str(self.dataset.root)
        self._require_keys()
        if root and self.dataset.fps != data.HZ:
            rates = f"{self.dataset.fps:g} fps, resampled to the policy's {data.HZ:g} Hz"
            print(f"notice: {self.title} has {rates}")
        self.present = [episode.index for episode in self.dataset.episodes]
        known = {*self.trained_on, *self.held_out}
        self.unseen = [number for number in self.present if number not in known]
        read = [number for number in self.present if new_episodes or number in known]
        if not read:
            raise UserError(
                f"{self.title} has none of the episodes of training; --new_episodes evaluates its "
                f"episodes {show(self.unseen)}"
            )
        frames = VideoFrames(self.dataset, data.cameras, data.image_size, read)
        self.windows = Windows(data, self.dataset, read, frames)
        self._require_sizes(meta.get("columns", {}))
        key = meta.get("dataset", {}).get("content_key")  # older checkpoints have none
        same = key == self.dataset.content_key or self._same()
        if same:
            self._tell_changes(key not in (None, self.dataset.content_key), new_episodes)
            self.new = self.unseen if new_episodes else []
            chosen = {*self.held_out, *self.new}
            self.episodes = [number for number in self.present if number in chosen]
        else:
            if not other_units:
                self._require_units()
            if not new_episodes:
                raise UserError(
                    f"{self.title} does not have the episodes that the policy was trained on, or "
                    "has them under other numbers, as after deleting some: held-out numbers may "
                    f"mean others. --new_episodes evaluates all {len(self.present)}, as if none "
                    "had been trained on"
                )
            print(f"notice: {self.title} has other episodes than in training: all are new")
            self.new = self.present
            self.episodes = self.present
        if not self.episodes:
            raise UserError(
                f"{self.title}: no episode to evaluate: held out were {show(self.held_out)}; in "
                f"the dataset are {show(self.present)}"
            )
        action = data.action_key
        self.names = joint_names(self.dataset.features, action, self.windows.sizes[action])
        cameras = list(data.cameras.values())
        columns = [*data.state_keys, action]
        for warning in check_files(self.dataset, cameras, columns, self.episodes):
            print(f"warning: {warning}")

    def _require_keys(self) -> None:
        columns = [*self.data.state_keys, self.data.action_key]
        cameras = list(self.data.cameras.values())
        try:
            self.dataset.require_columns(columns)
            self.dataset.require_cameras(cameras)
        except DataError as e:
            raise UserError(
                f"{self.title} is of another kind than the training data: {e}\n"
                f"    the policy was trained on the columns {columns} and the cameras {cameras}"
            ) from e

    def _require_sizes(self, trained: dict[str, int]) -> None:
        """trained: numbers in a row of each column; empty in older checkpoints."""
        sizes = self.windows.sizes
        other = [
            f"{key} has {size} numbers, in training {trained[key]}"
            for key, size in sizes.items()
            if trained.get(key, size) != size
        ]
        for name, values in (("state", self.windows.state), ("action", self.windows.action)):
            size = values.shape[1]
            expected = len(self.stats[f"{name}_mean"])
            if size != expected and not other:
                other.append(f"the {name} has {size} numbers, in training {expected}")
        if other:
            problem = "; ".join(other)
            raise UserError(f"{self.title} is of another kind than the training data: {problem}")

    def _require_units(self) -> None:
        kinds = {"state": self.data.state_keys, "action": [self.data.action_key]}
        names = {}
        for kind, keys in kinds.items():
            columns = [joint_names(self.dataset.features, k, self.windows.sizes[k]) for k in keys]
            names[kind] = [name for column in columns for name in column]
        found = moments(self.windows, np.arange(len(self.windows)))
        lines = differences(self.stats, found, names)
        if lines:
            title = f"{self.title} is of another kind than the training data:"
            advice = "--other_units evaluates it anyway"
            raise UserError("\n    ".join([title, *lines, advice]))

    def _same(self) -> bool:
        """Whether numbers mean the episodes that they meant in training.

        By the statistics of the episodes trained on. Where some of them are gone, the others could
        have been numbered anew, unless there are gaps in the numbers.
        """
        there = np.intersect1d(self.trained_on, self.windows.episode_index)
        complete = len(there) == len(self.trained_on)
        if not complete and self.present == list(range(len(self.present))):
            return False
        if not len(there):
            return True
        found = moments(self.windows, self.windows.rows(there))
        for name in ("state", "action"):
            was = {key: self.stats[f"{name}_{key}"].cpu() for key in MOMENTS}
            now = {key: found[f"{name}_{key}"] for key in MOMENTS}
            rounding = 1e-5 * was["std"] + 1e-6 * was["mean"].abs() + 1e-9
            if (now["min"] < was["min"] - rounding).any():
                return False
            if (now["max"] > was["max"] + rounding).any():
                return False
            if complete and any(((now[k] - was[k]).abs() > rounding).any() for k in MOMENTS):
                return False
        return True

    def _tell_changes(self, changed: bool, new_episodes: bool) -> None:
        if changed:
            print(f"notice: {self.title} changed since training; episodes kept their numbers")
        gone = sorted(set(self.held_out) - set(self.present))
        if gone:
            print(f"notice: held-out episodes {show(gone)} are gone from {self.title}: left out")
        if self.unseen and new_episodes:
            print(f"notice: new episodes are evaluated, too: {show(self.unseen)}")
        elif self.unseen:
            print(
                f"notice: {self.title} has episodes that the run has never seen: "
                f"{show(self.unseen)}; --new_episodes evaluates them, too"
            )


def moments(windows: Windows, rows: np.ndarray) -> dict[str, Tensor]:
    """state_mean, ..., action_max: (dim,) of some rows, as the checkpoint's statistics are."""
    found = {}
    for name, values in (("state", windows.state), ("action", windows.action)):
        x = values[rows].astype(np.float64)
        for key, function in MOMENTS.items():
            found[f"{name}_{key}"] = torch.from_numpy(function(x, axis=0)).float()
    return found
