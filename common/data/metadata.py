"""The metadata of a LeRobot dataset, field by field: info.json and the rows of the episode table.

Each value is checked for type and range where it is read; an error is one DataError that names
file, place and field.
"""

import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from common.config import DataError, show
from common.data.files import parse_json, reading

VERSIONS = ("v2.0", "v2.1", "v3.0")
MOST = 10**9  # no dataset has more episodes, rows, files or seconds
WIDEST = 10**6  # no feature has a longer side
TABLE = ("episode_index", "length", "tasks", "dataset_", "data/", "videos/")  # columns of it


class Record:
    """A JSON object or a row of a table by field; place begins its errors.

    Each method returns the field's value, and raises DataError unless it is of the kind asked for
    and from `low` to `high`.
    """

    def __init__(self, values: Any, place: str):
        if not isinstance(values, dict):
            raise DataError(f"{place}: needs a mapping of fields, found {show(values)}")
        self.values = values
        self.place = place

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def error(self, key: str, expected: str) -> DataError:
        found = show(self.values[key]) if key in self.values else "nothing"
        return DataError(f"{self.place}: needs {key!r}, {expected}; found {found}")

    def number(self, key: str, low: float = 0, high: float = MOST) -> float:
        value = self.values.get(key)
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not low <= value <= high:  # nan is in no range
            raise self.error(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def integer(self, key: str, low: int = 0, high: int = MOST) -> int:
        value = self.values.get(key)
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not low <= value <= high or value != int(value):
            raise self.error(key, f"a whole number from {low} to {high}")
        return int(value)

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str) or not value:
            raise self.error(key, "a text")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts; of a single text or nothing, too."""
        value = self.values.get(key) or []
        if isinstance(value, str):
            return [value]
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, "a list of texts")
        return value


class PathTemplate:
    """A template of info.json such as `data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet`.

    Raises DataError if it has other fields than those of `FIELDS`, or leads out of the dataset.
    """

    FIELDS = ("episode_chunk", "chunk_index", "file_index", "episode_index", "video_key")

    def __init__(self, info: Record, key: str):
        self.text = info.text(key)
        self.place = f"{info.place}: {key!r}"
        try:
            parts = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise info.error(
                key, f"a path with fields like {{chunk_index:03d}} ({error})"
            ) from error
        for _, name, form, conversion in parts:
            plain = re.fullmatch("" if name == "video_key" else r"(0?[0-9]{1,2})?d?", form or "")
            if name is not None and (name not in self.FIELDS or conversion or not plain):
                raise info.error(key, f"a path with no fields but {', '.join(self.FIELDS)}")
        self.path(dict.fromkeys(self.FIELDS, 0))

    def path(self, values: dict[str, Any]) -> str:
        """The path below the dataset's folder."""
        path = self.text.format(**values)
        if path.startswith("/") or ".." in PurePosixPath(path).parts or "\0" in path:
            raise DataError(f"{self.place} leads out of the dataset's folder: {show(path)}")
        return path

    def with_chunk(self, chunk: int, values: dict[str, Any]) -> str:
        """The same with another number in the folder chunk-NNN."""
        text = re.sub(r"chunk-\{[^}]*\}", f"chunk-{chunk:03d}", self.text)
        return text.format(**values)


@dataclass
class Info:
    """info.json. video_path: None if there are no videos; total_*: None where it names none."""

    path: Path
    content: bytes
    version: str
    fps: float  # Hz
    robot_type: Any
    features: dict[str, dict]  # each with a dtype (text), perhaps a shape (list of int) and names
    data_path: PathTemplate
    video_path: PathTemplate | None
    chunks_size: int
    total_episodes: int | None
    total_frames: int | None

    def keys(self, dtype: str) -> list[str]:
        return [key for key, feature in self.features.items() if feature["dtype"] == dtype]


def read_info(root: Path) -> Info:
    """meta/info.json of a dataset's folder."""
    path = root / "meta/info.json"
    if not path.is_file():
        raise DataError(
            f"{path}: not found; data.root must be the top folder of a LeRobot dataset, with "
            "meta/, data/ and mostly videos/ in it, but has "
            f"{sorted(p.name for p in root.glob('*'))[:8] or 'nothing'}"
        )
    with reading(path):
        content = path.read_bytes()
        text = content.decode("utf-8")
    info = Record(parse_json(text, path), str(path))
    version = info.values.get("codebase_version")
    if version not in VERSIONS:
        raise DataError(
            f"{path}: codebase_version is {version!r:.60}, not one of {VERSIONS}; convert it with "
            "lerobot"
        )
    totals = {}
    for key in ("total_episodes", "total_frames"):
        totals[key] = info.integer(key) if info.has(key) else None
    return Info(
        path=path,
        content=content,
        version=version,
        fps=info.number("fps", 0.01, 10_000),
        robot_type=info.values.get("robot_type"),
        features=read_features(info),
        data_path=PathTemplate(info, "data_path"),
        video_path=PathTemplate(info, "video_path") if info.has("video_path") else None,
        chunks_size=info.integer("chunks_size", 1) if info.has("chunks_size") else 1000,
        **totals,
    )


