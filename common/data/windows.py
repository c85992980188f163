"""Every time step of a LeRobot dataset as a sample, at a fixed rate."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.data.images import IMAGE
from common.data.lerobot import LeRobotDataset


class Windows(Dataset):
    """Every time step of the chosen episodes as a sample, gathered a batch at a time.

    An item is asked for by an array of rows and is a dict: observation.state (B, P, S) oldest first,
    observation.images.<name> (B, 3, h, w) uint8 (or (B, F, 3, h, w) with an image history), action (B, T, A),
    action_is_pad (B, T), episode_index and frame_index (B,). Steps before the first repeat it; steps after the last
    repeat it with action_is_pad true. With HZ other than the dataset's fps, each episode gets a time grid k / HZ:
    low-dimensional values are interpolated (hold_keys: nearest), frames are the nearest. With `features`, its entries
    (see FeatureCache) come too, and pictures only of the cameras in `pictures`.
    """

    def __init__(self, cfg, dataset: LeRobotDataset, episodes: list[int], frames):
        self.cfg, self.frames, self.features, self.pictures = cfg, frames, None, list(cfg.cameras)
        lengths = {e.index: e.length for e in dataset.episodes}
        lengths = np.array([lengths[e] for e in episodes])
        columns = dataset.columns([*cfg.state_keys, cfg.action_key], episodes)
        starts = np.cumsum(lengths) - lengths
        steps = np.floor((lengths - 1) * (cfg.HZ / dataset.fps) + 1e-6).astype(np.int64) + 1
        self.first = np.cumsum(steps) - steps
        self.last = self.first + steps - 1
        self.episode = np.repeat(np.arange(len(episodes)), steps)
        self.episode_index = np.array(episodes)
        step = np.arange(steps.sum()) - self.first[self.episode]
        source = step * (dataset.fps / cfg.HZ)
        end = starts[self.episode] + lengths[self.episode] - 1
        self.source_row = np.minimum(
            starts[self.episode] + np.floor(source + 0.5).astype(np.int64), end
        )
        below = np.minimum(starts[self.episode] + np.floor(source + 1e-6).astype(np.int64), end)
        share = np.clip(source - (below - starts[self.episode]), 0, 1).astype(np.float32)[:, None]

        def resample(key):
            values = columns[key]
            if key in cfg.hold_keys or dataset.fps == cfg.HZ:
                return values[self.source_row]
            return (1 - share) * values[below] + share * values[np.minimum(below + 1, end)]

        self.state = np.concatenate([resample(key) for key in cfg.state_keys], 1)
        self.action = resample(cfg.action_key)

    def rows(self, episodes, first_frames=None) -> np.ndarray:
        """The rows of some episodes, by their index in the dataset; of each only the first so many."""
        step = np.arange(len(self)) - self.first[self.episode]
        chosen = np.isin(self.episode_index[self.episode], list(episodes)) & (
            step < (first_frames or len(self))
        )
        return np.flatnonzero(chosen)

    def __len__(self):
        return len(self.state)

    def __getitem__(self, rows) -> dict[str, Tensor]:
        cfg, rows = self.cfg, np.asarray(rows)
        first, last = (edge[self.episode[rows], None] for edge in (self.first, self.last))
        past = np.maximum(rows[:, None] + np.arange(1 - cfg.obs_proprio_history, 1), first)
        seen = np.maximum(rows[:, None] + np.arange(1 - cfg.obs_images_history, 1), first)
        future = rows[:, None] + cfg.action_offset + np.arange(cfg.action_horizon)
        sample = {
            "observation.state": self.state[past],
            "action": self.action[np.clip(future, first, last)],
            "action_is_pad": future > last,
            "episode_index": self.episode_index[self.episode[rows]],
            "frame_index": rows - self.first[self.episode[rows]],
        }
        for name in self.pictures:
            images = self.frames.gather(name, self.source_row[seen].ravel())
            images = images.reshape(*seen.shape, *images.shape[1:])
            sample[IMAGE + name] = images[:, 0] if cfg.obs_images_history == 1 else images
        if self.features:
            sample |= self.features.gather(self.source_row[seen])
        return {key: torch.from_numpy(value) for key, value in sample.items()}
