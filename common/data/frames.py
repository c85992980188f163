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
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from common.config import DataError
from common.data.images import resize
from common.data.lerobot import LeRobotDataset, reading

RESIZE = "bilinear"  # part of the cache's key
OPEN_FILES = 32
BLACK = 16  # of 255; a camera that never gets brighter in an episode was covered or unplugged


class Video:
    """Frame k of a video file, in order of presentation; frames in order are decoded without seeking."""

    def __init__(self, path: Path, threads: int = 1):
        self.path = path
        with reading(path):
            self.container = av.open(path)
            weakref.finalize(
                self, self.container.close
            )  # it has reference cycles: files would stay open for long
            self.stream = self.container.streams.video[0]
            # Edit lists mark packets that must not be shown; the decoder drops them as well.
            packets = [p for p in self.container.demux(self.stream) if p.size and not p.is_discard]
            keys = sorted((p.pts, p.dts) for p in packets if p.is_keyframe) or [
                (packets[0].pts, packets[0].dts)
            ]
        self.stream.thread_type, self.stream.codec_context.thread_count = "AUTO", threads
        self.times = np.sort([p.pts for p in packets])
        self.key_frames, self.key_dts = (
            np.searchsorted(self.times, [pts for pts, _ in keys]),
            [dts for _, dts in keys],
        )
        self.position, self.image, self.decoded = len(self.times), None, iter(())
        self.converter = av.video.reformatter.VideoReformatter()

    def frame(self, k: int) -> np.ndarray:
        """RGB uint8 (h, w, 3). Raises DataError if the file has no such frame."""
        if k >= len(self.times):
            raise DataError(
                f"{self.path}: has {len(self.times)} frames, frame {k} is needed by the episode table"
            )
        if k == self.position and self.image is not None:
            return self.image
        key = max(int(np.searchsorted(self.key_frames, k, side="right")) - 1, 0)
        with reading(self.path, f" at frame {k}"):
            if not self.position < k or self.key_frames[key] > self.position + 1:
                self.container.seek(self.key_dts[key], stream=self.stream)
                self.decoded = self.container.decode(self.stream)
            frame = next((frame for frame in self.decoded if frame.pts >= self.times[k]), None)
        if frame is None or frame.pts != self.times[k]:
            raise DataError(
                f"{self.path}: frame {k} of {len(self.times)} cannot be decoded; is the file damaged?"
            )
        # Its default starts threads for each frame, and a forked child would hang joining them.
        self.position, self.image = (
            k,
            self.converter.reformat(frame, format="rgb24", threads=1).to_ndarray(),
        )
        return self.image


class VideoFrames:
    """Frames decoded when asked for (`data.cache: none`). Each process keeps up to OPEN_FILES open.

    cameras: name -> the dataset's key; size: (h, w); episodes: numbers, None for all; threads: for each decoder.
    """

    def __init__(
        self,
        dataset: LeRobotDataset,
        cameras: dict[str, str],
        size,
        episodes: list[int] | None,
        threads=1,
    ):
        dataset.require_cameras(cameras.values())
        self.dataset, self.cameras, self.size, self.threads = (
            dataset,
            dict(cameras),
            tuple(size),
            threads,
        )
        self.episodes = dataset.select(episodes)
        self.ends = np.cumsum([episode.length for episode in self.episodes])
        self.files, self.process = OrderedDict(), os.getpid()
        self.warnings: list[str] = []  # black cameras show only in a cache

    def __getstate__(self):
        return self.__dict__ | {"files": OrderedDict()}  # decoders don't travel to other processes

    def gather(self, name: str, rows) -> np.ndarray:
        """Rows of any shape -> uint8 (*rows.shape, 3, h, w)."""
        rows = np.asarray(rows)
        flat, out = rows.ravel(), np.empty((rows.size, 3, *self.size), np.uint8)
        for i in np.argsort(flat, kind="stable"):
            out[i] = self.frame(name, int(flat[i]))
        return out.reshape(*rows.shape, 3, *self.size)

    def frame(self, name: str, row: int) -> np.ndarray:
        """uint8 (3, h, w)."""
        number, key = int(np.searchsorted(self.ends, row, side="right")), self.cameras[name]
        episode = self.episodes[number]
        path, start = episode.videos.get(key, (None, 0.0))
        if (
            self.process != os.getpid()
        ):  # forked: the parent's decoders share their file positions with ours
            self.files, self.process = OrderedDict(), os.getpid()
        place = path or (episode.index, key)
        if place not in self.files:
            if len(self.files) >= OPEN_FILES:
                self.files.popitem(last=False)
            self.files[place] = (
                Video(path, self.threads) if path else self.dataset.pictures(episode, key)
            )
        self.files.move_to_end(place)
        source, k = self.files[place], row - int(self.ends[number]) + episode.length
        if path:
            image = source.frame(round(start * self.dataset.fps) + k)
        else:
            image = np.asarray(Image.open(io.BytesIO(source[k])).convert("RGB"))
        return resize(image, self.size).transpose(2, 0, 1)