def read_features(info: Record) -> dict[str, dict]:
    features = Record(info.values.get("features"), f"{info.place}: 'features'").values
    for key, values in features.items():
        feature = Record(values, f"{info.place}: features: {show(key)}")
        feature.text("dtype")
        if not isinstance(values.get("names"), list | dict | None):
            raise feature.error("names", "a list or a mapping, or null")
        if feature.has("shape"):
            shape = values["shape"]
            good = isinstance(shape, list) and all(type(side) is int for side in shape)
            if not good or not all(0 < side <= WIDEST for side in shape):
                raise feature.error("shape", f"a list of whole numbers from 1 to {WIDEST}")
    return features


def is_depth_map(feature: dict) -> bool:
    """Whether info.json declares a camera as a depth map, as any version of lerobot does."""
    for part in (feature.get("info"), feature.get("video_info")):
        for name in ("is_depth_map", "video.is_depth_map"):
            if isinstance(part, dict) and part.get(name) is True:
                return True
    return False


class Segment(NamedTuple):
    """The part of a video file that shows an episode."""

    path: Path
    start: float  # seconds in the file
    end: float | None  # the same, if the table says so


@dataclass
class Episode:
    """A row of the episode table. Row k of its data and its frame k belong to the time k / fps."""

    index: int  # the dataset's own number; need not start at 0 or be dense
    length: int  # frames
    data_path: Path
    videos: dict[str, Segment]  # by camera key
    tasks: list[str]
    rows: tuple[int, int] | None  # of the whole dataset, the end exclusive, if the table says so
    place: str  # file and row of the table

    def files(self) -> set[Path]:
        return {self.data_path, *(segment.path for segment in self.videos.values())}


def read_episodes(root: Path, info: Info, existing: set[Path]) -> list[Episode]:
    """All rows of the episode table. existing: the files of the dataset."""
    return [read_episode(row, root, info, existing) for row in table_rows(root, info)]


def table_rows(root: Path, info: Info) -> Iterator[Record]:
    if info.version != "v3.0":
        path = root / "meta/episodes.jsonl"
        with reading(path):
            lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            if line.strip():
                values = parse_json(line, path, f" in line {number}")
                yield Record(values, f"{path}: line {number}")
        return
    for path in sorted((root / "meta/episodes").glob("*/*.parquet")):
        with reading(path):
            names = [name for name in pq.read_schema(path).names if name.startswith(TABLE)]
            table = pq.read_table(path, columns=names, partitioning=None)
            rows = table.to_pylist()
        for number, values in enumerate(rows):
            yield Record(values, f"{path}: row {number}")


def read_episode(row: Record, root: Path, info: Info, existing: set[Path]) -> Episode:
    index = row.integer("episode_index")

    def path_of(template: PathTemplate, part: str, key: str = "") -> Path:
        chunk = index // info.chunks_size
        file = 0
        if info.version == "v3.0":
            chunk = row.integer(f"{part}/chunk_index")
            file = row.integer(f"{part}/file_index")
        values = {
            "chunk_index": chunk,
            "episode_chunk": chunk,
            "file_index": file,
            "episode_index": index,
            "video_key": key,
        }
        path = root / template.path(values)
        if path not in existing:
            # Some templates take the episode's number for the chunk's.
            other = root / template.with_chunk(chunk, values)
            if other in existing:
                return other
        return path

    videos = {}
    for key in info.keys("video"):
        part = f"videos/{key}"
        if info.video_path is None:
            continue
        if info.version != "v3.0":
            videos[key] = Segment(path_of(info.video_path, part, key), 0.0, None)
        elif row.has(f"{part}/chunk_index"):  # else the episode has no such camera
            path = path_of(info.video_path, part, key)
            start = row.number(f"{part}/from_timestamp")
            end = None
            if row.has(f"{part}/to_timestamp"):
                end = row.number(f"{part}/to_timestamp")
            videos[key] = Segment(path, start, end)
    rows = None
    if row.has("dataset_from_index") and row.has("dataset_to_index"):
        rows = (row.integer("dataset_from_index"), row.integer("dataset_to_index"))
    return Episode(
        index=index,
        length=row.integer("length"),
        data_path=path_of(info.data_path, "data"),
        videos=videos,
        tasks=row.texts("tasks"),
        rows=rows,
        place=row.place,
    )
