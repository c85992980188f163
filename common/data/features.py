"""What frozen components make of every frame, computed once (`data.cache: features`); training never runs them.

Batches then hold `features.<component>.<camera>`: a grid, channels last, and of a backbone `....summary`. Pictures come
only of cameras that a trained component looks at.
"""

import fcntl
import hashlib
import json
import shutil
import time
from contextlib import ExitStack, suppress
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
CHECKED = (
    8  # frames, spread over a file, that are compared with what the component makes of them now
)
TOLERANCE, ROUGH = (
    0.01,
    0.05,
)  # relative l2 error in float32, and in bfloat16 or float16 (another device gives 0.01)
ADVICE = "set data.cache: frames (frozen components then run in training), or use fewer episodes or smaller pictures"
SAME_FEATURES = (
    "weights",
    "gradient_checkpointing",
    "tune",
)  # arguments that change none: the tensors are in the key


def jobs(parts, cameras) -> list[tuple[str, str]]:
    """(component, camera) whose features are cached: of the frozen ones. Raises ConfigError if there are none."""
    found = [
        job
        for some in parts.camera_components(list(cameras))
        for job in some
        if job[0] in parts.frozen
    ]
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
    def open(cls, frames, parts, sources, accelerator, folder: Path, max_gb: float, dry_run=False):
        """The cache in `folder`; what isn't there is computed now, other processes wait for it.

        frames: the FrameCache; sources: component -> its Yaml. The weights, the YAML, the pictures and the run's
        precision are a file's key. Raises DataError if it takes more than max_gb (10^9 bytes) or than the disk has
        left, and UserError if the files hold other features than the component gives now. dry_run: only say what it
        takes.
        """
        paths, work = plan(frames, parts, sources, accelerator, folder)
        if dry_run:
            announce(work, accelerator, folder, max_gb)
            return None
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as locks:
            told = not accelerator.is_local_main_process  # one process says it, and once
            for path in sorted(job.files[0] for job in work if not job.exists()):
                lock = locks.enter_context(path.with_suffix(".lock").open("w"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if not told:
                        print(f"waiting for {path}: another process computes it", flush=True)
                    told = True
                    fcntl.flock(lock, fcntl.LOCK_EX)
            missing = [job for job in work if not job.exists()]
            if missing:
                clear(folder, missing)
            lacking = announce(work, accelerator, folder, max_gb)
            shown = {
                "total": sum(len(job.pictures) for job in missing),
                "unit": " frames",
                "desc": "features",
            }
            with tqdm(
                initial=sum(done for _, done in lacking), disable=not missing, **shown
            ) as bar:
                for job, (shapes, done) in zip(missing, lacking, strict=True):
                    fill(job, shapes, done, accelerator, bar)
        for job in work:
            check(job, accelerator)
        return cls(paths)


class Job(NamedTuple):
    """What one component makes of one camera's pictures, uint8 (frames, 3, h, w), and the files of it."""

    name: str
    camera: str
    module: nn.Module
    pictures: np.ndarray
    files: list[Path]  # of the grid[, of the summary]

    def exists(self) -> bool:
        return all(file.exists() for file in self.files)

    @property
    def unfinished(self) -> list[Path]:
        return [file.with_suffix(".tmp") for file in self.files]

    @property
    def note(self) -> Path:
        """Says how many frames of the unfinished files are done."""
        return self.files[0].with_suffix(".rows")


def plan(frames, parts, sources, accelerator, folder: Path) -> tuple[dict[str, Path], list[Job]]:
    """The file of each key of a batch, and the jobs that make them. Equal components share files."""
    eyes, made_by, paths, work = parts.camera_components(list(frames.paths))[0], {}, {}, {}
    for name, camera in jobs(parts, frames.paths):
        if name not in made_by:
            settings = [
                digest(parts[name]),
                seeing(sources[name].data),
                accelerator.mixed_precision,
                DTYPE.__name__,
            ]
            made_by[name] = json.dumps(settings, sort_keys=True)
        pictures = frames.paths[camera].stem
        what = hashlib.sha256(f"{pictures} {made_by[name]}".encode()).hexdigest()[:16]
        path = folder / f"{pictures.partition('-')[0]}-{what}.npy"
        own = {f"features.{name}.{camera}": path}
        if (name, camera) in eyes:
            own[f"features.{name}.{camera}.summary"] = path.with_suffix(".summary.npy")
        module = parts[name].to(accelerator.device).eval()
        # Backbones come first: a hand extractor that is the same takes the grid of their two files.
        work.setdefault(path, Job(name, camera, module, frames[camera], [*own.values()]))
        paths |= own
    return paths, [*work.values()]


def seeing(data: dict) -> dict:
    """A component YAML without the arguments that change no feature."""
    if "blocks" in data:
        return data | {"blocks": {name: seeing(entry) for name, entry in data["blocks"].items()}}
    return data | {
        "args": {k: v for k, v in (data.get("args") or {}).items() if k not in SAME_FEATURES}
    }


def digest(module) -> str:
    """sha256 of a component's tensors and their names."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


@torch.no_grad()
def features_of(job: Job, rows, accelerator) -> list[np.ndarray]:
    """Some of a job's pictures -> what is kept of them: [grid, summary], or [grid]."""
    with accelerator.autocast():
        pictures = torch.from_numpy(np.array(job.pictures[rows])).to(accelerator.device)
        result = job.module(image=pictures / 255)
    result = [result] if isinstance(result, torch.Tensor) else [result[0].movedim(1, -1), result[1]]
    return [x.to(torch.float16).cpu().numpy() for x in result[: len(job.files)]]


def check(job: Job, accelerator):
    """Raises UserError unless the files hold what the component makes of the pictures now."""
    rows = np.unique(np.linspace(0, len(job.pictures) - 1, CHECKED).astype(int))
    tolerance = TOLERANCE if accelerator.mixed_precision == "no" else ROUGH
    for path, now in zip(job.files, features_of(job, rows, accelerator), strict=True):
        try:
            kept = np.load(path, mmap_mode="r")[rows].astype(np.float32)
        except (ValueError, EOFError, IndexError) as error:
            raise UserError(
                f"{path}: the file is not whole ({error}). Delete it: it is computed again"
            ) from error
        now = now.astype(np.float32)
        if now.shape != kept.shape or not np.linalg.norm(now - kept) <= tolerance * np.linalg.norm(
            now
        ):
            raise UserError(
                f"{path}: '{job.name}' gives other features now: did its code change? Delete this file"
            )


def announce(work: list[Job], accelerator, folder: Path, max_gb: float) -> list[tuple]:
    """Say what the missing files will take; of each job that lacks some: shapes of its files, frames done.

    Raises DataError if all files of the run are above max_gb, or the missing ones above what the disk has left.
    """
    frames, found, gb, needed, seconds = len(work[0].pictures), [], 0.0, 0.0, 0.0
    for job in work:
        if job.exists():
            gb += sum(file.stat().st_size for file in job.files) / 1e9
            continue
        for _ in range(2):  # the first call also warms up
            since = time.perf_counter()
            trial = features_of(job, slice(batch_size(accelerator)), accelerator)
            once = (time.perf_counter() - since) / len(trial[0])
        shapes = [(frames, *x.shape[1:]) for x in trial]
        found.append((shapes, progress(job, shapes)))
        size, done = sum(frames * x[0].nbytes for x in trial) / 1e9, found[-1][1]
        gb, needed = gb + size, needed + (0 if done else size)  # a build cut short keeps its space
        seconds += once * (frames - done)
    text = ", ".join(f"{job.name} of {job.camera}" for job in work)
    text = f"features of {frames} frames ({text}) take {gb:.2f} GB"
    free = (
        shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
        / 1e9
    )
    if gb > max_gb:
        raise DataError(f"{text}, above data.cache_max_gb: {max_gb:g}; raise that, {ADVICE}")
    if needed > free:
        raise DataError(
            f"{folder}: {text}, but {free:.2f} GB are free; {ADVICE}, or move XDG_CACHE_HOME"
        )
    if found:
        past = sum(done for _, done in found)
        again = f", going on after {past} of {frames * len(found)}" if past else ""
        print(
            f"{text}: about {duration(seconds)} on {accelerator.device}{again}, once, into {folder}",
            flush=True,
        )
    return found


def progress(job: Job, shapes) -> int:
    """The frames that a build which was cut short has left, 0 if there are none to go on with."""
    with suppress(OSError, ValueError, EOFError):  # not there, or not whole
        done = int(job.note.read_text())
        if (
            0 <= done <= len(job.pictures)
            and [np.load(x, mmap_mode="r").shape for x in job.unfinished] == shapes
        ):
            return done
    return 0


def clear(folder: Path, missing: list[Job]):
    """Remove what builds that were cut short have left, but for those that go on, here or in another process."""
    going_on = {job.note.stem for job in missing}
    for left in [path for path in folder.iterdir() if path.suffix in (".tmp", ".rows", ".new")]:
        stem = left.name.partition(".")[0]
        if stem not in going_on:
            with (folder / f"{stem}.lock").open("w") as lock, suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink(missing_ok=True)


def fill(job: Job, shapes, done: int, accelerator, bar):
    """Frames from `done` on, into `*.tmp`, with the frames done in `*.rows`; renamed when whole."""
    size, marked, maps = batch_size(accelerator), time.monotonic(), []

    def leave_nothing():
        for path in (job.note, *job.unfinished):
            path.unlink(missing_ok=True)

    def mark():
        for array in maps:
            array.flush()
        job.note.with_suffix(".new").write_text(str(done))
        job.note.with_suffix(".new").replace(job.note)

    try:
        if done:
            maps = [np.load(path, mmap_mode="r+") for path in job.unfinished]
        else:
            leave_nothing()
            maps = [
                reserve(path, shape, DTYPE)
                for path, shape in zip(job.unfinished, shapes, strict=True)
            ]
        while done < len(job.pictures):
            made = features_of(job, slice(done, done + size), accelerator)
            if not all(np.isfinite(x).all() for x in made):
                where = f"of camera '{job.camera}' from frame {done} on"
                raise UserError(
                    f"'{job.name}' makes {where} what float16 cannot hold: set data.cache: frames"
                )
            for array, x in zip(maps, made, strict=True):
                array[done : done + size] = x
            done += len(made[0])
            bar.update(len(made[0]))
            if time.monotonic() - marked >= MARK:
                mark()
                marked = time.monotonic()
    except UserError:  # no space, or no hope: nothing to go on with
        leave_nothing()
        raise
    except BaseException:  # Ctrl-C, too
        mark()
        raise
    mark()
    for old, path in zip(job.unfinished, job.files, strict=True):
        old.rename(path)
    job.note.unlink()


def batch_size(accelerator) -> int:
    return CPU_BATCH if accelerator.device.type == "cpu" else BATCH


def duration(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{max(seconds / 60, 0.1):.1f} minutes"
    )
