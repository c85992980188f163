"""Features of every frame from frozen components, computed once (`data.cache: features`).

Training then never runs these components. Batches hold `features.<component>.<camera>`: a grid,
channels last, and of a backbone `....summary`. They hold pictures only of cameras that a trained
component reads.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from torch import nn
from tqdm import tqdm

from common.config import ConfigError, DataError, UserError, Yaml
from common.data.frames import ArrayFiles, FrameCache, reserve
from common.parts import Parts, build_parts
from common.progress import progress
from common.schema import Model, Part

DTYPE = np.float16
CPU_BATCH = 8  # frames at a time
BATCH = 64
SAVE_PROGRESS = 10.0  # seconds between notes of how far a build is
CHECKED = 8  # frames, spread over a file, that are compared with the component's features now
TOLERANCE = 0.01  # relative l2 error in float32
ROUGH = 0.05  # the same in bfloat16 or float16, where another device gives 0.01
ADVICE = (
    "set data.cache: frames (frozen components then run in training), or use fewer episodes or "
    "smaller pictures"
)
IRRELEVANT = ("weights", "gradient_checkpointing", "tune")  # arguments; the tensors are in the key


def cached_components(parts: Parts, cameras: Iterable[str]) -> list[tuple[str, str]]:
    """Frozen (component, camera) pairs. Raises ConfigError if there are none to cache."""
    components = [pair for kind in parts.camera_components(list(cameras)) for pair in kind]
    frozen = [(name, camera) for name, camera in components if name in parts.frozen]
    if not frozen:
        raise ConfigError(
            "data.cache: features keeps what frozen backbones and da3 see, but none of them is "
            "frozen: set model.component_build_args.<component>.freeze: true, or data.cache: "
            "frames"
        )
    return frozen


class FeatureCache(ArrayFiles):
    """Float16 by key: (frames, h', w', C), of da3 (frames, L, h', w', C), a summary (frames, S)."""

    def gather(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """rows (B, F) -> grids (B, F h', w', C), da3 (B, L, F h', w', C), means (B, 1, S)."""
        batch = {}
        for key, features in self.arrays.items():
            x = features[rows]
            if x.ndim == 3:
                batch[key] = x.mean(1, np.float32, keepdims=True)
            elif x.ndim == 6:  # layers stay outside of frames
                x = x.swapaxes(1, 2)
                batch[key] = x.reshape(*x.shape[:2], -1, *x.shape[4:])
            else:
                batch[key] = x.reshape(len(x), -1, *x.shape[3:])
        return batch

    @classmethod
    def open(
        cls,
        frames: FrameCache,
        parts: Parts,
        sources: dict[str, Yaml],
        accelerator: Accelerator,
        folder: Path,
        max_gb: float,
        dry_run: bool = False,
    ) -> "FeatureCache | None":
        """The cache in `folder`; missing files are computed now, other processes wait for them.

        sources: component -> its Yaml. A file's key is made of the weights, the YAML, the pictures
        and the run's precision. dry_run: only print the space that it takes; None. Raises DataError
        if it takes more than max_gb (10^9 bytes) or than the disk has left, and UserError if the
        files hold other features than the component gives now.
        """
        paths, extractions = plan(frames, parts, sources, accelerator, folder)
        if dry_run:
            estimate(extractions, accelerator, folder, max_gb)
            return None
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as locks:
            lock_files(extractions, locks, quiet=not accelerator.is_local_main_process)
            missing = [one for one in extractions if not one.exists()]
            if missing:
                remove_leftovers(folder, missing)
            lacking = estimate(extractions, accelerator, folder, max_gb)
            bar = progress(
                total=sum(len(one.pictures) for one in missing),
                initial=sum(done for _, _, done in lacking),
                unit=" frames",
                desc="features",
                disable=not missing,
            )
            with bar:
                for extraction, shapes, done in lacking:
                    extract(extraction, shapes, done, accelerator, bar)
        for extraction in extractions:
            check_features(extraction, accelerator)
        return cls(paths)


class Extraction(NamedTuple):
    """A component, a camera's pictures, uint8 (frames, 3, h, w), and the files of its features."""

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
    def progress(self) -> Path:
        """Holds the number of frames of the unfinished files that are done."""
        return self.files[0].with_suffix(".rows")

    def frames_done(self, shapes: list[tuple]) -> int:
        """Frames that an interrupted build of these shapes has left; 0 if none are usable."""
        with suppress(OSError, ValueError, EOFError):  # not there, or not whole
            done = int(self.progress.read_text())
            found = [np.load(path, mmap_mode="r").shape for path in self.unfinished]
            if 0 <= done <= len(self.pictures) and found == shapes:
                return done
        return 0

    def save_progress(self, arrays: list[np.memmap], done: int) -> None:
        for array in arrays:
            array.flush()
        new = self.progress.with_suffix(".new")
        new.write_text(str(done))
        new.replace(self.progress)

    def remove_unfinished(self) -> None:
        for path in (self.progress, *self.unfinished):
            path.unlink(missing_ok=True)


