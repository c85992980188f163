"""Windows of a LeRobot dataset at a fixed rate: samples, their order, statistics, and a batch on the device."""

import signal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common.config import DataError
from common.data.features import FeatureCache
from common.data.frames import FrameCache, VideoFrames
from common.data.generated import locate
from common.data.images import DRAWS, IMAGE, augmented
from common.data.lerobot import LeRobotDataset, cache_folder, check
from common.data.normalizer import statistics
from common.data.order import Order
from common.data.scores import keep
from common.data.windows import Windows
from common.noise import hashed_uniform, seed_of


class TrainingSet(Dataset):
    """Windows asked for as Order yields them; adds the position and what augmentation draws for each sample."""

    def __init__(self, windows, seed):
        self.windows, self.seed = windows, seed

    def __getitem__(self, item):
        epoch, offset, rows = item
        batch = self.windows[rows]
        batch["position"] = torch.tensor([epoch, offset])
        if self.windows.cfg.augment:
            draws = hashed_uniform(
                seed_of("augment", self.seed, epoch), rows, len(self.windows.cfg.cameras) * DRAWS
            )
            batch["augment"] = torch.from_numpy(draws).unflatten(1, (-1, DRAWS))
        return batch


class Data:
    """The dataset of one run: windows, training and held-out rows, statistics, and the facts that components need."""

    def __init__(self, cfg):
        self.cfg = cfg
        dataset = LeRobotDataset(locate(cfg.root))
        known = [e.index for e in dataset.episodes]
        episodes = known if cfg.episodes is None else list(cfg.episodes)
        if missing := sorted(set(episodes) - set(known)):
            raise DataError(
                f"{dataset.root}: data.episodes: no episode {missing}; it has {known[0]}..{known[-1]}"
            )
        held_out = self._held_out(episodes, cfg.val_episodes)
        if not set(episodes) - held_out:
            raise DataError(
                f"{dataset.root}: {len(episodes)} episodes, all held out by data.val_episodes; none to train on"
            )
        keys = [*cfg.state_keys, cfg.action_key]
        for warning in check(dataset, list(cfg.cameras.values()), keys, cfg.episodes):
            print(f"warning: {warning}")
        self.windows = Windows(
            cfg,
            dataset,
            episodes,
            VideoFrames(dataset, cfg.cameras, tuple(cfg.image_size), episodes),
        )
        self.dataset, self.episodes = dataset, sorted(set(episodes) - held_out)
        if cfg.scores:
            self.episodes = keep(cfg.scores, cfg.keep_top, dataset, self.episodes)
        self.train_rows = self.windows.rows(self.episodes, cfg.first_frames)
        rows = self.windows.rows(held_out, cfg.first_frames)
        self.val_rows = rows[
            np.linspace(0, len(rows) - 1, min(cfg.val_samples, len(rows))).astype(int)
        ]
        self.val_episodes = sorted(held_out)
        seen = self.windows.rows(self.episodes)  # chunks go on to the end of an episode
        self.stats = statistics(self.windows.state[seen], self.windows.action[seen])
        self.facts = {
            "action_dim": self.windows.action.shape[1],
            "state_dim": self.windows.state.shape[1],
            "num_cameras": len(cfg.cameras),
            "action_horizon": cfg.action_horizon,
            "proprio_history": cfg.obs_proprio_history,
        }

    def cache_frames(self, dry_run=False):
        """From now on, pictures are not decoded but read from the frame cache, which is filled first.

        dry_run: only say what it takes, and change nothing.
        """
        cfg, decoded = self.cfg, self.windows.frames
        chosen = (
            decoded.dataset,
            decoded.cameras,
            decoded.size,
            [episode.index for episode in decoded.episodes],
        )
        made = FrameCache.open(*chosen, cache_folder() / "frames", cfg.cache_max_gb, dry_run)
        self.windows.frames = made or decoded

    def cache_features(self, parts, sources, accelerator, dry_run=False):
        """From now on, batches hold the features of frozen components in place of what only these look at.

        dry_run: only say what it takes, and change nothing.
        """
        folder, cameras, gb = (
            cache_folder() / "features",
            list(self.cfg.cameras),
            self.cfg.cache_max_gb,
        )
        made = FeatureCache.open(
            self.windows.frames, parts, sources, accelerator, folder, gb, dry_run
        )
        if dry_run:
            return
        needed = {
            camera
            for some in parts.camera_components(cameras)
            for name, camera in some
            if name not in parts.frozen
        }
        self.windows.features, self.windows.pictures = (
            made,
            [name for name in cameras if name in needed],
        )

    @staticmethod
    def _held_out(episodes, val):
        if isinstance(val, list):
            if missing := sorted(set(val) - set(episodes)):
                raise DataError(f"data.val_episodes: {missing} are not among the chosen episodes")
            return set(val)
        count = max(round(val * len(episodes)), 1) if val and len(episodes) > 1 else 0
        return set(episodes[len(episodes) - count :])

    def batches(self, seed, micro_steps, rank, world, pin, epoch=0, offset=0) -> DataLoader:
        """Micro-batches of this process, from a position on, without end; not yet on a device (see to_device)."""
        cfg = self.cfg
        groups = None
        if cfg.neighbours > 1:
            groups = (
                self.windows.state / (self.windows.state[self.train_rows].std(0) + 1e-2),
                cfg.neighbours,
            )
        order = Order(
            self.train_rows, cfg.batch_size, micro_steps, rank, world, seed, epoch, offset, groups
        )
        workers = (
            {"prefetch_factor": 4, "worker_init_fn": _leave_signals} if cfg.num_workers else {}
        )
        samples = TrainingSet(self.windows, seed)
        return DataLoader(
            samples,
            sampler=order,
            batch_size=None,
            num_workers=cfg.num_workers,
            pin_memory=pin,
            **workers,
        )

    def held_out(self, rank, world, device, size):
        """Batches of this process's share of the held-out rows: equal shares, the rest of the division is left out."""
        share = len(self.val_rows) // world
        rows = self.val_rows[rank * share : (rank + 1) * share]
        for i in range(0, share, size):
            yield to_device(self.windows[rows[i : i + size]], device)


def _leave_signals(worker):
    """A stop signal often reaches the whole process group: the main process saves first, then ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def to_device(batch: dict, device, augment=None) -> dict:
    """Tensors moved, pictures as float in [0, 1], augmented where asked for."""
    position, draws = batch.pop("position", None), batch.pop("augment", None)
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    cameras = [key for key in batch if key.startswith(IMAGE)]
    for i, key in enumerate(cameras):
        batch[key] = batch[key] / 255
        if draws is not None and augment:
            batch[key] = augmented(batch[key], augment, draws[:, i].to(device, non_blocking=True))
    if position is not None:
        batch["position"] = tuple(position.tolist())
    return batch
