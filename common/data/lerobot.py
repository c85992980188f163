"""LeRobot datasets v2.0, v2.1 and v3.0: the episode table, numbers from parquet, a check of files.

Frames are decoded in frames.py. Nothing in info.json is trusted but names, shapes, fps and path
templates.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from common.config import DataError, nearest

VERSIONS = ("v2.0", "v2.1", "v3.0")


def cache_folder() -> Path:
    """Where decoded frames and statistics of datasets are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bimanual-flow"


def fetch(root: str) -> Path:
    """The folder `root`, or that of a Hub id `org/name`, downloaded or found in the Hub's cache."""
    folder = Path(root).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", root):
        raise DataError(
            f"data.root: no folder {folder} (looked from {Path.cwd()}), and not a Hub id like "
            "'org/name'"
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repo_id=root, repo_type="dataset"))
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"data.root: {root!r} is no folder here, and the Hub gave no such dataset. Check the "
            "name and the network (private data: `hf auth login`), or give a folder\n    "
            f"({type(error).__name__}: {error})"
        ) from error


@contextlib.contextmanager
def reading(path: Path, place: str = "") -> Iterator[None]:
    """Turn an error while a file is read into a DataError that names the file."""
    try:
        yield
    except (
        pa.ArrowException,
        av.FFmpegError,
        OSError,
        IndexError,
        json.JSONDecodeError,
        UnicodeError,
    ) as error:
        hint = "missing, or cut short while it was copied or recorded?"
        raise DataError(
            f"{path}: cannot be read{place}; {hint} ({type(error).__name__}: {error})"
        ) from error


@dataclass
class Episode:
    """A row of the episode table. Row k of its data and its frame k belong to the time k / fps."""

    index: int  # the dataset's own number; need not start at 0 or be dense
    length: int  # frames
    data_path: Path
    videos: dict[str, tuple[Path, float]]  # camera key -> (mp4, start of the episode in it, s)
    tasks: list[str]

    def files(self) -> set[Path]:
        return {self.data_path, *(path for path, _ in self.videos.values())}


