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

import numpy as np
import torch
from tqdm import tqdm

from common.config import ConfigError, DataError, UserError
from common.data.frames import reserve

DTYPE = np.float16
BATCH = {"cpu": 8}  # frames at a time; on other devices OTHERS
OTHERS = 64
MARK = 10.0  # seconds between notes of how far a build is
TOLERANCE = 0.05  # relative l2 error: bfloat16 on another device gives 0.01
ADVICE = "set data.cache: frames (frozen components then run in training), or use fewer episodes or smaller pictures"


def lookers(parts, cameras) -> list[tuple[str, str]]:
    """(component, camera) of every component that looks at pictures, as in Parts.look; da3 looks at the first."""
    cameras = list(cameras)
    eyes = [(parts._owner("backbone", camera), camera) for camera in cameras]
    hands = [(parts._owner("hand_extractor", camera), camera) for camera in parts._with_hands(cameras)]
    return [*eyes, *hands, *(("da3", camera) for camera in cameras[:1] if "da3" in parts)]


def jobs(parts, cameras) -> list[tuple[str, str]]:
    """Those whose features are cached: the frozen ones. Raises ConfigError if there are none."""
    found = [(name, camera) for name, camera in lookers(parts, cameras) if name in parts.frozen]
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
        found = jobs(parts, frames.paths)
        keys = {}
        for name in {name for name, _ in found}:
            built = [sources[name].data, accelerator.mixed_precision, np.dtype(DTYPE).name]
            keys[name] = json.dumps([digest(parts[name]), *built], sort_keys=True)
        files, work = {}, {}  # (component, camera) -> its files; the first file of each -> (component, camera)
        for name, camera in found:
            pictures = frames.paths[camera].stem
            what = hashlib.sha256(f"{pictures} {keys[name]}".encode()).hexdigest()[:16]
            path = folder / f"{pictures.partition('-')[0]}-{what}.npy"
            files[name, camera] = [path]
            if (name, camera) in lookers(parts, frames.paths)[: len(frames.paths)]:  # a backbone
                files[name, camera].append(path.with_suffix(".summary.npy"))
            work.setdefault(path, (name, camera))
        with ExitStack() as locks:
            for path in sorted(path for path, job in work.items() if not complete(files[job])):
                lock = locks.enter_context(path.with_suffix(".lock").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            missing = {job: files[job] for job in work.values() if not complete(files[job])}
            if missing:
                build(frames, parts, accelerator, missing, max_gb)
        kinds = ("", ".summary")
        cache = cls(
            {f"features.{n}.{c}{kind}": p for (n, c), ps in files.items() for kind, p in zip(kinds, ps, strict=False)}
        )
        for (name, camera), paths in files.items():
            pictures = frames[camera]
            rows = np.unique([0, len(pictures) // 2, len(pictures) - 1])
            now = look(parts[name], pictures[rows], accelerator)[0].astype(np.float32)
            kept = cache[f"features.{name}.{camera}"][rows].astype(np.float32)
            if now.shape != kept.shape or np.linalg.norm(now - kept) > TOLERANCE * np.linalg.norm(now):
                raise UserError(f"{paths[0]}: '{name}' gives other features now: did its code change? Delete this file")
        return cache


def complete(paths) -> bool:
    return all(path.exists() for path in paths)


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


def build(frames, parts, accelerator, missing, max_gb):
    """Fill the files of each (component, camera): into `*.tmp`, with the rows done in `*.rows`; renamed when whole."""
    size, device = BATCH.get(accelerator.device.type, OTHERS), accelerator.device
    todo, total, new, seconds = [], 0, 0, 0.0
    for (name, camera), paths in missing.items():
        module, pictures = parts[name].to(device).eval(), frames[camera]
        for _ in range(2):  # the first call also warms up
            since = time.perf_counter()
            shapes = [(len(pictures), *x.shape[1:]) for x in look(module, pictures[:size], accelerator)]
            once = (time.perf_counter() - since) / len(pictures[:size])
        done = progress(paths, shapes)
        space = sum(np.prod(shape, dtype=int) * np.dtype(DTYPE).itemsize for shape in shapes) / 1e9
        total, new = total + space, new + (0 if done else space)
        seconds += once * (len(pictures) - done)
        todo.append((name, module, pictures, paths, shapes, done))
    folder, what = paths[0].parent, ", ".join(f"{name} of {camera}" for name, camera in missing)
    text = f"features of {len(pictures)} frames ({what}) take {total:.2f} GB"
    free = shutil.disk_usage(folder).free / 1e9
    if total > max_gb:
        raise DataError(f"{text}, above data.cache_max_gb: {max_gb:g}; raise that, {ADVICE}")
    if new > free:
        raise DataError(f"{folder}: {text}, but {free:.2f} GB are free; {ADVICE}, or move XDG_CACHE_HOME")
    past = sum(done for *_, done in todo)
    again = f", going on after {past} of {len(pictures) * len(todo)}" if past else ""
    print(f"{text}: about {duration(seconds)} on {device}{again}, once, into {folder}", flush=True)
    with tqdm(total=len(pictures) * len(todo), initial=past, unit=" frames", desc="features") as bar:
        for name, module, pictures, paths, shapes, done in todo:
            fill(name, module, pictures, paths, shapes, done, size, accelerator, bar)


def fill(name, module, pictures, paths, shapes, done, size, accelerator, bar):
    """One component's features of one camera from the row `done` on."""
    unfinished = [path.with_suffix(".tmp") for path in paths]
    note = paths[0].with_suffix(".rows")
    if done:
        maps = [np.load(path, mmap_mode="r+") for path in unfinished]
    else:
        note.unlink(missing_ok=True)
        maps = [reserve(path, shape, DTYPE) for path, shape in zip(unfinished, shapes, strict=True)]

    def mark():
        for array in maps:
            array.flush()
        note.with_suffix(".new").write_text(str(done))
        note.with_suffix(".new").replace(note)

    marked = time.monotonic()
    try:
        while done < len(pictures):
            made = look(module, pictures[done : done + size], accelerator)
            if not all(np.isfinite(x).all() for x in made):
                problem = f"component '{name}' gives values that float16 cannot hold (frames {done} to {done + size})"
                raise UserError(f"{problem}: set data.cache: frames")
            for array, x in zip(maps, made, strict=True):
                array[done : done + size] = x
            done += len(made[0])
            bar.update(len(made[0]))
            if time.monotonic() - marked >= MARK:
                mark()
                marked = time.monotonic()
    finally:
        mark()
    for old, path in zip(unfinished, paths, strict=True):
        old.rename(path)
    note.unlink()


def progress(paths, shapes) -> int:
    """The rows that a build which was cut short has left, 0 if there are none to go on with."""
    unfinished, note = [path.with_suffix(".tmp") for path in paths], paths[0].with_suffix(".rows")
    if not note.exists() or not complete(unfinished):
        return 0
    fits = all(np.load(old, mmap_mode="r").shape == tuple(s) for old, s in zip(unfinished, shapes, strict=True))
    return int(note.read_text()) if fits else 0


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{max(seconds / 60, 0.1):.1f} minutes"
