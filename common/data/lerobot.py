"""LeRobot datasets v2.0, v2.1 and v3.0: the episode table, numbers and pictures from parquet.

Frames are decoded in frames.py, files are checked in checks.py. Nothing in info.json is trusted but
names, shapes, fps and path templates.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from common import hub
from common.config import DataError, nearest
from common.data.files import reading
from common.data.metadata import Episode, is_depth_map, read_episodes, read_info


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
    try:
        return hub.dataset(root)
    except hub.HubError as error:
        raise DataError(
            f"data.root: {root!r} is no folder here, and the Hub gave no such dataset. Check the "
            f"name and the network (private data: `hf auth login`), or give a folder\n    ({error})"
        ) from error


class LeRobotDataset:
    """Metadata of a folder: root, version, fps (Hz), robot_type, features (info.json's), and more:

    episodes: those that have files and rows; absent: numbers of those without files (a partial
    download); empty: numbers of those of length 0; listed: all rows of the episode table; cameras:
    keys of video and image features with files; content_key: hash of info.json and all files'
    names, sizes and times; values_key: hash of info.json and of the data files' content, the same
    for a copy.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.info = info = read_info(self.root)
        self.version = info.version
        self.fps = info.fps
        self.robot_type = info.robot_type
        self.features = info.features
        files = self._list_files()
        content = info.content + repr(sorted(files.items())).encode()
        self.content_key = hashlib.sha256(content).hexdigest()[:32]
        existing = {self.root / name for name in files}
        self.listed = read_episodes(self.root, info, existing)
        with_rows = [e for e in self.listed if e.length]
        self.empty = [e.index for e in self.listed if not e.length]
        self.episodes = [e for e in with_rows if existing & e.files()]
        self.absent = [e.index for e in with_rows if not existing & e.files()]
        if not self.episodes:
            empty = f", {len(self.empty)} without rows" if self.empty else ""
            raise DataError(
                f"{self.root}: no episodes ({len(self.absent)} without files{empty}); download or "
                "record some"
            )
        first = next((e for e in self.episodes if e.data_path in existing), self.episodes[0])
        with reading(first.data_path, f" (episode {first.index})"):
            self.schema = pq.read_schema(first.data_path)
        present = {key for key in info.keys("image") if key in self.schema.names}
        for episode in self.episodes:
            present |= {key for key, (path, *_) in episode.videos.items() if path in existing}
        self.cameras = [key for key in self.features if key in present]
        for episode in self.listed:  # a declared video feature may have no files at all
            episode.videos = {key: video for key, video in episode.videos.items() if key in present}

    @cached_property
    def values_key(self) -> str:
        digest = hashlib.sha256(self.info.content)
        for path in dict.fromkeys(episode.data_path for episode in self.episodes):
            with reading(path):
                digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:32]

    def _list_files(self) -> dict[str, tuple[int, int]]:
        """Path below the root -> (size, time of change)."""
        folders = {"meta", "data", "videos"}
        templates = [self.info.data_path, self.info.video_path]
        folders |= {template.text.split("/")[0] for template in templates if template}
        files = {}
        for folder in folders:
            for place, _, names in os.walk(self.root / folder, followlinks=True):
                for path in (os.path.join(place, name) for name in names):
                    if os.path.exists(path):  # not a Hub snapshot's link to a blob that is not here
                        status = os.stat(path)
                        name = os.path.relpath(path, self.root)
                        files[name] = (status.st_size, status.st_mtime_ns)
        return files

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
        """Raises DataError if a key is a depth map, or, with the cameras' names, is no camera."""
        for key in keys:
            if is_depth_map(self.features.get(key, {})):
                raise DataError(
                    f"{self.info.path}: features: {key!r} is declared as a depth map; cameras are "
                    "of pictures, leave it out of data.cameras"
                )
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
                declared = ""
                if key in self.features:
                    declared = "\n    info.json declares it, but the data files lack it"
                raise DataError(
                    f"{self.root}: {place}no numeric column {key!r}{nearest(key, numeric)}\n    "
                    f"available: {', '.join(numeric)}{declared}"
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
            owner = whole_numbers(table["episode_index"], f"{path}: episode_index")
        else:
            table = self._load(group[0], keys)
            owner = np.full(table.num_rows, group[0].index)
        row = np.flatnonzero(np.isin(owner, [episode.index for episode in group]))
        if len(row) < len(owner):
            table = table.take(row)
            owner = owner[row]

        def place(i: int) -> str:
            return f"{path}: episode {owner[i]}, row {row[i]}"

        for key in keys:
            if not is_numeric(table[key].type):
                raise DataError(
                    f"{path}: episode {group[0].index}: {key}: needs numbers, found "
                    f"{table[key].type}"
                )
        arrays = {key: dense(table[key], key, place) for key in keys}
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

    def numbers(self, key: str, episode: Episode) -> np.ndarray | None:
        """All rows (n,) of a column of whole numbers in an episode's file; None if it has none.

        Raises DataError.
        """
        with reading(episode.data_path, f" (episode {episode.index})"):
            if key not in pq.read_schema(episode.data_path).names:
                return None
        column = self._load(episode, [key])[key]
        return whole_numbers(column, f"{episode.data_path}: {key}")

    def pictures(self, episode: Episode, key: str) -> list[bytes]:
        """Encoded pictures (mostly PNG) of an image-dtype camera, one a frame. Raises DataError."""
        filters = None
        if self.version == "v3.0":
            filters = [("episode_index", "=", episode.index)]
        with reading(episode.data_path, f" (episode {episode.index})"):
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
            missing = [key for key in keys if names.count(key) != 1]
            if missing:
                count = names.count(missing[0]) or "no"
                raise DataError(
                    f"{path}: episode {episode.index}: {count} column {missing[0]!r}; found "
                    f"{', '.join(names)}"
                )
            columns = list(dict.fromkeys(keys))
            return pq.read_table(path, columns=columns, filters=filters, partitioning=None)


def by_file(episodes: list[Episode]) -> list[list[Episode]]:
    groups: dict[Path, list[Episode]] = {}
    for episode in episodes:
        groups.setdefault(episode.data_path, []).append(episode)
    return list(groups.values())


LISTS = (pa.ListType, pa.LargeListType, pa.FixedSizeListType)


def leaf(kind: pa.DataType) -> pa.DataType:
    """The type inside of nested lists."""
    while isinstance(kind, LISTS):
        kind = kind.value_type
    return kind


def is_numeric(kind: pa.DataType) -> bool:
    kind = leaf(kind)
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def dense(column: pa.ChunkedArray, key: str, row_place: Callable[[int], str]) -> np.ndarray:
    """A scalar or nested list column -> float32 (rows, dim), nan where a number is missing.

    Raises DataError, which begins with row_place(row), if widths differ or are 0.
    """
    rows = len(column)
    while isinstance(column.type, LISTS):
        widths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
        other = np.flatnonzero(widths != widths[:1])
        if len(other):
            row = int(other[0]) * rows // len(column)
            raise DataError(
                f"{row_place(row)}: {key}: rows of different widths, {widths[other[0]]} after "
                f"{widths[0]}; every row must have the same number of values"
            )
        column = pc.list_flatten(column)
    if rows and not len(column):
        raise DataError(f"{row_place(0)}: {key}: no numbers")
    if column.null_count:
        column = column.cast(pa.float64(), safe=False)
    width = len(column) // rows if rows else 1
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf
        return column.to_numpy().astype(np.float32).reshape(rows, width)


def whole_numbers(column: pa.ChunkedArray, place: str) -> np.ndarray:
    """A column of integers -> (rows,). Raises DataError if it holds anything else."""
    if not pa.types.is_integer(column.type):
        raise DataError(f"{place}: needs whole numbers, found {column.type}")
    if column.null_count:
        first = np.argmax(column.is_null().to_numpy())
        raise DataError(f"{place}: nothing in row {first} ({column.null_count} such rows)")
    return column.to_numpy()
