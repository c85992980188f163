"""Camera frames by row: decoded once into a memory map (FrameCache), or from the videos as they are (VideoFrames).

Rows count frames over the chosen episodes, one episode after the other. Both give bit-equal frames.
"""

import fcntl
import hashlib
import io
import json
import os
import shutil
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from common.config import DataError
from common.data.lerobot import Episode, LeRobotDataset, reading

RESIZE = "bilinear"  # part of the cache's key
BLACK = 16  # of 255; a camera that never gets brighter in an episode was covered or unplugged


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (h, w, 3) -> (*size, 3), antialiased; the cache and inference both use it. The aspect ratio may change."""
    if image.shape[:2] == tuple(size):
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


class Video:
    """Frame k of a video file, in order of presentation; frames in order are decoded without seeking."""

    def __init__(self, path: Path, threads: int = 1):
        self.path = path
        with reading(path):
            self.container = av.open(path)
            self.stream = self.container.streams.video[0]
            # Edit lists mark packets that must not be shown; the decoder drops them as well.
            packets = [p for p in self.container.demux(self.stream) if p.size and not p.is_discard]
        self.stream.thread_type, self.stream.codec_context.thread_count = "AUTO", threads
        self.times = np.sort([p.pts for p in packets])
        keys = sorted((p.pts, p.dts) for p in packets if p.is_keyframe) or [(packets[0].pts, packets[0].dts)]
        self.key_frames, self.key_dts = np.searchsorted(self.times, [pts for pts, _ in keys]), [dts for _, dts in keys]
        self.position, self.image, self.decoded = len(self.times), None, iter(())

    def frame(self, k: int) -> np.ndarray:
        """RGB uint8 (h, w, 3). Raises DataError if the file has no such frame."""
        if k >= len(self.times):
            raise DataError(f"{self.path}: has {len(self.times)} frames, frame {k} is needed by the episode table")
        if k == self.position and self.image is not None:
            return self.image
        key = max(int(np.searchsorted(self.key_frames, k, side="right")) - 1, 0)
        with reading(self.path, f" at frame {k}"):
            if not self.position < k or self.key_frames[key] > self.position + 1:
                self.container.seek(self.key_dts[key], stream=self.stream)
                self.decoded = self.container.decode(self.stream)
            for frame in self.decoded:
                if frame.pts >= self.times[k]:
                    break
            else:
                frame = None
            if frame is None or frame.pts != self.times[k]:
                raise DataError(f"{self.path}: frame {k} of {len(self.times)} cannot be decoded; is the file damaged?")
            self.position, self.image = k, frame.to_ndarray(format="rgb24")
        return self.image

    def close(self):
        self.container.close()


class Pictures:
    """Frame k of an episode whose pictures stand in the parquet file."""

    def __init__(self, dataset: LeRobotDataset, episode: Episode, key: str):
        self.encoded = dataset.pictures(episode, key)

    def frame(self, k: int) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(self.encoded[k])).convert("RGB"))

    def close(self):
        self.encoded = []


class VideoFrames:
    """Frames decoded when asked for (`data.cache: none`). Each process keeps up to 32 files open.

    cameras: name -> the dataset's key; size: (h, w); episodes: numbers, None for all. Raises DataError.
    """

    OPEN_FILES = 32

    def __init__(self, dataset: LeRobotDataset, cameras: dict[str, str], size, episodes: list[int] | None):
        dataset.require_cameras(cameras.values())
        self.dataset, self.cameras, self.size, self.episodes = (
            dataset,
            dict(cameras),
            tuple(size),
            dataset.select(episodes),
        )
        self.ends = np.cumsum([episode.length for episode in self.episodes])
        self.warnings: list[str] = []
        self.files: OrderedDict = OrderedDict()

    def __getstate__(self):
        return self.__dict__ | {"files": OrderedDict()}  # decoders don't travel to other processes

    def gather(self, name: str, rows) -> np.ndarray:
        """Rows of any shape -> uint8 (*rows.shape, 3, h, w)."""
        rows = np.asarray(rows)
        flat, out = rows.ravel(), np.empty((rows.size, 3, *self.size), np.uint8)
        for i in np.argsort(flat, kind="stable"):
            number = int(np.searchsorted(self.ends, flat[i], side="right"))
            episode = self.episodes[number]
            source, first = self._open(episode, self.cameras[name])
            image = source.frame(first + int(flat[i]) - int(self.ends[number]) + episode.length)
            out[i] = resize(image, self.size).transpose(2, 0, 1)
        return out.reshape(*rows.shape, 3, *self.size)

    def _open(self, episode, key):
        path, start = episode.videos.get(key, (None, 0.0))
        name = path or (episode.index, key)
        if name not in self.files:
            if len(self.files) >= self.OPEN_FILES:
                self.files.popitem(last=False)[1].close()
            self.files[name] = Video(path) if path else Pictures(self.dataset, episode, key)
        self.files.move_to_end(name)
        return self.files[name], round(start * self.dataset.fps)


class FrameCache:
    """cache[name]: uint8 (frames, 3, h, w) memory map. Processes that receive a copy open the files themselves."""

    def __init__(self, paths: dict[str, Path], warnings: list[str]):
        self.paths, self.warnings, self.maps = paths, warnings, {}

    def __getstate__(self):
        return self.__dict__ | {"maps": {}}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.maps:
            self.maps[name] = np.load(self.paths[name], mmap_mode="r")
        return self.maps[name]

    def gather(self, name: str, rows) -> np.ndarray:
        """Rows of any shape -> uint8 (*rows.shape, 3, h, w)."""
        return self[name].view(np.ndarray)[np.asarray(rows)]

    @classmethod
    def open(cls, dataset: LeRobotDataset, cameras: dict[str, str], size, episodes, folder: Path, max_gb: float):
        """The cache of these cameras and episodes in `folder`, built if it isn't there; other processes wait for it.

        Raises DataError if it takes more than max_gb (10^9 bytes) or than the disk has left.
        """
        dataset.require_cameras(cameras.values())
        chosen = dataset.select(episodes)
        frames = sum(episode.length for episode in chosen)
        shape, folder = (frames, 3, *size), Path(folder)
        numbers = [episode.index for episode in chosen]
        paths = {}
        for name, key in cameras.items():
            what = hashlib.sha256(repr([key, list(size), RESIZE, numbers]).encode()).hexdigest()[:16]
            paths[name] = folder / f"{dataset.content_key}-{what}.npy"
        bytes_each = int(np.prod(shape))
        advice = "set data.cache: none (slower, decodes while training), fewer episodes or a smaller data.image_size"
        if bytes_each * len(cameras) > max_gb * 1e9:
            total = f"{frames} frames x {len(cameras)} cameras take {bytes_each * len(cameras) / 1e9:.1f} GB"
            raise DataError(f"{total}, data.cache_max_gb is {max_gb:g}; raise it, or {advice}")
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{dataset.content_key}.lock", "w") as lock:
            if not all(path.exists() for path in paths.values()):
                fcntl.flock(lock, fcntl.LOCK_EX)
            missing = {name: cameras[name] for name, path in paths.items() if not path.exists()}
            for left_over in folder.glob(f"{dataset.content_key}-*.tmp") if missing else ():
                left_over.unlink()
            need, free = bytes_each * len(missing), shutil.disk_usage(folder).free
            if need > free:
                text = f"{folder}: {need / 1e9:.1f} GB of decoded frames do not fit, {free / 1e9:.1f} GB are free"
                raise DataError(f"{text}; free some, point XDG_CACHE_HOME to another disk, or {advice}")
            if missing:
                print(
                    f"decoding {frames} frames of {', '.join(missing)} once: {need / 1e9:.2f} GB in {folder}",
                    flush=True,
                )
                build(dataset, missing, tuple(size), chosen, paths, shape)
        warnings = [
            text for path in paths.values() for text in json.loads(path.with_suffix(".json").read_text())["warnings"]
        ]
        if missing:
            print(*warnings, sep="\n", end="\n" if warnings else "", flush=True)
        return cls(paths, warnings)


def build(dataset, cameras, size, chosen, paths, shape):
    """Decode every file once, several at a time, into `*.tmp`; rename when all is done."""
    maps, jobs = {}, {}
    for name, key in cameras.items():
        temporary = paths[name].with_suffix(".tmp")
        try:
            maps[name] = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
            with open(temporary, "r+b") as file:  # reserve: a disk that fills up later would kill us by SIGBUS
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(temporary))
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise DataError(f"{temporary}: {error.strerror}; set data.cache: none or free some space") from error
        row = 0
        for episode in chosen:
            source = episode.videos[key][0] if key in episode.videos else episode.index
            jobs.setdefault((name, source), []).append((row, episode))
            row += episode.length
    workers = min(4, os.cpu_count(), len(jobs))
    stop, brightest = threading.Event(), {}

    def decode(name, group):
        key = cameras[name]
        path = group[0][1].videos.get(key, (None,))[0]
        source = Video(path, -(-os.cpu_count() // workers)) if path else Pictures(dataset, group[0][1], key)
        for row, episode in sorted(group, key=lambda item: item[1].videos.get(key, (None, 0.0))[1]):
            first = round(episode.videos[key][1] * dataset.fps) if path else 0
            light = 0
            for k in range(episode.length):
                if stop.is_set():
                    return
                image = resize(source.frame(first + k), size)
                maps[name][row + k] = image.transpose(2, 0, 1)
                light = max(light, int(image.max()))
                bar.update()
            brightest[name, episode.index] = light
        source.close()

    with (
        tqdm(total=shape[0] * len(cameras), unit=" frames", desc="decoding") as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        try:
            for future in [pool.submit(decode, name, group) for (name, _), group in jobs.items()]:
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    for name, key in cameras.items():
        maps[name].flush()
        dark = [episode.index for episode in chosen if brightest[name, episode.index] < BLACK]
        text = [f"{dataset.root}: camera {name} ({key}) is black throughout episode {number}" for number in dark]
        about = {"dataset": str(dataset.root), "camera": key, "shape": shape, "warnings": text}
        paths[name].with_suffix(".json").write_text(json.dumps(about))
        paths[name].with_suffix(".tmp").rename(paths[name])
