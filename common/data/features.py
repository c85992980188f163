"""What frozen backbones and da3 make of every frame, computed once (`data.cache: features`); training never runs them.

Batches then hold `features.<component>.<camera>`: a grid, channels last, and of a backbone `....summary`. Pictures come
only of cameras that a trained component looks at.
"""

import fcntl
import hashlib
import json
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from common.config import ConfigError, DataError, UserError
from common.data.frames import reserve

DTYPE = np.float16
CPU_BATCH, BATCH = 8, 64  # frames at a time
MARK = 10.0  # seconds between notes of how far a build is
TOLERANCE = 0.05  # relative l2 error: bfloat16 on another device gives 0.01
ADVICE = "set data.cache: frames (frozen components then run in training), or use fewer episodes or smaller pictures"


def jobs(parts, cameras) -> list[tuple[str, str]]:
    """(component, camera) whose features are cached: of the frozen ones. Raises ConfigError if there are none."""
    found = [job for some in parts.lookers(list(cameras)) for job in some if job[0] in parts.frozen]
    if not found:
        raise ConfigError(
            "data.cache: features keeps what frozen backbones and da3 see, but none of them is frozen: set "
            "model.component_build_args.<component>.freeze: true, or data.cache: frames"
        )
    return found


class FeatureCache:
    """gather(rows) -> the features of a batch. Processes that receive a copy open the files themselves.

    paths: key of a batch -> float16 .npy, (frames, h', w', C); of da3 (frames, L, h', w', C), of a summary (frames, S).
    """

    def __init__(self, paths: dict[str, Path]):
        self.paths, self.maps = paths, {}

    def __getstate__(self):
        return self.__dict__ | {"maps": {}}

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self.maps:
            self.maps[key] = np.load(self.paths[key], mmap_mode="r")
        return self.maps[key].view(np.ndarray)

    def gather(self, rows) -> dict[str, np.ndarray]:
        """rows (B, F) -> grids (B, F h', w', C) or of da3 (B, L, F h', w', C), summaries (B, 1, S): the mean."""
        batch = {}
        for key in self.paths:
            x = self[key][rows]
            if x.ndim == 3:
                batch[key] = x.mean(1, np.float32, keepdims=True)
            elif x.ndim == 6:  # layers stay outside of frames
                x = x.swapaxes(1, 2)
                batch[key] = x.reshape(*x.shape[:2], -1, *x.shape[4:])
            else:
                batch[key] = x.reshape(len(x), -1, *x.shape[3:])
        return batch

    @classmethod
    def open(cls, frames, parts, sources, accelerator, folder: Path, max_gb: float):
        """The cache in `folder`; what isn't there is computed now, other processes wait for it.

        frames: the FrameCache; sources: component -> its Yaml. The weights, the YAML, the pictures and the run's
        precision are a file's key. Raises DataError if it takes more than max_gb (10^9 bytes) or than the disk has
        left, and UserError if the files hold other features than the component gives now.
        """
        folder.mkdir(parents=True, exist_ok=True)
        eyes, made_by, paths, work = parts.lookers(list(frames.paths))[0], {}, {}, {}
        for name, camera in jobs(parts, frames.paths):
            if name not in made_by:
                settings = [sources[name].data, accelerator.mixed_precision, np.dtype(DTYPE).name]
                made_by[name] = json.dumps([digest(parts[name]), *settings], sort_keys=True)
            pictures = frames.paths[camera].stem
            what = hashlib.sha256(f"{pictures} {made_by[name]}".encode()).hexdigest()[:16]
            path = folder / f"{pictures.partition('-')[0]}-{what}.npy"
            files = [path, path.with_suffix(".summary.npy")] if (name, camera) in eyes else [path]
            paths |= zip([f"features.{name}.{camera}", f"features.{name}.{camera}.summary"], files, strict=False)
            work[path] = Job(name, camera, parts[name].to(accelerator.device).eval(), frames[camera], files)
        with ExitStack() as locks:
            for path, job in sorted(work.items()):
                if not all(file.exists() for file in job.files):
                    fcntl.flock(locks.enter_context(path.with_suffix(".lock").open("w")), fcntl.LOCK_EX)
            missing = [job for job in work.values() if not all(file.exists() for file in job.files)]
            if missing:
                build(missing, accelerator, folder, max_gb)
        cache = cls(paths)
        for path, job in work.items():
            rows = np.unique([0, len(job.pictures) // 2, len(job.pictures) - 1])
            now = look(job.module, job.pictures[rows], accelerator)[0].astype(np.float32)
            kept = cache[f"features.{job.name}.{job.camera}"][rows].astype(np.float32)
            if now.shape != kept.shape or not np.linalg.norm(now - kept) <= TOLERANCE * np.linalg.norm(now):
                raise UserError(f"{path}: '{job.name}' gives other features now: did its code change? Delete this file")
        return cache


class Job(NamedTuple):
    """What one component makes of one camera's pictures, uint8 (frames, 3, h, w), and the files of it."""

    name: str
    camera: str
    module: nn.Module
    pictures: np.ndarray
    files: list[Path]


def digest(module) -> str:
    """sha256 of a component's tensors and their names."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


@torch.no_grad()
def look(module, pictures: np.ndarray, accelerator) -> list[np.ndarray]:
    """uint8 (n, 3, h, w) -> a frozen component's [grid, summary], or [grid], as they are kept."""
    with accelerator.autocast():
        result = module(image=torch.from_numpy(np.array(pictures)).to(accelerator.device) / 255)
    result = [result] if isinstance(result, torch.Tensor) else [result[0].permute(0, 2, 3, 1), result[1]]
    return [x.to(torch.float16).cpu().numpy() for x in result]


def build(work: list[Job], accelerator, folder: Path, max_gb: float):
    """Say what it will take, and fill the files."""
    device, frames = accelerator.device, len(work[0].pictures)
    size = CPU_BATCH if device.type == "cpu" else BATCH
    shapes, done, gb, seconds = [], [], [], 0.0
    for job in work:
        for _ in range(2):  # the first call also warms up
            since = time.perf_counter()
            trial = look(job.module, job.pictures[:size], accelerator)
            once = (time.perf_counter() - since) / len(trial[0])
        shapes.append([(frames, *x.shape[1:]) for x in trial])
        done.append(progress(job.files, shapes[-1]))
        gb.append(sum(frames * x[0].nbytes for x in trial) / 1e9)
        seconds += once * (frames - done[-1])
    text = ", ".join(f"{job.name} of {job.camera}" for job in work)
    text = f"features of {frames} frames ({text}) take {sum(gb):.2f} GB"
    needed = sum(x for x, rows in zip(gb, done, strict=True) if not rows)  # a build cut short keeps its space
    free = shutil.disk_usage(folder).free / 1e9
    if sum(gb) > max_gb:
        raise DataError(f"{text}, above data.cache_max_gb: {max_gb:g}; raise that, {ADVICE}")
    if needed > free:
        raise DataError(f"{folder}: {text}, but {free:.2f} GB are free; {ADVICE}, or move XDG_CACHE_HOME")
    total, past = frames * len(work), sum(done)
    again = f", going on after {past} of {total}" if past else ""
    print(f"{text}: about {duration(seconds)} on {device}{again}, once, into {folder}", flush=True)
    with tqdm(total=total, initial=past, unit=" frames", desc="features") as bar:
        for job, shape, rows in zip(work, shapes, done, strict=True):
            fill(job, shape, rows, size, accelerator, bar)


def fill(job: Job, shapes, done: int, size: int, accelerator, bar):
    """Frames from `done` on, into `*.tmp`, with the frames done in `*.rows`; renamed when whole."""
    unfinished, note = [path.with_suffix(".tmp") for path in job.files], job.files[0].with_suffix(".rows")
    if done:
        maps = [np.load(path, mmap_mode="r+") for path in unfinished]
    else:
        note.unlink(missing_ok=True)
        try:
            maps = [reserve(path, shape, DTYPE) for path, shape in zip(unfinished, shapes, strict=True)]
        except DataError:
            for path in unfinished:
                path.unlink(missing_ok=True)
            raise

    def mark():
        for array in maps:
            array.flush()
        note.with_suffix(".new").write_text(str(done))
        note.with_suffix(".new").replace(note)

    marked = time.monotonic()
    try:
        while done < len(job.pictures):
            made = look(job.module, job.pictures[done : done + size], accelerator)
            if not all(np.isfinite(x).all() for x in made):
                where = f"of camera '{job.camera}' from frame {done} on"
                raise UserError(f"'{job.name}' makes {where} what float16 cannot hold: set data.cache: frames")
            for array, x in zip(maps, made, strict=True):
                array[done : done + size] = x
            done += len(made[0])
            bar.update(len(made[0]))
            if time.monotonic() - marked >= MARK:
                mark()
                marked = time.monotonic()
    finally:
        mark()
    for old, path in zip(unfinished, job.files, strict=True):
        old.rename(path)
    note.unlink()


def progress(files, shapes) -> int:
    """The frames that a build which was cut short has left, 0 if there are none to go on with."""
    unfinished, note = [path.with_suffix(".tmp") for path in files], files[0].with_suffix(".rows")
    if not all(path.exists() for path in [note, *unfinished]):
        return 0
    fits = [np.load(path, mmap_mode="r").shape for path in unfinished] == shapes
    return int(note.read_text()) if fits else 0


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{max(seconds / 60, 0.1):.1f} minutes"
