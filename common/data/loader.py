"""Windows of a LeRobot dataset at a fixed rate: samples, their order, statistics, and a batch on the device."""

import fcntl
import importlib
import signal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common.config import ConfigError, DataError, suggest
from common.data.features import FeatureCache
from common.data.frames import FrameCache, VideoFrames
from common.data.lerobot import LeRobotDataset, cache_folder, check, fetch
from common.information import keep
from common.losses import seed_of

GENERATED = {  # data.root -> what writes it on first use: module, and function of a folder
    "tabletop": ("common.envs.tabletop", "generate"),
    "tabletop-hard": ("common.envs.tabletop_hard", "generate"),
    "avoid": ("common.envs.avoid", "generate"),
    "avoid-skewed": ("common.envs.avoid", "generate_skewed"),
    "avoid-mixed": ("common.envs.mixed", "generate_avoid"),
    "tabletop-mixed": ("common.envs.mixed", "generate_tabletop"),
}
IMAGE = "observation.images."


def locate(root: str):
    """The folder of data.root: as it is, fetched from the Hub, or generated into the cache folder."""
    if root not in GENERATED:
        if "/" not in root:
            raise DataError(
                f"data.root: no folder '{root}', and no generated set of that name{suggest(root, GENERATED)}"
            )
        return fetch(root)
    folder = cache_folder() / root
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{root}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            print(f"writing the demonstrations of {root} to {folder}, once")
            module, write = GENERATED[root]
            getattr(importlib.import_module(module), write)(folder)
    return folder


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


class Order:
    """(epoch, offset after the step, rows) of each micro-batch of one process, from a position on and without end.

    Epoch e is a permutation drawn from (seed, e); every `batch_size` rows of it are one optimizer step, an incomplete
    rest is dropped; micro-steps and then processes take equal consecutive shares. With `groups` (state of each row,
    size) it is a permutation of groups of rows with similar states.
    """

    def __init__(
        self, rows, batch_size, micro_steps, rank, world, seed, epoch, offset, groups=None
    ):
        if batch_size % (micro_steps * world):
            raise ConfigError(
                f"data.batch_size {batch_size} must be a multiple of micro_steps x processes = {micro_steps} x {world}"
            )
        if len(rows) < batch_size:
            raise ConfigError(
                f"data.batch_size {batch_size} is more than the {len(rows)} training samples"
            )
        share = batch_size // (micro_steps * world)
        if groups and share % groups[1]:
            raise ConfigError(
                f"data.neighbours {groups[1]}: micro-batches of {share} are not whole groups of it"
            )
        self.rows, self.batch_size, self.micro_steps, self.seed = (
            rows,
            batch_size,
            micro_steps,
            seed,
        )
        self.rank, self.world, self.epoch, self.offset, self.groups = (
            rank,
            world,
            epoch,
            offset,
            groups,
        )

    def __iter__(self):
        epoch, offset, share = (
            self.epoch,
            self.offset,
            self.batch_size // (self.micro_steps * self.world),
        )
        while True:
            random = np.random.default_rng(seed_of("order", self.seed, epoch))
            order = random.permutation(self.rows)
            if self.groups:
                state, size = self.groups
                order = order[similar(state[order], size, random)]
            while offset + self.batch_size <= len(order):
                for micro in range(self.micro_steps):
                    start = offset + (micro * self.world + self.rank) * share
                    yield epoch, offset + self.batch_size, order[start : start + share]
                offset += self.batch_size
            epoch, offset = epoch + 1, 0


def similar(x: np.ndarray, size: int, random) -> np.ndarray:
    """Permutation of the rows of x (N, D) in which each `size` in a row are close to each other.

    Halves of a half of a half along the axis of largest (randomly scaled) spread, then shuffled; each draw differs.
    """
    order = random.permutation(len(x))
    rest, parts, groups = order[: len(x) % size], [order[len(x) % size :]], []
    while parts:
        part = parts.pop()
        if len(part) <= size:
            groups.append(part)
            continue
        axis = np.argmax(np.ptp(x[part], axis=0) * random.uniform(0.5, 1, x.shape[1]))
        part = part[np.argsort(x[part, axis], kind="stable")]
        middle = len(part) // size // 2 * size
        parts += [part[:middle], part[middle:]]
    return np.concatenate([*(groups[i] for i in random.permutation(len(groups))), rest])


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
            for some in parts.lookers(cameras)
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


DRAWS = 8  # uniform numbers that `augmented` uses per picture


def hashed_uniform(seed: int, index: np.ndarray, count: int) -> np.ndarray:
    """(len(index), count) numbers in [0, 1), each a function of (seed, index, column) alone: splitmix64."""
    with np.errstate(over="ignore"):
        x = np.uint64(seed) + (
            index.astype(np.uint64)[:, None] * np.uint64(count)
            + np.arange(1, count + 1, dtype=np.uint64)
        ) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)