class LeRobotDataset:
    """Metadata of a folder: root, version, fps (Hz), robot_type, features (info.json's), and more:

    episodes: those that have files; absent: numbers of those without any (a partial download);
    cameras: keys of video and image features with files; content_key: hash of info.json and all
    files' names, sizes and times; values_key: hash of info.json and of the data files' content, the
    same for a copy.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        path = self.root / "meta/info.json"
        self._read_info(path)
        files = self._list_files()
        content = path.read_bytes() + repr(sorted(files.items())).encode()
        self.content_key = hashlib.sha256(content).hexdigest()[:32]
        existing = {self.root / name for name in files}
        listed = [self._episode(row, existing) for row in self._episode_rows()]
        self.episodes = [e for e in listed if existing & e.files()]
        self.absent = [e.index for e in listed if not existing & e.files()]
        if not self.episodes:
            raise DataError(
                f"{self.root}: no episodes ({len(self.absent)} without files); download or record "
                "some"
            )
        first = next((e for e in self.episodes if e.data_path.is_file()), self.episodes[0])
        with reading(first.data_path, f" (episode {first.index})"):
            self.schema = pq.read_schema(first.data_path)
        present = {key for key in self._keys("image") if key in self.schema.names}
        for episode in self.episodes:
            present |= {key for key, (path, _) in episode.videos.items() if path in existing}
        self.cameras = [key for key in self.features if key in present]
        for episode in self.episodes:  # a declared video feature may have no files at all
            episode.videos = {key: video for key, video in episode.videos.items() if key in present}

    def _read_info(self, path: Path) -> None:
        if not path.is_file():
            raise DataError(
                f"{path}: not found; data.root must be the top folder of a LeRobot dataset, with "
                "meta/, data/ and mostly videos/ in it, but has "
                f"{sorted(p.name for p in self.root.glob('*'))[:8] or 'nothing'}"
            )
        with reading(path):
            info = json.loads(path.read_text(encoding="utf-8"))
        self.version = info.get("codebase_version")
        if self.version not in VERSIONS:
            raise DataError(
                f"{path}: codebase_version is {self.version!r}, not one of {VERSIONS}; convert it "
                "with lerobot"
            )
        try:
            self.fps = float(info["fps"])
            self.features = dict(info["features"])
            self._kinds = {key: feature["dtype"] for key, feature in self.features.items()}
            self._data_template = info["data_path"]
            self._video_template = info.get("video_path") or "videos/"
            if self.fps <= 0:
                raise ValueError("fps must be above 0")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: needs 'fps', 'data_path', and 'features' with a dtype each: {error!r}"
            ) from error
        self.robot_type = info.get("robot_type")
        self._chunks_size = int(info.get("chunks_size") or 1000)

    def _keys(self, dtype: str) -> list[str]:
        return [key for key, kind in self._kinds.items() if kind == dtype]

    @cached_property
    def values_key(self) -> str:
        digest = hashlib.sha256((self.root / "meta/info.json").read_bytes())
        for path in dict.fromkeys(episode.data_path for episode in self.episodes):
            with reading(path):
                digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:32]

    def _list_files(self) -> dict[str, tuple[int, int]]:
        """Path below the root -> (size, time of change)."""
        folders = {"meta", "data", "videos"}
        folders |= {t.split("/")[0] for t in (self._data_template, self._video_template)}
        files = {}
        for folder in folders:
            for place, _, names in os.walk(self.root / folder, followlinks=True):
                for path in (os.path.join(place, name) for name in names):
                    if os.path.exists(path):  # not a Hub snapshot's link to a blob that is not here
                        status = os.stat(path)
                        name = os.path.relpath(path, self.root)
                        files[name] = (status.st_size, status.st_mtime_ns)
        return files

    def _episode_rows(self) -> list[dict]:
        rows = []
        if self.version == "v3.0":
            for path in sorted((self.root / "meta/episodes").glob("*/*.parquet")):
                with reading(path):
                    names = pq.read_schema(path).names
                    names = [name for name in names if not name.startswith("stats/")]
                    rows += pq.read_table(path, columns=names, partitioning=None).to_pylist()
        else:
            path = self.root / "meta/episodes.jsonl"
            with reading(path):
                lines = path.read_text(encoding="utf-8").splitlines()
                rows = [json.loads(line) for line in lines if line.strip()]
        for row in rows:
            if not all(isinstance(row.get(key), int) for key in ("episode_index", "length")):
                raise DataError(
                    f"{path}: every episode needs an integer 'episode_index' and 'length', found "
                    f"{row}"
                )
        return rows

    def _episode(self, row: dict, existing: set[Path]) -> Episode:
        videos = {}
        for key in self._keys("video"):
            part = f"videos/{key}"
            if row.get(f"{part}/chunk_index", 0) is not None:  # else it has no such camera
                path = self._path(row, part, self._video_template, existing, key)
                start = row.get(f"{part}/from_timestamp") or 0
                videos[key] = (path, float(start))
        tasks = row.get("tasks") or []
        return Episode(
            row["episode_index"],
            row["length"],
            self._path(row, "data", self._data_template, existing),
            videos,
            [tasks] if isinstance(tasks, str) else list(tasks),
        )

    def _path(self, row: dict, part: str, template: str, existing: set[Path], key="") -> Path:
        """An episode's data or video file."""
        number = row["episode_index"]
        chunk = row.get(f"{part}/chunk_index")
        if chunk is None:
            chunk = number // self._chunks_size
        values = {
            "chunk_index": chunk,
            "episode_chunk": chunk,
            "file_index": row.get(f"{part}/file_index", 0),
            "episode_index": number,
            "video_key": key,
        }
        path = self.root / template.format(**values)
        if path not in existing:
            # Some templates take the episode's number for the chunk's.
            template = re.sub(r"chunk-\{[^}]*\}", f"chunk-{chunk:03d}", template)
            other = self.root / template.format(**values)
            if other in existing:
                return other
        return path

    def select(self, episodes: list[int] | None) -> list[Episode]:
        """Episodes by number, in this order; None: all. Raises DataError for an unknown number."""
        if episodes is None:
            return self.episodes
        known = {episode.index: episode for episode in self.episodes}
        unknown = [number for number in episodes if number not in known]
        if unknown or not len(episodes):
            have = f"there are {len(known)}, from {min(known)} to {max(known)}"
            raise DataError(
                f"{self.root}: data.episodes: no episode {unknown[:8] or 'given'}; {have}"
            )
        return [known[number] for number in episodes]

    def require_cameras(self, keys: Iterable[str]) -> None:
        """Raises DataError, with the names to choose from, if a key is no camera of the dataset."""
        for key in keys:
            if key in self.cameras:
                continue
            found = "is not in the dataset"
            if key in self.features:
                found = "is declared in info.json but has no files"
            available = "no cameras at all"
            if self.cameras:
                example = f"data.cameras='{{head: {self.cameras[0]}}}'"
                available = f"{', '.join(self.cameras)}; for example {example}"
            raise DataError(
                f"{self.root}: data.cameras: {key!r} {found}{nearest(key, self.cameras)}\n    "
                f"available: {available}"
            )

    def require_columns(self, keys: Iterable[str], setting: str = "") -> None:
        """Raises DataError, with the names to choose from, if a key is no numeric column.

        setting: the key of train.yaml that names them.
        """
        place = f"{setting}: " if setting else ""
        numeric = [field.name for field in self.schema if is_numeric(field.type)]
        for key in keys:
            if key not in numeric:
                raise DataError(
                    f"{self.root}: {place}no numeric column {key!r}{nearest(key, numeric)}\n    "
                    f"available: {', '.join(numeric)}"
                )

    def columns(self, keys: list[str], episodes: list[int] | None = None) -> dict[str, np.ndarray]:
        """key -> float32 (frames, dim): all rows of the chosen episodes, in the order given."""
        self.require_columns(keys)
        chosen = self.select(episodes)
        found = {}
        for group in by_file(chosen):
            for episode, arrays in self.read(keys, group):
                found[episode.index] = arrays
        return {key: np.concatenate([found[e.index][key] for e in chosen]) for key in keys}

    def read(
        self, keys: list[str], group: list[Episode]
    ) -> Iterator[tuple[Episode, dict[str, np.ndarray]]]:
        """(episode, {key: float32 (length, dim)}) of episodes in one file. Raises DataError."""
        path = group[0].data_path
        if self.version == "v3.0":
            table = self._load(group[0], [*keys, "episode_index"])
            owner = table["episode_index"].to_numpy()
        else:
            table = self._load(group[0], keys)
            owner = np.full(table.num_rows, group[0].index)
        arrays = {key: dense(table[key], f"{path}: {key}") for key in keys}
        order = np.argsort(owner, kind="stable")
        for episode in group:
            bounds = [episode.index, episode.index + 1]
            start, end = np.searchsorted(owner, bounds, sorter=order)
            if end - start != episode.length:
                raise DataError(
                    f"{path}: episode {episode.index} has {end - start} rows, declared are "
                    f"{episode.length}"
                )
            rows = order[start:end]
            yield episode, {key: array[rows] for key, array in arrays.items()}

    def pictures(self, episode: Episode, key: str) -> list[bytes]:
        """Encoded pictures (mostly PNG) of an image-dtype camera, one a frame. Raises DataError."""
        filters = None
        if self.version == "v3.0":
            filters = [("episode_index", "=", episode.index)]
        rows = self._load(episode, [key], filters)[key].to_pylist()
        cells = [row.get("bytes") if isinstance(row, dict) else row for row in rows]
        pictures = [cell for cell in cells if isinstance(cell, bytes)]
        if not len(pictures) == len(rows) == episode.length:
            raise DataError(
                f"{episode.data_path}: episode {episode.index} has {len(pictures)} pictures in "
                f"{len(rows)} rows of {key}, declared are {episode.length}"
            )
        return pictures

    def _load(self, episode: Episode, keys, filters=None) -> pa.Table:
        path = episode.data_path
        with reading(path, f" (episode {episode.index})"):
            names = pq.read_schema(path).names
            missing = [key for key in keys if key not in names]
            if missing:
                raise DataError(
                    f"{path}: episode {episode.index}: no column {missing[0]!r}; found "
                    f"{', '.join(names)}"
                )
            columns = list(dict.fromkeys(keys))
            return pq.read_table(path, columns=columns, filters=filters, partitioning=None)


