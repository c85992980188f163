"""The dataset of one run: windows, training and held-out batches, and a batch on the device."""

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from common import schema
from common.config import DataError, Yaml
from common.data.checks import check_files
from common.data.features import FeatureCache, foreseen_sizes, require_space
from common.data.frames import FrameCache, VideoFrames, occupied
from common.data.generated import locate
from common.data.images import DRAWS, IMAGE, augmented
from common.data.lerobot import LeRobotDataset, cache_folder
from common.data.normalizer import (
    Normalizer,
    neighbour_scale,
    poor_scales,
    statistics,
)
from common.data.order import Order
from common.data.scores import best_episodes
from common.data.windows import Windows
from common.noise import hashed_uniform, seed_of
from common.parts import Parts


class TrainingSet(Dataset):
    """Windows indexed by items of Order; adds the position and random numbers for augmentation."""

    def __init__(self, windows: Windows, seed: int):
        self.windows = windows
        self.seed = seed

    def __getitem__(self, index: tuple[int, int, np.ndarray]) -> dict:
        epoch, offset, rows = index
        cfg = self.windows.cfg
        batch = self.windows[rows]
        batch["position"] = torch.tensor([epoch, offset])
        if cfg.augment:
            seed = seed_of("augment", self.seed, epoch)
            draws = hashed_uniform(seed, rows, len(cfg.cameras) * DRAWS)
            batch["augment"] = torch.from_numpy(draws).unflatten(1, (-1, DRAWS))
        return batch


