"""Camera frames by row: decoded once into a memory map (FrameCache), or from videos (VideoFrames).

Rows count frames over the chosen episodes, one episode after the other. Both give bit-equal frames.
"""

import hashlib
import json
import os
import shutil
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import av
import numpy as np

from common.config import DataError
from common.data.files import locked, reading
from common.data.images import decoded, resize
from common.data.lerobot import LeRobotDataset
from common.data.metadata import Episode
from common.files import writing
from common.progress import progress

RESIZE = "bilinear"  # part of the cache's key
OPEN_FILES = 32
BLACK = 16  # of 255; a camera that never gets brighter in an episode was covered or unplugged
FREE_SPACE = "free some space or set data.cache: none"
ADVICE = (
    "set data.cache: none (decodes while training), or use fewer episodes or a smaller "
    "data.image_size"
)


def video_stream(container: av.container.InputContainer, path: Path) -> av.VideoStream:
    """The first video stream of a file. Raises DataError if there is none that shows pictures."""
    if not container.streams.video:
        kinds = ", ".join(sorted({stream.type for stream in container.streams}))
        raise DataError(f"{path}: has no video in it, only {kinds or 'a header'}")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise DataError(f"{path}: its video is of a codec that cannot be decoded")
    refuse_deep_gray(stream.codec_context.pix_fmt, path)
    return stream


def timed_packets(container: av.container.InputContainer, path: Path) -> list[av.Packet]:
    """The packets of the first video stream. Raises DataError if they carry no times."""
    packets = [packet for packet in container.demux(video=0) if packet.size]
    if any(packet.pts is None for packet in packets):
        raise DataError(f"{path}: its frames carry no times (pts); write it as mp4 again")
    return packets


def refuse_deep_gray(pixel_format: str | None, path: Path) -> None:
    """Raises DataError for gray of more than 8 bits: only depth maps are stored so in videos."""
    if pixel_format and pixel_format.startswith("gray") and pixel_format != "gray":
        raise DataError(
            f"{path}: holds values of format {pixel_format}, as depth maps have, and no pictures; "
            "leave it out of data.cameras"
        )


class Video:
    """Frame k of a video file, in order of presentation; consecutive frames need no seeking."""

    def __init__(self, path: Path, threads: int = 1):
        self.path = path
        with reading(path):
            self.container = av.open(path)
            # The container has reference cycles: without this, files would stay open for long.
            weakref.finalize(self, self.container.close)
            self.stream = video_stream(self.container, path)
            # Edit lists mark packets that must not be shown; the decoder drops them as well.
            packets = [p for p in timed_packets(self.container, path) if not p.is_discard]
        key_packets = [p for p in packets if p.is_keyframe] or packets[:1]
        keys = [(p.pts, p.pts if p.dts is None else p.dts) for p in key_packets]
        keys = np.array(sorted(keys)).reshape(-1, 2)
        self.stream.thread_type = "AUTO"
        self.stream.codec_context.thread_count = threads
        self.times = np.sort(np.array([p.pts for p in packets]))
        self.key_frames = np.searchsorted(self.times, keys[:, 0])
        self.key_dts = keys[:, 1].tolist()
        self.position = len(self.times)
        self.image: np.ndarray  # at this position
        self.decoded = iter(())
        self.converter = av.video.reformatter.VideoReformatter()

    def frame(self, k: int) -> np.ndarray:
        """RGB uint8 (h, w, 3). Raises DataError if the file has no such frame."""
        count = len(self.times)
        if k >= count:
            raise DataError(
                f"{self.path}: has {count} frames, frame {k} is needed by the episode table"
            )
        if k == self.position:
            return self.image
        key = max(int(np.searchsorted(self.key_frames, k, side="right")) - 1, 0)
        with reading(self.path, f" at frame {k}"):
            if k <= self.position or self.key_frames[key] > self.position + 1:
                self.container.seek(self.key_dts[key], stream=self.stream)
                self.decoded = self.container.decode(self.stream)
            frame = next((frame for frame in self.decoded if frame.pts >= self.times[k]), None)
        if frame is None or frame.pts != self.times[k]:
            raise DataError(
                f"{self.path}: frame {k} of {count} cannot be decoded; is the file damaged?"
            )
        refuse_deep_gray(frame.format.name, self.path)
        # By default, it starts threads for each frame, and a forked child would hang joining them.
        self.image = self.converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        self.position = k
        return self.image