def check_files(
    dataset: LeRobotDataset,
    cameras: list[str],
    low_dim_keys: list[str],
    episodes: list[int] | None = None,
) -> list[str]:
    """Check every file of the chosen episodes without decoding videos; -> warnings.

    Raises one DataError that lists all problems, each with its file and episode: files missing or
    cut short, row or frame counts unlike the episode table, widths unlike info.json, non-finite
    numbers, gaps in frame_index.
    """
    dataset.require_cameras(cameras)
    dataset.require_columns(low_dim_keys)
    chosen = dataset.select(episodes)
    warnings = []
    if dataset.absent:
        warnings.append(
            f"{dataset.root}: no files for the listed episodes {dataset.absent}: left out"
        )
    unused = [key for key in dataset.cameras if key not in cameras]
    if unused:
        warnings.append(f"{dataset.root}: cameras not used: {', '.join(unused)}")
    problems = check_rows(dataset, low_dim_keys, chosen, warnings)
    problems += check_videos(dataset, cameras, chosen, warnings)
    if problems:
        shown = problems[:12]
        if len(problems) > 12:
            shown.append(f"... and {len(problems) - 12} more")
        advice = "    Download or record these again, or list only the good ones in data.episodes"
        raise DataError("\n".join([*shown, advice]))
    return warnings