class Data:
    """The dataset of one run.

    windows: all samples; train_rows, val_rows: the rows of windows to train on and to hold out;
    episodes, val_episodes: their episodes; names: of the dimensions of state and action; stats: of
    the training episodes; facts: sizes that components need.
    """

    def __init__(self, cfg: schema.Data):
        self.cfg = cfg
        self.dataset = dataset = LeRobotDataset(locate(cfg.root))
        episodes = [episode.index for episode in dataset.select(cfg.episodes)]
        held_out = held_out_episodes(episodes, cfg.val_episodes)
        self.val_episodes = sorted(held_out)
        self.episodes = sorted(set(episodes) - held_out)
        if not self.episodes:
            raise DataError(
                f"{dataset.root}: {len(episodes)} episodes, all held out by data.val_episodes; "
                "none to train on"
            )
        dataset.require_columns(cfg.state_keys, "data.state_keys")
        dataset.require_columns([cfg.action_key], "data.action_key")
        keys = [*cfg.state_keys, cfg.action_key]
        for warning in check_files(dataset, list(cfg.cameras.values()), keys, cfg.episodes):
            print(f"warning: {warning}")
        videos = VideoFrames(dataset, cfg.cameras, cfg.image_size, episodes)
        self.windows = windows = Windows(cfg, dataset, episodes, videos)
        if cfg.scores and cfg.keep_top:
            self.episodes = best_episodes(cfg.scores, cfg.keep_top, dataset, self.episodes)
        check_lengths(windows, self.episodes)
        self.train_rows = windows.rows(self.episodes, cfg.first_frames)
        rows = windows.rows(held_out, cfg.first_frames)
        count = min(cfg.val_samples, len(rows))
        self.val_rows = rows[np.linspace(0, len(rows) - 1, count).astype(int)]
        seen = windows.rows(self.episodes)  # chunks go on to the end of an episode
        state = windows.state[seen]
        action = windows.action[seen]
        self.names = windows.names
        self.stats = statistics(state, action, self.names)
        normalizer = Normalizer(cfg.normalize, self.stats, cfg.min_std)
        for line in poor_scales(normalizer, state, action, self.names):
            print(f"warning: {line}")
        self.facts = {
            "action_dim": windows.action.shape[1],
            "state_dim": windows.state.shape[1],
            **facts_of_config(cfg),
        }

    @property
    def identity(self) -> dict[str, str]:
        """What a checkpoint records of the dataset."""
        return {"root": str(self.dataset.root), "content_key": self.dataset.content_key}

    def require_width(self, checkpoint: Path, facts: dict[str, int]) -> None:
        """Raises DataError unless states and actions are as wide as the facts of a checkpoint."""
        keys = ("state_dim", "action_dim")
        found = [f"{key} {self.facts[key]}" for key in keys]
        expected = [f"{key} {facts[key]}" for key in keys]
        if found != expected:
            raise DataError(
                f"{self.dataset.root}: {', '.join(found)}; {checkpoint} was trained on "
                f"{', '.join(expected)}\n    give data.root, data.state_keys and data.action_key "
                "of that run, or another train.save_dir for a new one"
            )

    def check_frame_space(self) -> None:
        """Raise DataError unless the frames fit on the disk and below data.cache_max_gb."""
        cfg = self.cfg
        folder = cache_folder() / "frames"
        arguments = (cfg.cameras, cfg.image_size, cfg.episodes, folder, cfg.cache_max_gb)
        FrameCache.plan(self.dataset, *arguments)

    def check_feature_space(self, model: schema.Model, sources: dict[str, Yaml]) -> None:
        """The same of the features, before a weight is made.

        Files that are there may be those of other weights: they count as if they were the right
        ones. Raises ConfigError where no component is frozen.
        """
        cfg = self.cfg
        sizes = foreseen_sizes(model, sources, self.facts, cfg.cameras, cfg.image_size)
        frames = sum(episode.length for episode in self.dataset.select(cfg.episodes))
        folder = cache_folder() / "features"
        there = occupied(folder, f"{self.dataset.content_key}-*")
        total = frames * sum(sizes.values())
        require_space([*sizes], frames, total, total - there, folder, cfg.cache_max_gb)

    def cache_frames(self, dry_run: bool = False) -> None:
        """Fill the frame cache; from now on, pictures are read from it in place of the videos.

        dry_run: only print the space that it takes.
        """
        cfg = self.cfg
        cache = FrameCache.open(
            self.dataset,
            cfg.cameras,
            cfg.image_size,
            cfg.episodes,
            cache_folder() / "frames",
            cfg.cache_max_gb,
            dry_run,
        )
        if cache:
            self.windows.frames = cache

    def cache_features(
        self,
        parts: Parts,
        sources: dict[str, Yaml],
        accelerator: Accelerator,
        dry_run: bool = False,
    ) -> None:
        """Fill the feature cache; from now on, batches hold features in place of most pictures.

        Pictures come only of cameras that a trained component reads.

        dry_run: only print the space that the cache takes.
        """
        cameras = list(self.cfg.cameras)
        cache = FeatureCache.open(
            self.windows.frames,  # pyrefly: ignore[bad-argument-type]  # cache_frames() came first
            parts,
            sources,
            accelerator,
            cache_folder() / "features",
            self.cfg.cache_max_gb,
            dry_run,
        )
        if cache:
            components = [pair for kind in parts.camera_components(cameras) for pair in kind]
            trained = {camera for name, camera in components if name not in parts.frozen}
            self.windows.features = cache
            self.windows.pictures = [name for name in cameras if name in trained]

    def batches(
        self,
        seed: int,
        micro_steps: int,
        rank: int,
        world: int,
        pin: bool,
        epoch: int = 0,
        offset: int = 0,
    ) -> DataLoader:
        """Micro-batches of this process from a position on, without end; see to_device()."""
        cfg = self.cfg
        groups = None
        if cfg.neighbours > 1:
            state = self.windows.state
            groups = (state / neighbour_scale(state[self.train_rows]), cfg.neighbours)
        order = Order(
            self.train_rows,
            cfg.batch_size,
            micro_steps,
            rank,
            world,
            seed,
            epoch,
            offset,
            groups,
        )
        return DataLoader(
            TrainingSet(self.windows, seed),
            sampler=order,
            batch_size=None,
            num_workers=cfg.num_workers,
            pin_memory=pin,
            prefetch_factor=4 if cfg.num_workers else None,
            worker_init_fn=_ignore_signals,
        )

    def held_out(self, rank: int, world: int, device: torch.device, size: int) -> Iterator[dict]:
        """Batches of the held-out rows of this process, equally many for all processes.

        One process's batches of size x world rows are divided among the processes. `share` of a
        batch is (first, count, total): the place of its first row in the whole, and their numbers
        of rows. Where a whole has fewer rows than there are processes, some get a row of count 0.
        """
        for start in range(0, len(self.val_rows), size * world):
            whole = self.val_rows[start : start + size * world]
            first = len(whole) * rank // world
            count = len(whole) * (rank + 1) // world - first
            rows = whole[first : first + max(count, 1)]
            batch = to_device(self.windows[rows], device)
            batch["share"] = (first, count, len(whole))
            yield batch


