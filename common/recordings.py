"""Which recorded episodes a checkpoint is evaluated on, and whether they are of its kind of data.

The checkpoint says which episodes were held out, whatever has become of the dataset since.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import schema
from common.config import DataError, UserError, show
from common.data.checks import check_files
from common.data.frames import VideoFrames
from common.data.generated import locate
from common.data.lerobot import LeRobotDataset
from common.data.normalizer import Normalizer, differences
from common.data.windows import Windows


class Recordings:
    """Recorded episodes of a dataset, to compare a policy with.

    data: the `data` section of the checkpoint; meta: its meta.json; stats: of its training data;
    root: a dataset in place of the one trained on; new_episodes: evaluate episodes, too, that the
    run neither trained on nor held out; other_units: do not compare the statistics.

    windows: of the episodes that were read; episodes: numbers of those to evaluate; new: of those
    that are new to the run. Raises UserError if the dataset is of another kind than the training
    data, or if there is nothing to evaluate.
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
        recorded = meta["episodes"]
        if not recorded["held out"] and not new_episodes:
            raise UserError(
                "this run held no episodes out (data.val_episodes): nothing to compare with; give "
                "--env, or --new_episodes if there are recordings that the run has never seen"
            )
        self.dataset = dataset = LeRobotDataset(locate(root or data.root))
        self.title = f"--data: {dataset.root}" if root else str(dataset.root)
        self._require_keys()
        if root and dataset.fps != data.HZ:
            rates = f"{dataset.fps:g} fps, resampled to the policy's {data.HZ:g} Hz"
            print(f"notice: {self.title} has {rates}")
        present = [episode.index for episode in dataset.episodes]
        hashes = meta.get("episode_hashes")
        known = {*recorded["trained on"], *recorded["held out"]}
        # By its content an episode is found under any number.
        read = [number for number in present if new_episodes or hashes or number in known]
        if not read:
            raise self._nothing_to_evaluate(present)
        frames = VideoFrames(dataset, data.cameras, data.image_size, read)
        self.windows = Windows(data, dataset, read, frames)
        self._require_sizes(meta.get("columns", {}))
        kinds = self._kinds(recorded, hashes)
        other = hashes is None or (new_episodes and "new" in kinds.values())
        if other and not other_units:
            used = [number for number, kind in kinds.items() if new_episodes or kind != "new"]
            self._require_units(used)
        held_out = [number for number, kind in kinds.items() if kind == "held out"]
        unseen = [number for number in present if kinds.get(number, "new") == "new"]
        self.new = unseen if new_episodes else []
        self.episodes = sorted([*held_out, *self.new])
        if not self.episodes:
            raise self._nothing_to_evaluate(unseen)
        if sorted(held_out) != sorted(recorded["held out"]):
            before = show(recorded["held out"])
            print(
                f"notice: {self.title}: of the held-out episodes {before} there are "
                f"{show(held_out)}, by the numbers that they have now"
            )
        if self.new:
            print(f"notice: episodes that are new to the run are evaluated, too: {show(self.new)}")
        elif unseen:
            print(
                f"notice: {self.title} has episodes that are new to the run: {show(unseen)}; "
                "--new_episodes evaluates them, too"
            )
        columns = [*data.state_keys, data.action_key]
        cameras = list(data.cameras.values())
        for warning in check_files(dataset, cameras, columns, self.episodes):
            print(f"warning: {warning}")

    def _kinds(
        self, recorded: dict[str, list[int]], hashes: dict[str, str] | None
    ) -> dict[int, str]:
        """Number of each episode that was read -> "trained on", "held out" or "new".

        By what the episodes hold, so that numbers may change. Older checkpoints have no hashes: the
        numbers decide there.
        """
        if hashes is None:
            print(
                "notice: an older checkpoint, which knows its held-out episodes by number only: if "
                f"those of {self.title} changed, they are not the ones that were held out"
            )
            kinds = {number: kind for kind, numbers in recorded.items() for number in numbers}
            return {number: kinds.get(number, "new") for number in self.windows.hashes}
        by_hash = {}
        for kind in ("held out", "trained on"):  # a copy of one trained on is not held out
            by_hash |= {hashes.get(str(number)): kind for number in recorded[kind]}
        kinds = {}
        for number, found in self.windows.hashes.items():
            kinds[number] = by_hash.get(found, "new")
            if number in recorded["held out"] and hashes.get(str(number)) == found:
                kinds[number] = "held out"  # also if it is the copy of one that was trained on
        return kinds

    def _nothing_to_evaluate(self, unseen: list[int]) -> UserError:
        text = f"{self.title} has none of the episodes that this run held out"
        if unseen:
            text += f"; new to the run are {show(unseen)}: --new_episodes evaluates them"
        return UserError(text)

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

    def _require_units(self, episodes: list[int]) -> None:
        found = moments(self.windows, self.windows.rows(episodes))
        lines = differences(self.stats, found, self.windows.names)
        if lines:
            title = f"{self.title} is of another kind than the training data:"
            advice = "--other_units evaluates it anyway"
            raise UserError("\n    ".join([title, *lines, advice]))


def moments(windows: Windows, rows: np.ndarray) -> dict[str, Tensor]:
    """state_mean, state_std, action_mean, action_std: (dim,), over rows of windows."""
    found = {}
    for name, values in (("state", windows.state), ("action", windows.action)):
        x = values[rows].astype(np.float64)
        found[f"{name}_mean"] = torch.from_numpy(x.mean(0)).float()
        found[f"{name}_std"] = torch.from_numpy(x.std(0)).float()
    return found