def augmented(images: Tensor, augment, u: Tensor) -> Tensor:
    """images (B, ..., 3, h, w) in [0, 1], u (B, 8) uniform -> colour jitter, blur and shift, one draw per sample."""
    shape, frames = images.shape, images.flatten(1, -4).shape[1] if images.ndim > 4 else 1
    x = images.reshape(-1, *shape[-3:])
    u = u.repeat_interleave(frames, 0)
    spread = 2 * u - 1
    gray = x.new_tensor([0.299, 0.587, 0.114])
    to_gray = gray.expand(3, 3)
    eye = torch.eye(3, device=x.device)
    saturate = 1 + augment.saturation * spread[:, 2, None, None]
    # A hue shift turns colours about the gray axis (Rodrigues' formula).
    angle = 2 * torch.pi * augment.hue * spread[:, 3, None, None]
    turn = x.new_tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
    rotation = angle.cos() * eye + angle.sin() * turn + (1 - angle.cos()) / 3
    colour = (
        (1 + augment.brightness * spread[:, 0, None, None])
        * rotation
        @ (saturate * eye + (1 - saturate) * to_gray)
    )
    x = torch.einsum("bij,bjhw->bihw", colour, x)
    mean = (x * gray[:, None, None]).sum(1, keepdim=True).mean((-2, -1), keepdim=True)
    x = mean + (1 + augment.contrast * spread[:, 1, None, None, None]) * (x - mean)
    if augment.blur:
        sigma = 0.1 + 1.9 * u[:, 5, None, None, None]
        side = torch.where(u[:, 4, None, None, None] < augment.blur, (-0.5 / sigma**2).exp(), 0.0)
        for axis in (-2, -1):
            n = x.shape[axis]
            near = [
                x.index_select(axis, (torch.arange(n, device=x.device) + d).clamp(0, n - 1))
                for d in (-1, 1)
            ]
            x = (x + side * (near[0] + near[1])) / (1 + 2 * side)
    if augment.shift:
        dy, dx = (torch.floor((2 * augment.shift + 1) * u[:, 6:8]) - augment.shift).long().unbind(1)
        h, w = x.shape[-2:]
        ys = (torch.arange(h, device=x.device) + dy[:, None]).clamp(0, h - 1)
        xs = (torch.arange(w, device=x.device) + dx[:, None]).clamp(0, w - 1)
        sample = torch.arange(len(x), device=x.device)[:, None, None]
        x = x.movedim(1, -1)[sample, ys[:, :, None], xs[:, None, :]].movedim(-1, 1)
    return x.clamp(0, 1).reshape(shape)


def statistics(state: np.ndarray, action: np.ndarray) -> dict[str, Tensor]:
    """state_mean, state_std, ..., action_q99: (dim,) over rows (N, dim); warns of constant dimensions."""
    stats = {}
    for name, x in (("state", state), ("action", action)):
        x = x.astype(np.float64)
        q01, q99 = np.quantile(x, [0.01, 0.99], axis=0)
        values = {
            "mean": x.mean(0),
            "std": x.std(0),
            "min": x.min(0),
            "max": x.max(0),
            "q01": q01,
            "q99": q99,
        }
        stats |= {f"{name}_{key}": torch.from_numpy(value).float() for key, value in values.items()}
        if constant := np.flatnonzero(values["max"] == values["min"]).tolist():
            print(f"warning: {name} dimensions {constant} are constant over the training episodes")
    return stats


class Normalizer(nn.Module):
    """Per-dimension statistics of state and action, and the way to and from normalised units.

    mean_std: (x - mean) / max(std, 0.01); quantile: [q01, q99] -> [-1, 1]. Saved as dataset_stats.safetensors.
    """

    FLOOR = 1e-2  # in raw units: a joint that hardly moves is not blown up to unit variance

    def __init__(self, mode: str, stats: dict[str, Tensor]):
        super().__init__()
        self.mode = mode
        for key, value in stats.items():
            self.register_buffer(key, value)

    def affine(self, name: str) -> tuple[Tensor, Tensor]:
        """Offset and scale (dim,) of normalised units."""
        if self.mode == "quantile":
            low, high = getattr(self, f"{name}_q01"), getattr(self, f"{name}_q99")
            return (low + high) / 2, ((high - low) / 2).clamp(min=self.FLOOR)
        return getattr(self, f"{name}_mean"), getattr(self, f"{name}_std").clamp(min=self.FLOOR)

    def normalize(self, name: str, x: Tensor) -> Tensor:
        """name: state or action; x (..., dim) in the dataset's units."""
        offset, scale = self.affine(name)
        return (x - offset) / scale

    def denormalize(self, name: str, x: Tensor) -> Tensor:
        """The inverse, after a clip to +-5 or, where that is wider, to the range of the training data."""
        offset, scale = self.affine(name)
        low, high = (self.normalize(name, getattr(self, f"{name}_{end}")) for end in ("min", "max"))
        return torch.clamp(x, low.clamp(max=-5), high.clamp(min=5)) * scale + offset