def lock_files(extractions: list[Extraction], locks: ExitStack, quiet: bool) -> None:
    """Lock the missing files until `locks` is closed; say once, unless quiet, that we wait."""
    for path in sorted(one.files[0] for one in extractions if not one.exists()):
        lock = FileLock(path.with_suffix(".lock"))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if not quiet:
                print(f"waiting for {path}: another process computes it", flush=True)
            quiet = True
            lock.acquire()
        locks.callback(lock.release)


def plan(
    frames: FrameCache,
    parts: Parts,
    sources: dict[str, Yaml],
    accelerator: Accelerator,
    folder: Path,
) -> tuple[dict[str, Path], list[Extraction]]:
    """Key of a batch -> its file; the extractions that fill them. Equal components share files."""
    backbones = parts.camera_components(list(frames.paths))[0]
    settings = {}
    paths = {}
    extractions = {}
    for name, camera in cached_components(parts, frames.paths):
        module = parts[name].to(accelerator.device).eval()
        if name not in settings:
            yaml = feature_settings(sources[name].data)
            key = [digest(module), yaml, accelerator.mixed_precision, DTYPE.__name__]
            settings[name] = json.dumps(key, sort_keys=True)
        pictures = frames.paths[camera].stem
        content = hashlib.sha256(f"{pictures} {settings[name]}".encode()).hexdigest()[:16]
        path = folder / f"{pictures.partition('-')[0]}-{content}.npy"
        files = {f"features.{name}.{camera}": path}
        if (name, camera) in backbones:
            files[f"features.{name}.{camera}.summary"] = path.with_suffix(".summary.npy")
        # Backbones come first: a hand extractor that is the same takes the grid of their two files.
        extraction = Extraction(name, camera, module, frames[camera], list(files.values()))
        extractions.setdefault(path, extraction)
        paths |= files
    return paths, list(extractions.values())


def feature_settings(data: dict) -> dict:
    """A component YAML without the arguments that change no feature."""
    if "blocks" in data:
        blocks = {name: feature_settings(block) for name, block in data["blocks"].items()}
        return data | {"blocks": blocks}
    args = data.get("args") or {}
    return data | {"args": {key: args[key] for key in args if key not in IRRELEVANT}}