class VideoFrames:
    """Frames decoded when asked for (`data.cache: none`). Each process keeps up to OPEN_FILES open.

    cameras: name -> the dataset's key; size: (h, w); episodes: numbers, None for all; threads: for
    each decoder.
    """

    def __init__(
        self,
        dataset: LeRobotDataset,
        cameras: dict[str, str],
        size: Sequence[int],
        episodes: list[int] | None,
        threads: int = 1,
    ):
        dataset.require_cameras(cameras.values())
        self.dataset = dataset
        self.cameras = dict(cameras)
        self.size = tuple(size)
        self.threads = threads
        self.episodes = dataset.select(episodes)
        self.ends = np.cumsum([episode.length for episode in self.episodes])
        self.files = OrderedDict()  # the least recently used comes first
        self.process = os.getpid()

    def __getstate__(self):
        return self.__dict__ | {"files": OrderedDict()}  # decoders don't travel to other processes

    def gather(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Rows of any shape -> uint8 (*rows.shape, 3, h, w)."""
        rows = np.asarray(rows)
        flat = rows.ravel()
        images = np.empty((rows.size, 3, *self.size), np.uint8)
        for i in np.argsort(flat, kind="stable"):
            images[i] = self.frame(name, int(flat[i]))
        return images.reshape(*rows.shape, 3, *self.size)

    def frame(self, name: str, row: int) -> np.ndarray:
        """uint8 (3, h, w)."""
        number = int(np.searchsorted(self.ends, row, side="right"))
        episode = self.episodes[number]
        k = row - int(self.ends[number]) + episode.length
        key = self.cameras[name]
        source = self._source(episode, key)
        if isinstance(source, Video):
            start = round(episode.videos[key].start * self.dataset.fps)
            image = source.frame(start + k)
        else:
            place = f"{episode.data_path}: episode {episode.index}, frame {k}"
            image = decoded(source[k], key, place)
        return resize(image, self.size).transpose(2, 0, 1)

    def _source(self, episode: Episode, key: str) -> Video | list[bytes]:
        """The open video of a camera, or the pictures of one without videos."""
        if self.process != os.getpid():
            # After a fork, the parent's decoders share their file positions with ours.
            self.files = OrderedDict()
            self.process = os.getpid()
        path = episode.videos[key].path if key in episode.videos else None
        place = path or (episode.index, key)
        if place not in self.files:
            if len(self.files) >= OPEN_FILES:
                self.files.popitem(last=False)
            if path:
                self.files[place] = Video(path, self.threads)
            else:
                self.files[place] = self.dataset.pictures(episode, key)
        self.files.move_to_end(place)
        return self.files[place]


class ArrayFiles:
    """Arrays by name: read-only memory maps of .npy files. Pickling keeps only the paths."""

    def __init__(self, paths: dict[str, Path]):
        self.paths = paths
        self.arrays = {}
        for name, path in paths.items():
            self.arrays[name] = np.load(path, mmap_mode="r").view(np.ndarray)

    def __reduce__(self):
        return type(self), (self.paths,)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]


class FrameCache(ArrayFiles):
    """cache[name]: uint8 (frames, 3, h, w)."""

    @property
    def warnings(self) -> list[str]:
        """A line for each episode and camera that is black throughout."""
        files = [path.with_suffix(".json") for path in self.paths.values()]
        return [text for file in files for text in json.loads(file.read_text())]

    def gather(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Rows of any shape -> uint8 (*rows.shape, 3, h, w)."""
        return self[name][np.asarray(rows)]

    @classmethod
    def open(
        cls,
        dataset: LeRobotDataset,
        cameras: dict[str, str],
        size: Sequence[int],
        episodes: list[int] | None,
        folder: Path,
        max_gb: float,
        dry_run: bool = False,
    ) -> "FrameCache | None":
        """The cache in `folder`, decoded now if it isn't there; other processes wait for it.

        dry_run: only print the space that it takes; None if it isn't there. Raises DataError as
        plan() does.
        """
        paths, total = cls.plan(dataset, cameras, size, episodes, folder, max_gb)
        numbers = [episode.index for episode in dataset.select(episodes)]
        if all(path.exists() for path in paths.values()):
            return cls(paths)
        with locked(folder / f"{dataset.content_key}.lock"):
            # By path, because two names may mean one camera.
            missing = {path: name for name, path in paths.items() if not path.exists()}
            if missing:
                for left_over in folder.glob(f"{dataset.content_key}-*.tmp"):
                    left_over.unlink()
                names = list(missing.values())
                print(f"{total}: {', '.join(names)} decoded once, into {folder}", flush=True)
                if dry_run:
                    return None
                build(dataset, {name: cameras[name] for name in names}, size, numbers, paths)
        cache = cls(paths)
        for text in cache.warnings if missing else ():
            print(f"warning: {text}", flush=True)
        return cache

    @classmethod
    def plan(
        cls,
        dataset: LeRobotDataset,
        cameras: dict[str, str],
        size: Sequence[int],
        episodes: list[int] | None,
        folder: Path,
        max_gb: float,
    ) -> tuple[dict[str, Path], str]:
        """Camera -> its file in `folder`; the space that all files take, in words.

        Raises DataError if they take more than max_gb (10^9 bytes), or the missing ones more than
        the disk has left.
        """
        dataset.require_cameras(cameras.values())
        chosen = dataset.select(episodes)
        numbers = [episode.index for episode in chosen]
        paths = {}
        image_keys = dataset.info.keys("image")
        for name, key in cameras.items():
            form = f"{RESIZE}, as shown" if key in image_keys else RESIZE
            content = repr([key, list(size), form, numbers])
            digest = hashlib.sha256(content.encode()).hexdigest()[:16]
            paths[name] = folder / f"{dataset.content_key}-{digest}.npy"
        frames = sum(episode.length for episode in chosen)
        camera_gb = frames * 3 * size[0] * size[1] / 1e9
        gb = camera_gb * len(cameras)
        several = f"{len(cameras)} cameras" if len(cameras) != 1 else "one camera"
        total = f"{frames} frames of {several} at {size[0]} x {size[1]} take {gb:.2f} GB"
        if gb > max_gb:
            raise DataError(f"{total}, above data.cache_max_gb: {max_gb:g}; raise that, {ADVICE}")
        missing = {path for path in paths.values() if not path.exists()}
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        # What another process decodes now, or left, is either ours or makes room.
        unfinished = occupied(folder, f"{dataset.content_key}-*.tmp")
        free = (shutil.disk_usage(existing).free + unfinished) / 1e9
        if camera_gb * len(missing) > free:
            raise DataError(
                f"{folder}: {total}, but {free:.2f} GB are free; {ADVICE}, or move XDG_CACHE_HOME"
            )
        return paths, total


def build(
    dataset: LeRobotDataset,
    cameras: dict[str, str],
    size: Sequence[int],
    numbers: list[int],
    paths: dict[str, Path],
) -> None:
    """Decode every file once, several at a time, into `*.tmp`; rename these when all is done."""
    episodes = dataset.select(numbers)
    ends = np.cumsum([episode.length for episode in episodes]).tolist()
    files = {}  # (camera, file): [(start in the file, first row, episode)]
    for name, key in cameras.items():
        for episode, end in zip(episodes, ends, strict=True):
            path, start, _ = episode.videos.get(key, (episode.index, 0.0, None))
            segment = (start, end - episode.length, episode)
            files.setdefault((name, path), []).append(segment)
    cores = os.cpu_count() or 1
    workers = min(4, cores, len(files))
    threads = -(-cores // workers)
    stop = threading.Event()
    black = {name: [] for name in cameras}
    unfinished = {name: paths[name].with_suffix(".tmp") for name in cameras}

    def decode(name, segments):
        source = VideoFrames(dataset, cameras, size, numbers, threads)
        for _, first, episode in sorted(segments, key=lambda segment: segment[:2]):
            brightest = 0
            for row in range(first, first + episode.length):
                if stop.is_set():
                    return
                image = source.frame(name, row)
                arrays[name][row] = image
                brightest = max(brightest, int(image.max()))
                bar.update()
            if brightest < BLACK:
                black[name].append(episode.index)

    try:
        arrays = {name: reserve(unfinished[name], (ends[-1], 3, *size)) for name in cameras}
        bar = progress(total=ends[-1] * len(cameras), unit=" frames", desc="decoding")
        with bar, ThreadPoolExecutor(workers) as pool:
            try:
                decoded = [pool.submit(decode, name, files[name, path]) for name, path in files]
                for future in decoded:
                    future.result()
            finally:
                stop.set()
        for name, key in cameras.items():
            arrays[name].flush()
            warnings = [
                f"{dataset.root}: camera {key} is black throughout episode {number}"
                for number in sorted(black[name])
            ]
            note = paths[name].with_suffix(".json")
            with writing(note, FREE_SPACE):
                note.write_text(json.dumps(warnings))
                unfinished[name].rename(paths[name])
    finally:
        for name, path in unfinished.items():
            path.unlink(missing_ok=True)
            if not paths[name].exists():
                paths[name].with_suffix(".json").unlink(missing_ok=True)


def occupied(folder: Path, pattern: str) -> int:
    """Bytes of the files in a folder whose names match; one that goes meanwhile counts nothing."""
    total = 0
    for file in folder.glob(pattern):
        with suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def reserve(path: Path, shape: tuple[int, ...], dtype: type = np.uint8) -> np.memmap:
    """A new .npy file with its disk space taken: on a disk that is full later, SIGBUS kills us."""
    with writing(path, FREE_SPACE):
        array = np.lib.format.open_memmap(path, "w+", dtype, shape)
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