class FrameCache:
    """cache[name]: uint8 (frames, 3, h, w) memory map. Processes that receive a copy open the files themselves."""

    def __init__(self, paths: dict[str, Path]):
        self.paths, self.maps = paths, {}
        self.warnings = [
            text
            for path in paths.values()
            for text in json.loads(path.with_suffix(".json").read_text())
        ]

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
    def open(
        cls,
        dataset: LeRobotDataset,
        cameras: dict[str, str],
        size,
        episodes,
        folder: Path,
        max_gb: float,
        dry_run=False,
    ):
        """The cache in `folder`, decoded now if it isn't there; other processes wait for it. Raises DataError if it
        takes more than max_gb (10^9 bytes) or than the disk has left. dry_run: only say what it takes."""
        dataset.require_cameras(cameras.values())
        numbers, paths = [episode.index for episode in dataset.select(episodes)], {}
        for name, key in cameras.items():
            what = hashlib.sha256(repr([key, list(size), RESIZE, numbers]).encode()).hexdigest()[
                :16
            ]
            paths[name] = Path(folder) / f"{dataset.content_key}-{what}.npy"
        frames = sum(episode.length for episode in dataset.select(episodes))
        gb = frames * 3 * size[0] * size[1] / 1e9
        total = f"{frames} frames of {len(cameras)} cameras at {size[0]} x {size[1]} take {gb * len(cameras):.2f} GB"
        advice = "set data.cache: none (decodes while training), or use fewer episodes or a smaller data.image_size"
        if gb * len(cameras) > max_gb:
            raise DataError(f"{total}, above data.cache_max_gb: {max_gb:g}; raise that, {advice}")
        Path(folder).mkdir(parents=True, exist_ok=True)
        with open(Path(folder) / f"{dataset.content_key}.lock", "w") as lock:
            if not all(path.exists() for path in paths.values()):
                fcntl.flock(lock, fcntl.LOCK_EX)
            distinct = {
                path: name for name, path in paths.items()
            }  # two names may mean the same camera
            missing = {name: cameras[name] for path, name in distinct.items() if not path.exists()}
            if missing:
                for left_over in Path(folder).glob(f"{dataset.content_key}-*.tmp"):
                    left_over.unlink()
                free = shutil.disk_usage(folder).free / 1e9
                if gb * len(missing) > free:
                    raise DataError(
                        f"{folder}: {total}, but {free:.2f} GB are free; {advice}, or move XDG_CACHE_HOME"
                    )
                print(f"{total}: {', '.join(missing)} decoded once, into {folder}", flush=True)
                if dry_run:
                    return None
                build(dataset, missing, tuple(size), numbers, paths)
        cache = cls(paths)
        if missing and cache.warnings:
            print(*cache.warnings, sep="\n", flush=True)
        return cache


def build(dataset, cameras, size, numbers, paths):
    """Decode every file once, several at a time, into `*.tmp`; rename when all is done."""
    episodes = dataset.select(numbers)
    rows = np.cumsum([0] + [episode.length for episode in episodes]).tolist()
    temporary = {name: paths[name].with_suffix(".tmp") for name in cameras}
    jobs = {}  # (camera, file): [(start in the file, first row, episode)]
    for name, key in cameras.items():
        for episode, row in zip(episodes, rows, strict=False):
            path, start = episode.videos.get(key, (episode.index, 0.0))
            jobs.setdefault((name, path), []).append((start, row, episode))
    workers = min(4, os.cpu_count(), len(jobs))
    stop, dark = threading.Event(), {name: [] for name in cameras}

    def decode(name, group):
        source = VideoFrames(dataset, cameras, size, numbers, threads=-(-os.cpu_count() // workers))
        for _, first, episode in sorted(group, key=lambda item: item[:2]):
            brightest = 0
            for row in range(first, first + episode.length):
                if stop.is_set():
                    return
                maps[name][row] = image = source.frame(name, row)
                brightest = max(brightest, int(image.max()))
                bar.update()
            if brightest < BLACK:
                dark[name].append(episode.index)

    try:
        maps = {name: reserve(temporary[name], (rows[-1], 3, *size)) for name in cameras}
        bar = tqdm(total=rows[-1] * len(cameras), unit=" frames", desc="decoding")
        with bar, ThreadPoolExecutor(workers) as pool:
            try:
                for future in [
                    pool.submit(decode, name, group) for (name, _), group in jobs.items()
                ]:
                    future.result()
            finally:
                stop.set()
        for name, key in cameras.items():
            maps[name].flush()
            dark[name] = [
                f"{dataset.root}: camera {key} is black throughout episode {n}"
                for n in sorted(dark[name])
            ]
            paths[name].with_suffix(".json").write_text(json.dumps(dark[name]))
            temporary[name].rename(paths[name])
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def reserve(path: Path, shape, dtype=np.uint8) -> np.memmap:
    """A new .npy file with all of its disk space taken: a disk that fills up later would kill us by SIGBUS."""
    try:
        array = np.lib.format.open_memmap(path, "w+", dtype, shape)
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}; free some space or set data.cache: none"
        ) from error
    return array
