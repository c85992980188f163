"""Reads LeRobot datasets v2.0, v2.1 and v3.0: one episode table for all, numbers from parquet, a check of every file.

Frames are decoded in frames.py. Nothing in info.json is trusted but names, shapes, fps and path templates.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
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
    """A dataset's folder: `root` itself, or a Hub id `org/name` downloaded (or found in the Hub's cache)."""
    folder = Path(root).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(root)):
        raise DataError(
            f"data.root: no folder {folder} (looked from {Path.cwd()}), and not a Hub id like 'org/name'"
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repo_id=str(root), repo_type="dataset"))
    except (OSError, ValueError, RuntimeError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise DataError(
            f"data.root: {root!r} is no folder here, and the Hub gave no such dataset. Check the name and the network "
            f"(private data: `hf auth login`), or give a folder\n    ({type(error).__name__}: {error})"
        ) from error


@contextlib.contextmanager
def reading(path, note=""):
    """What goes wrong while a file is read becomes a DataError that names it."""
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
            f"{path}: cannot be read{note}; {hint} ({type(error).__name__}: {error})"
        ) from error


@dataclass
class Episode:
    """One row of the episode table. Its row k of the parquet file and its frame k belong to the time k / fps."""

    index: int  # the dataset's own number; need not start at 0 or be dense
    length: int  # frames
    data_path: Path
    videos: dict[
        str, tuple[Path, float]
    ]  # camera key -> (mp4, start of the episode in it, s); none for image columns
    tasks: list[str]


class LeRobotDataset:
    """The metadata of one folder: root, version, fps (Hz), robot_type, features (info.json's), and more:

    episodes: those that have files; absent: numbers of those without any (a partial download); cameras: keys of video
    and image features with files; content_key: hash of info.json and all files' names, sizes and times; values_key:
    hash of info.json and of what the data files hold, which a copy has, too.
    """

    def __init__(self, root):
        self.root = Path(root)
        path = self.root / "meta/info.json"
        if not path.is_file():
            raise DataError(
                f"{path}: not found; data.root must be the top folder of a LeRobot dataset, with meta/, data/ and "
                f"mostly videos/ in it, but has {sorted(p.name for p in self.root.glob('*'))[:8] or 'nothing'}"
            )
        with reading(path):
            info = json.loads(path.read_text(encoding="utf-8"))
        found = info.get("codebase_version")
        if found not in VERSIONS:
            raise DataError(
                f"{path}: codebase_version is {found!r}, not one of {VERSIONS}; convert it with lerobot"
            )
        try:
            self.version, self.fps, self.features = (
                found,
                float(info["fps"]),
                dict(info["features"]),
            )
            kinds = {key: feature["dtype"] for key, feature in self.features.items()}
            self._templates = [info["data_path"], info.get("video_path") or "videos/"]
            if self.fps <= 0:
                raise ValueError("fps must be above 0")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: needs 'fps', 'data_path', and 'features' with a dtype each: {error!r}"
            ) from error
        self.robot_type, self._chunks_size = (
            info.get("robot_type"),
            int(info.get("chunks_size") or 1000),
        )
        files = self._list_files()
        self.content_key = hashlib.sha256(
            path.read_bytes() + repr(sorted(files.items())).encode()
        ).hexdigest()[:32]

        self.episodes: list[Episode] = []
        self.absent: list[int] = []
        present = set()  # a declared video feature may have no files at all
        for row in self._episode_rows():
            data = self._place(row, 0, files)
            videos = {
                key: self._place(row, 1, files, key) for key in kinds if kinds[key] == "video"
            }
            if not files.keys() & {data, *videos.values()}:
                self.absent.append(row["episode_index"])
                continue
            present |= {key for key, video in videos.items() if video in files}
            starts = {k: float(row.get(f"videos/{k}/from_timestamp") or 0) for k in videos}
            videos = {k: (self.root / video, starts[k]) for k, video in videos.items() if video}
            tasks = (
                [row["tasks"]]
                if isinstance(row.get("tasks"), str)
                else list(row.get("tasks") or [])
            )
            self.episodes.append(
                Episode(row["episode_index"], row["length"], self.root / data, videos, tasks)
            )
        if not self.episodes:
            raise DataError(
                f"{self.root}: no episodes ({len(self.absent)} without files); download or record some"
            )
        first = next((e for e in self.episodes if e.data_path.is_file()), self.episodes[0])
        with reading(first.data_path, f" (episode {first.index})"):
            self._schema = pq.read_schema(first.data_path)
        present |= {key for key in kinds if kinds[key] == "image" and key in self._schema.names}
        self.cameras = [key for key in kinds if key in present]
        for episode in self.episodes:
            episode.videos = {key: video for key, video in episode.videos.items() if key in present}

    @cached_property
    def values_key(self) -> str:
        digest = hashlib.sha256((self.root / "meta/info.json").read_bytes())
        for path in dict.fromkeys(episode.data_path for episode in self.episodes):
            with reading(path):
                digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:32]

    def _list_files(self) -> dict[str, tuple[int, int]]:
        """Path below the root -> (size, time of change)."""
        folders = {
            "meta",
            "data",
            "videos",
            *(template.split("/")[0] for template in self._templates),
        }
        walks = (os.walk(self.root / folder, followlinks=True) for folder in folders)
        paths = (
            os.path.join(place, name)
            for walk in walks
            for place, _, names in walk
            for name in names
        )
        # A Hub snapshot may hold links to blobs that were not downloaded.
        found = {
            os.path.relpath(path, self.root): os.stat(path)
            for path in paths
            if os.path.exists(path)
        }
        return {path: (status.st_size, status.st_mtime_ns) for path, status in found.items()}

    def _episode_rows(self) -> list[dict]:
        if self.version != "v3.0":
            path = self.root / "meta/episodes.jsonl"
            with reading(path):
                rows = [
                    json.loads(line)
                    for line in path.read_text(encoding="utf-8").splitlines()
                    if line.strip()
                ]
        else:
            rows = []
            for path in sorted((self.root / "meta/episodes").glob("*/*.parquet")):
                with reading(path):
                    names = [
                        name for name in pq.read_schema(path).names if not name.startswith("stats/")
                    ]
                    rows += pq.read_table(path, columns=names, partitioning=None).to_pylist()
        for row in rows:
            if not isinstance(row.get("episode_index"), int) or not isinstance(
                row.get("length"), int
            ):
                raise DataError(
                    f"{path}: every episode needs an integer 'episode_index' and 'length', found {row}"
                )
        return rows

    def _place(self, row, kind, files, key="") -> str | None:
        """Path below the root of an episode's data (kind 0) or video file (kind 1)."""
        part = f"videos/{key}" if kind else "data"
        chunk = row.get(f"{part}/chunk_index", row["episode_index"] // self._chunks_size)
        if chunk is None:
            return None  # v3.0: this episode has no such camera
        where = {
            "chunk_index": chunk,
            "episode_chunk": chunk,
            "file_index": row.get(f"{part}/file_index", 0),
        }
        where |= {"episode_index": row["episode_index"], "video_key": key}
        # Some templates take the episode's number for the chunk's.
        numbered = re.sub(r"chunk-\{[^}]*\}", f"chunk-{chunk:03d}", self._templates[kind])
        path, other = self._templates[kind].format(**where), numbered.format(**where)
        return other if other in files and path not in files else path

    def select(self, episodes: list[int] | None) -> list[Episode]:
        """The episodes of these numbers in this order; None: all. Raises DataError for an unknown number."""
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

    def require_cameras(self, keys) -> None:
        """Raises DataError, with the names to choose from, if a key is no camera of the dataset."""
        for key in (key for key in keys if key not in self.cameras):
            found = (
                "is declared in info.json but has no files"
                if key in self.features
                else "is not in the dataset"
            )
            example = (
                f"; for example data.cameras='{{head: {self.cameras[0]}}}'" if self.cameras else ""
            )
            raise DataError(
                f"{self.root}: data.cameras: {key!r} {found}{nearest(key, self.cameras)}\n"
                f"    available: {', '.join(self.cameras) or 'no cameras at all'}{example}"
            )

    def require_columns(self, keys) -> None:
        """Raises DataError, with the names to choose from, if a key is no numeric column of the parquet files."""
        numeric = [field.name for field in self._schema if is_numeric(field.type)]
        for key in (key for key in keys if key not in numeric):
            names = f"{nearest(key, numeric)}\n    available: {', '.join(numeric)}"
            raise DataError(f"{self.root}: no numeric column {key!r}{names}")

    def columns(self, keys, episodes: list[int] | None = None) -> dict[str, np.ndarray]:
        """key -> float32 (frames, dim): all rows of the chosen episodes, in the order given."""
        self.require_columns(keys)
        chosen = self.select(episodes)
        parts = {
            e.index: arrays for group in by_file(chosen) for e, arrays in self.read(keys, group)
        }
        return {key: np.concatenate([parts[e.index][key] for e in chosen]) for key in keys}

    def read(self, keys, group: list[Episode]) -> Iterator[tuple[Episode, dict[str, np.ndarray]]]:
        """(episode, {key: float32 (length, dim)}) for episodes that share a parquet file. Raises DataError."""
        path, shared = group[0].data_path, self.version == "v3.0"
        table = self._load(group[0], [*keys, "episode_index"] if shared else keys)
        arrays = {key: dense(table[key], f"{path}: {key}") for key in keys}
        owner = (
            table["episode_index"].to_numpy() if shared else np.full(table.num_rows, group[0].index)
        )
        order = np.argsort(owner, kind="stable")
        for episode in group:
            rows = order[
                slice(*np.searchsorted(owner, [episode.index, episode.index + 1], sorter=order))
            ]
            if len(rows) != episode.length:
                raise DataError(
                    f"{path}: episode {episode.index} has {len(rows)} rows, declared are {episode.length}"
                )
            yield episode, {key: array[rows] for key, array in arrays.items()}

    def pictures(self, episode: Episode, key: str) -> list[bytes]:
        """The encoded pictures (PNG, mostly) of an image-dtype camera, one a frame. Raises DataError."""
        table = self._load(
            episode,
            [key],
            [("episode_index", "=", episode.index)] if self.version == "v3.0" else None,
        )
        cells = [
            cell.get("bytes") if isinstance(cell, dict) else cell for cell in table[key].to_pylist()
        ]
        found = sum(isinstance(cell, bytes) for cell in cells)
        if not found == len(cells) == episode.length:
            counts = (
                f"{found} pictures in {len(cells)} rows of {key}, declared are {episode.length}"
            )
            raise DataError(f"{episode.data_path}: episode {episode.index} has {counts}")
        return cells

    def _load(self, episode: Episode, keys, filters=None) -> pa.Table:
        path = episode.data_path
        with reading(path, f" (episode {episode.index})"):
            names = pq.read_schema(path).names
            if missing := [key for key in keys if key not in names]:
                raise DataError(
                    f"{path}: episode {episode.index}: no column {missing[0]!r}; found {', '.join(names)}"
                )
            return pq.read_table(
                path, columns=list(dict.fromkeys(keys)), filters=filters, partitioning=None
            )


def check(
    dataset: LeRobotDataset, cameras: list[str], low_dim_keys: list[str], episodes=None
) -> list[str]:
    """Look at every file of the chosen episodes without decoding; -> warnings.

    Raises one DataError that lists what is wrong, each line with its file and episode: files missing or cut short,
    row or frame counts unlike the episode table, widths unlike info.json, non-finite numbers, gaps in frame_index.
    """
    dataset.require_cameras(cameras)
    dataset.require_columns(low_dim_keys)
    chosen = dataset.select(episodes)
    problems, warnings, drift = [], [], (0.0, 0)
    if dataset.absent:
        warnings.append(
            f"{dataset.root}: no files for the listed episodes {dataset.absent}: left out"
        )
    if unused := [key for key in dataset.cameras if key not in cameras]:
        warnings.append(f"{dataset.root}: cameras not used: {', '.join(unused)}")
    extra = [key for key in ("frame_index", "timestamp") if key in dataset._schema.names]
    for group in by_file(chosen):
        try:
            for episode, arrays in dataset.read([*low_dim_keys, *extra], group):
                place = f"{episode.data_path}: episode {episode.index}"
                for key in low_dim_keys:
                    width, shape = arrays[key].shape[1], dataset.features.get(key, {}).get("shape")
                    if shape is not None and width != np.prod(shape, dtype=int):
                        problems.append(
                            f"{place}: {key} has {width} numbers a row, info.json says {shape}"
                        )
                    if len(bad := np.argwhere(~np.isfinite(arrays[key]))):
                        (frame, column), value = bad[0], arrays[key][tuple(bad[0])]
                        problems.append(
                            f"{place}, frame {frame}: {key}[{column}] is {value} ({len(bad)} such values)"
                        )
                steps = np.arange(episode.length)
                if "frame_index" in arrays and not np.array_equal(
                    arrays["frame_index"][:, 0], steps
                ):
                    problems.append(
                        f"{place}: frame_index does not run from 0 to {episode.length - 1} without gaps"
                    )
                if "timestamp" in arrays:
                    time = (arrays["timestamp"] - arrays["timestamp"][:1])[:, 0]
                    drift = max(
                        drift, (np.abs(time * dataset.fps - steps).max(initial=0), episode.index)
                    )
        except DataError as error:
            problems.append(str(error))
    if drift[0] > 0.6:
        text = f"timestamps are up to {drift[0]:.1f} frames off k / fps (episode {drift[1]}); k / fps is used"
        warnings.append(f"{dataset.root}: {text}")

    wanted: dict[Path, list[tuple[int, int]]] = {}  # mp4 -> (frames it must hold, episode)
    for episode in chosen:
        for key in cameras:
            if key in episode.videos:
                path, start = episode.videos[key]
                wanted.setdefault(path, []).append(
                    (round(start * dataset.fps) + episode.length, episode.index)
                )
            elif dataset.features[key]["dtype"] == "video":
                problems.append(f"{dataset.root}: episode {episode.index} has no video of {key}")
    with ThreadPoolExecutor(8) as pool:  # opening is mostly waiting for the disk
        for (path, ends), frames in zip(
            wanted.items(), pool.map(count_frames, wanted), strict=True
        ):
            last, episode = max(ends)
            if isinstance(frames, str):
                problems.append(
                    f"{frames} (episode {', '.join(str(number) for _, number in ends[:8])})"
                )
            elif frames < last:
                end, episode = min(pair for pair in ends if pair[0] > frames)
                problems.append(
                    f"{path}: has {frames} frames, episode {episode} needs {end} by the episode table"
                )
            elif frames > last and dataset.version != "v3.0":
                warnings.append(
                    f"{path}: {frames} frames for {last} rows (episode {episode}); row k is frame k"
                )
    if problems:
        shown = "\n".join(problems[:12]) + (
            f"\n... and {len(problems) - 12} more" if len(problems) > 12 else ""
        )
        raise DataError(
            f"{shown}\n    Download or record these again, or list only the good ones in data.episodes"
        )
    return warnings


def count_frames(path: Path) -> int | str:
    """Frames in a video by its container, or what is wrong with it. Nothing is decoded."""
    try:
        with reading(path), av.open(path) as container:
            stream = container.streams.video[0]
            end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
            if end > path.stat().st_size:  # its index comes first and is whole
                return f"{path}: cut short: {path.stat().st_size} bytes, its frames need {end}"
            return stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    except DataError as error:
        return str(error)


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
    """A scalar or list column of any nesting -> float32 (rows, dim). Raises DataError if rows differ in width."""
    rows = len(column)
    while isinstance(column.type, LISTS):
        if len(pc.unique(pc.list_value_length(column))) > 1:
            raise DataError(
                f"{place}: rows of different widths; every row must have the same number of values"
            )
        column = pc.list_flatten(column)
    return column.to_numpy().astype(np.float32).reshape(rows, -1 if rows else 1)
