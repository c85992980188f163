"""Every time step of a LeRobot dataset as a sample, at a fixed rate."""

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common import schema
from common.data.columns import joint_names
from common.data.features import FeatureCache
from common.data.frames import FrameCache, VideoFrames
from common.data.images import IMAGE
from common.data.lerobot import LeRobotDataset
from common.data.resampling import Grid, chosen_kinds, given_kinds


class Windows(Dataset):
    """Every time step of the chosen episodes as a sample, gathered a batch at a time.

    An item is asked for by an array of rows and is a dict: observation.state (B, P, S) oldest
    first, observation.images.<name> (B, 3, h, w) uint8 (or (B, F, 3, h, w) with an image history),
    action (B, T, A), action_is_pad (B, T), episode_index and frame_index (B,). Steps before the
    first repeat it; steps after the last repeat it with action_is_pad true. With HZ other than the
    dataset's fps, each episode gets a time grid k / HZ: low-dimensional values are interpolated, or
    treated as their kind demands (see resampling.py); frames are the nearest. With `features`, its
    entries (see FeatureCache) come too, and pictures only of the cameras in `pictures`.

    sizes: numbers in a row of each column; names: a name per dimension of state and action; hashes:
    of the rows of each episode, whatever its number is. Per row: state and action, episode_index
    (the dataset's), step (in its episode), source_row (nearest frame), and episode (its place in
    first and last, which are rows of each episode's ends).
    """

    def __init__(
        self,
        cfg: schema.Data,
        dataset: LeRobotDataset,
        episodes: list[int],
        frames: FrameCache | VideoFrames,
    ):
        self.cfg = cfg
        self.root = dataset.root
        self.frames = frames
        self.features: FeatureCache | None = None
        self.pictures = list(cfg.cameras)
        lengths = np.array([episode.length for episode in dataset.select(episodes)])
        steps = np.floor((lengths - 1) * (cfg.HZ / dataset.fps) + 1e-6).astype(np.int64) + 1
        self.first = np.cumsum(steps) - steps
        self.last = self.first + steps - 1
        self.episode = np.repeat(np.arange(len(episodes)), steps)
        self.episode_index = np.array(episodes)[self.episode]
        self.step = np.arange(steps.sum()) - self.first[self.episode]

        end = np.cumsum(lengths) - 1
        start = end - lengths + 1
        of = self.episode
        ratio = dataset.fps / cfg.HZ
        grid = Grid(self.step * ratio, start[of], end[of], ratio, end)
        self.source_row = grid.nearest
        columns = dataset.columns([*cfg.state_keys, cfg.action_key], episodes)
        self.sizes = {key: values.shape[1] for key, values in columns.items()}
        self.hashes = {
            number: content_hash([values[first : first + n] for values in columns.values()])
            for number, first, n in zip(episodes, start, lengths, strict=True)
        }
        names = {key: joint_names(dataset.features, key, n) for key, n in self.sizes.items()}
        self.names = {
            "state": [name for key in cfg.state_keys for name in names[key]],
            "action": names[cfg.action_key],
        }
        given_kinds(cfg.resample, cfg.hold_keys, names)  # mistakes show at any rate
        if dataset.fps != cfg.HZ:
            kinds = chosen_kinds(cfg, dataset.fps, columns, names, start, end)
            columns = {key: grid.resampled(columns[key], kinds[key]) for key in columns}
        self.state = np.concatenate([columns[key] for key in cfg.state_keys], 1)
        self.action = columns[cfg.action_key]

    @property
    def time(self) -> np.ndarray:
        """Seconds since the start of its episode, per row."""
        return self.step / self.cfg.HZ

    def rows(self, episodes: Iterable[int], first_frames: int | None = None) -> np.ndarray:
        """Rows of some episodes, by their index in the dataset; of each only the first so many."""
        chosen = np.isin(self.episode_index, list(episodes))
        if first_frames:
            chosen &= self.step < first_frames
        return np.flatnonzero(chosen)

    def __len__(self):
        return len(self.state)

    def __getitem__(self, index: np.ndarray) -> dict[str, Tensor]:
        cfg = self.cfg
        rows = np.asarray(index)
        now = rows[:, None]
        first = self.first[self.episode[now]]
        last = self.last[self.episode[now]]
        past = np.maximum(now + np.arange(1 - cfg.obs_proprio_history, 1), first)
        future = now + cfg.action_offset + np.arange(cfg.action_horizon)
        seen = np.maximum(now + np.arange(1 - cfg.obs_images_history, 1), first)
        seen = self.source_row[seen]
        sample = {
            "observation.state": self.state[past],
            "action": self.action[np.clip(future, first, last)],
            "action_is_pad": future > last,
            "episode_index": self.episode_index[rows],
            "frame_index": self.step[rows],
        }
        for name in self.pictures:
            images = self.frames.gather(name, seen)
            sample[IMAGE + name] = images[:, 0] if cfg.obs_images_history == 1 else images
        if self.features:
            sample |= self.features.gather(seen)
        return {key: torch.from_numpy(value) for key, value in sample.items()}


def content_hash(arrays: Iterable[np.ndarray]) -> str:
    """16 hexadecimal digits that depend on the values alone."""
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()