def digest(module: nn.Module) -> str:
    """sha256 of a component's tensors and their names."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


@torch.no_grad()
def compute_features(
    extraction: Extraction, rows: slice | np.ndarray, accelerator: Accelerator
) -> list[np.ndarray]:
    """Features of some of the pictures as they are kept: [grid, summary], or [grid]."""
    pictures = torch.from_numpy(np.array(extraction.pictures[rows])).to(accelerator.device)
    with accelerator.autocast():
        features = extraction.module(image=pictures / 255)
    if isinstance(features, torch.Tensor):
        features = [features]
    else:
        grid, summary = features
        features = [grid.movedim(1, -1), summary]
    return [x.to(torch.float16).cpu().numpy() for x in features[: len(extraction.files)]]


def check_features(extraction: Extraction, accelerator: Accelerator) -> None:
    """Raises UserError unless the files hold the features that the component gives now."""
    rows = np.linspace(0, len(extraction.pictures) - 1, CHECKED).astype(int)
    rows = np.unique(rows)
    tolerance = TOLERANCE if accelerator.mixed_precision == "no" else ROUGH
    features = compute_features(extraction, rows, accelerator)
    for path, now in zip(extraction.files, features, strict=True):
        try:
            kept = np.load(path, mmap_mode="r")[rows].astype(np.float32)
        except (ValueError, EOFError, IndexError) as error:
            raise UserError(
                f"{path}: the file is not whole ({error}). Delete it: it is computed again"
            ) from error
        now = now.astype(np.float32)
        same_shape = now.shape == kept.shape
        # A norm that is not a number is no match.
        if not (same_shape and np.linalg.norm(now - kept) <= tolerance * np.linalg.norm(now)):
            raise UserError(
                f"{path}: '{extraction.name}' gives other features now: did its code change? "
                "Delete this file"
            )


def estimate(
    extractions: list[Extraction], accelerator: Accelerator, folder: Path, max_gb: float
) -> list[tuple[Extraction, list[tuple], int]]:
    """Print the space and time that missing files take -> (extraction, file shapes, frames done).

    Raises DataError if all files of the run are above max_gb, or the missing ones above what the
    disk has left.
    """
    frames = len(extractions[0].pictures)
    lacking = []
    total = 0  # bytes
    needed = 0
    seconds = 0.0
    for extraction in extractions:
        if extraction.exists():
            total += sum(file.stat().st_size for file in extraction.files)
            continue
        for _ in range(2):  # the first call also warms up
            start = time.perf_counter()
            trial = compute_features(extraction, slice(batch_size(accelerator)), accelerator)
            elapsed = time.perf_counter() - start
        shapes = [(frames, *x.shape[1:]) for x in trial]
        done = extraction.frames_done(shapes)
        size = sum(frames * x[0].nbytes for x in trial)
        total += size
        if not done:  # an interrupted build keeps its space
            needed += size
        seconds += elapsed / len(trial[0]) * (frames - done)
        lacking.append((extraction, shapes, done))
    users = [(extraction.name, extraction.camera) for extraction in extractions]
    text = require_space(users, frames, total, needed, folder, max_gb)
    if lacking:
        past = sum(done for _, _, done in lacking)
        resumed = f", going on after {past} of {frames * len(lacking)}" if past else ""
        text += f": about {duration(seconds)} on {accelerator.device}{resumed}, once"
        print(f"{text}, into {folder}", flush=True)
    return lacking


def require_space(
    users: list[tuple[str, str]], frames: int, total: int, needed: int, folder: Path, max_gb: float
) -> str:
    """The bytes that features of some (component, camera) take, in words.

    Raises DataError if total is above max_gb (10^9 bytes), or needed above what the disk has left.
    """
    names = ", ".join(f"{name} of {camera}" for name, camera in users)
    text = f"features of {frames} frames ({names}) take {total / 1e9:.2f} GB"
    if total > max_gb * 1e9:
        raise DataError(f"{text}, above data.cache_max_gb: {max_gb:g}; raise that, {ADVICE}")
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DataError(
            f"{folder}: {text}, but {free / 1e9:.2f} GB are free; {ADVICE}, or move XDG_CACHE_HOME"
        )
    return text


@torch.no_grad()
def foreseen_sizes(
    model: Model,
    sources: dict[str, Yaml],
    facts: dict[str, int],
    cameras: dict[str, str],
    image_size: Sequence[int],
) -> dict[tuple[str, str], int]:
    """Bytes of one frame's features by (component, camera), found without weights or memory.

    Components that may share a file count once. Empty if a component cannot run on torch's meta
    device: then only the real one can tell. Raises ConfigError where there is nothing to cache.
    """
    unloaded = {name: model.component_build_args.get(name, Part()) for name in sources}
    for name, part in unloaded.items():
        if not part.same_as:
            unloaded[name] = replace(part, init="scratch")
    sizes = {}
    with torch.device("meta"), redirect_stdout(StringIO()):  # notices come with the real ones
        model = replace(model, component_build_args=unloaded)
        parts = build_parts(model, sources, facts, list(cameras))
        backbones = parts.camera_components(list(cameras))[0]
        for name, camera in cached_components(parts, cameras):
            module = parts[name].eval()
            try:
                features = module(image=torch.zeros(1, 3, *image_size))
            except (NotImplementedError, RuntimeError):
                return {}
            features = [features] if isinstance(features, torch.Tensor) else features
            kept = features if (name, camera) in backbones else features[:1]
            size = sum(x[0].numel() for x in kept) * np.dtype(DTYPE).itemsize
            file = json.dumps([cameras[camera], feature_settings(sources[name].data)])
            sizes.setdefault(file, ((name, camera), size))
    return dict(sizes.values())


def remove_leftovers(folder: Path, missing: list[Extraction]) -> None:
    """Remove leftovers of interrupted builds, unless this or another process goes on with them."""
    resumed = {extraction.progress.stem for extraction in missing}
    for path in list(folder.iterdir()):
        stem = path.name.partition(".")[0]
        if path.suffix in (".tmp", ".rows", ".new") and stem not in resumed:
            lock = FileLock(folder / f"{stem}.lock")
            with suppress(Timeout), lock.acquire(blocking=False):
                path.unlink(missing_ok=True)


def extract(
    extraction: Extraction, shapes: list[tuple], done: int, accelerator: Accelerator, bar: tqdm
) -> None:
    """Compute frames from `done` on into `*.tmp`, their count into `*.rows`; rename when whole."""
    size = batch_size(accelerator)
    saved = time.monotonic()
    arrays = []
    try:
        if done:
            arrays = [np.load(path, mmap_mode="r+") for path in extraction.unfinished]
        else:
            extraction.remove_unfinished()
            files = zip(extraction.unfinished, shapes, strict=True)
            arrays = [reserve(path, shape, DTYPE) for path, shape in files]
        while done < len(extraction.pictures):
            features = compute_features(extraction, slice(done, done + size), accelerator)
            if not all(np.isfinite(x).all() for x in features):
                raise UserError(
                    f"'{extraction.name}' makes of camera '{extraction.camera}' from frame {done} "
                    "on what float16 cannot hold: set data.cache: frames"
                )
            for array, x in zip(arrays, features, strict=True):
                array[done : done + size] = x
            count = len(features[0])
            done += count
            bar.update(count)
            if time.monotonic() - saved >= SAVE_PROGRESS:
                extraction.save_progress(arrays, done)
                saved = time.monotonic()
    except UserError:  # the disk is full, or values do not fit: nothing to go on with
        extraction.remove_unfinished()
        raise
    except BaseException:  # Ctrl-C, too
        extraction.save_progress(arrays, done)
        raise
    extraction.save_progress(arrays, done)
    for unfinished, path in zip(extraction.unfinished, extraction.files, strict=True):
        unfinished.rename(path)
    extraction.progress.unlink()


def batch_size(accelerator: Accelerator) -> int:
    return CPU_BATCH if accelerator.device.type == "cpu" else BATCH


def duration(seconds: float) -> str:
    if seconds > 5400:
        return f"{seconds / 3600:.1f} hours"
    return f"{max(seconds / 60, 0.1):.1f} minutes"