def check_rows(
    dataset: LeRobotDataset, keys: list[str], chosen: list[Episode], warnings: list[str]
) -> list[str]:
    """Problems of the rows of episodes; adds a warning if timestamps are not k / fps."""
    problems = []
    drifts = [(0.0, 0)]  # largest difference of a timestamp from k / fps in frames, episode
    extra = [key for key in ("frame_index", "timestamp") if key in dataset.schema.names]
    for group in by_file(chosen):
        try:
            for episode, arrays in dataset.read([*keys, *extra], group):
                place = f"{episode.data_path}: episode {episode.index}"
                for key in keys:
                    shape = dataset.features.get(key, {}).get("shape")
                    problems += check_width(place, key, arrays[key], shape)
                    problems += check_finite(place, key, arrays[key])
                steps = np.arange(episode.length)
                if "frame_index" in arrays:
                    problems += check_frame_index(place, arrays["frame_index"][:, 0], steps)
                if "timestamp" in arrays:
                    time = arrays["timestamp"][:, 0]
                    frames = (time - time[:1]) * dataset.fps
                    drifts.append((np.abs(frames - steps).max(initial=0), episode.index))
        except DataError as error:
            problems.append(str(error))
    drift, number = max(drifts)
    if drift > 0.6:
        warnings.append(
            f"{dataset.root}: timestamps are up to {drift:.1f} frames off k / fps (episode "
            f"{number}); k / fps is used"
        )
    return problems


def check_width(place: str, key: str, values: np.ndarray, shape: Sequence[int] | None) -> list[str]:
    """values (frames, dim) must be as wide as info.json's shape says, if it does."""
    width = values.shape[1]
    if shape is None or width == np.prod(shape, dtype=int):
        return []
    return [f"{place}: {key} has {width} numbers a row, info.json says {shape}"]


def check_finite(place: str, key: str, values: np.ndarray) -> list[str]:
    bad = np.argwhere(~np.isfinite(values))
    if not len(bad):
        return []
    frame, column = bad[0]
    value = values[frame, column]
    return [f"{place}, frame {frame}: {key}[{column}] is {value} ({len(bad)} such values)"]


def check_frame_index(place: str, frame_index: np.ndarray, steps: np.ndarray) -> list[str]:
    if np.array_equal(frame_index, steps):
        return []
    return [f"{place}: frame_index does not run from 0 to {len(steps) - 1} without gaps"]


def check_videos(
    dataset: LeRobotDataset, cameras: list[str], chosen: list[Episode], warnings: list[str]
) -> list[str]:
    """Problems of the videos of episodes; adds a warning if a v2 file has more frames than rows."""
    problems = []
    needed: dict[Path, list[tuple[int, int]]] = {}  # mp4 -> (frames it must hold, episode)
    for episode in chosen:
        for key in cameras:
            if key in episode.videos:
                path, start = episode.videos[key]
                end = round(start * dataset.fps) + episode.length
                needed.setdefault(path, []).append((end, episode.index))
            elif dataset.features[key]["dtype"] == "video":
                problems.append(f"{dataset.root}: episode {episode.index} has no video of {key}")
    with ThreadPoolExecutor(8) as pool:  # opening is mostly waiting for the disk
        counts = list(pool.map(count_frames, needed))
    for (path, ends), frames in zip(needed.items(), counts, strict=True):
        last, episode = max(ends)
        if isinstance(frames, DataError):
            numbers = ", ".join(str(number) for _, number in ends[:8])
            problems.append(f"{frames} (episode {numbers})")
        elif frames < last:
            end, episode = min(pair for pair in ends if pair[0] > frames)
            problems.append(
                f"{path}: has {frames} frames, episode {episode} needs {end} by the episode table"
            )
        elif frames > last and dataset.version != "v3.0":
            warnings.append(
                f"{path}: {frames} frames for {last} rows (episode {episode}); row k is frame k"
            )
    return problems


def count_frames(path: Path) -> int | DataError:
    """Frames in a video by its container, or the error if it is damaged. Nothing is decoded."""
    try:
        with reading(path), av.open(path) as container:
            stream = container.streams.video[0]
            size = path.stat().st_size
            end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
            if end > size:  # its index comes first and is whole
                raise DataError(f"{path}: cut short: {size} bytes, its frames need {end}")
            return stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    except DataError as error:
        return error


def by_file(episodes: list[Episode]) -> list[list[Episode]]:
    groups: dict[Path, list[Episode]] = {}
    for episode in episodes:
        groups.setdefault(episode.data_path, []).append(episode)
    return list(groups.values())


LISTS = (pa.ListType, pa.LargeListType, pa.FixedSizeListType)


def is_numeric(kind: pa.DataType) -> bool:
    while isinstance(kind, LISTS):
        kind = kind.value_type
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def dense(column: pa.ChunkedArray, place: str) -> np.ndarray:
    """A scalar or nested list column -> float32 (rows, dim). Raises DataError if widths differ."""
    rows = len(column)
    while isinstance(column.type, LISTS):
        widths = pc.unique(pc.list_value_length(column))
        if len(widths) > 1:
            raise DataError(
                f"{place}: rows of different widths; every row must have the same number of values"
            )
        column = pc.list_flatten(column)
    return column.to_numpy().astype(np.float32).reshape(rows, -1 if rows else 1)