def facts_of_config(cfg: schema.Data) -> dict[str, int]:
    """The facts that are known before the dataset is there."""
    return {
        "num_cameras": len(cfg.cameras),
        "action_horizon": cfg.action_horizon,
        "proprio_history": cfg.obs_proprio_history,
    }


def held_out_episodes(episodes: list[int], val: float | list[int]) -> set[int]:
    """The listed episodes, or a share from the end: at least one, unless there is only one."""
    if isinstance(val, list):
        unknown = sorted(set(val) - set(episodes))
        if unknown:
            raise DataError(f"data.val_episodes: {unknown} are not among the chosen episodes")
        return set(val)
    if not val or len(episodes) == 1:
        return set()
    count = max(round(val * len(episodes)), 1)
    return set(episodes[-count:])


def check_lengths(windows: Windows, episodes: list[int]) -> None:
    """Warns of training episodes too short to learn from.

    Raises DataError if no action of any chunk is within its episode.
    """
    cfg = windows.cfg
    steps = (windows.last - windows.first + 1).tolist()
    lengths = dict(zip(windows.episode_index[windows.first].tolist(), steps, strict=True))
    lengths = {number: lengths[number] for number in episodes}
    longest = max(lengths, key=lambda number: lengths[number])
    outside = [number for number in episodes if lengths[number] <= abs(cfg.action_offset)]
    if len(outside) == len(episodes):
        raise DataError(
            f"{windows.root}: data.action_offset {cfg.action_offset}: the longest of the training "
            f"episodes ({longest}) has {lengths[longest]} steps at {cfg.HZ:g} Hz, so that no chunk "
            "would hold an action: set it nearer to 0"
        )
    short = [number for number in episodes if lengths[number] == 1]
    for numbers, problem in (
        (outside, f"no longer than data.action_offset {cfg.action_offset}: no action is learned"),
        (short, f"of a single step at {cfg.HZ:g} Hz: there is no motion to learn"),
    ):
        if numbers:
            shown = ", ".join(map(str, numbers[:12])) + (", ..." if len(numbers) > 12 else "")
            print(f"warning: {windows.root}: {len(numbers)} episodes ({shown}) are {problem}")


def _ignore_signals(worker):
    """A signal reaches the whole process group; the main process saves first, then ends workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def to_device(
    batch: dict, device: torch.device | str, augment: schema.Augment | None = None
) -> dict:
    """Tensors moved, pictures as float in [0, 1] and augmented, the position as a tuple."""
    position = batch.pop("position", None)
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    draws = batch.pop("augment", None)
    cameras = [key for key in batch if key.startswith(IMAGE)]
    for i, key in enumerate(cameras):
        batch[key] = batch[key] / 255
        if draws is not None and augment:
            batch[key] = augmented(batch[key], augment, draws[:, i])
    if position is not None:
        batch["position"] = tuple(position.tolist())
    return batch
