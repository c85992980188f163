"""A check of a dataset before training: every file of the chosen episodes, nothing decoded.

Files and tables are also compared with each other: after a merge, an edit or half a copy they may
contradict each other, and an episode would get the frames of another one.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pyarrow.parquet as pq

from common.config import DataError
from common.data.files import parse_json, reading
from common.data.frames import timed_packets, video_stream
from common.data.lerobot import LeRobotDataset, by_file, leaf
from common.data.metadata import Episode, Record


def check_files(
    dataset: LeRobotDataset,
    cameras: list[str],
    low_dim_keys: list[str],
    episodes: list[int] | None = None,
) -> list[str]:
    """Check every file of the chosen episodes without decoding videos; -> warnings.

    Raises one DataError that lists all problems, each with its file and episode: files missing or
    cut short, row or frame counts unlike the episode table, columns unlike info.json, non-finite
    numbers, gaps in frame_index, and tables that contradict each other (see check_table).
    """
    dataset.require_cameras(cameras)
    dataset.require_columns(low_dim_keys)
    chosen = dataset.select(episodes)
    warnings = []
    for numbers, what in ((dataset.absent, "files for"), (dataset.empty, "rows in")):
        if numbers:
            warnings.append(
                f"{dataset.root}: no {what} the listed episodes {some(numbers)}: left out"
            )
    unused = [key for key in dataset.cameras if key not in cameras]
    if unused:
        warnings.append(f"{dataset.root}: cameras not used: {', '.join(unused)}")
    problems = check_table(dataset, cameras, chosen, warnings)
    problems += check_columns(dataset, low_dim_keys, warnings)
    problems += check_owners(dataset, chosen, warnings)
    problems += check_rows(dataset, low_dim_keys, chosen, warnings)
    problems += check_videos(dataset, cameras, chosen, warnings)
    warnings += check_tasks(dataset, chosen)
    if problems:
        shown = problems[:12]
        if len(problems) > 12:
            shown.append(f"... and {len(problems) - 12} more")
        advice = "    Download or record these again, or list only the good ones in data.episodes"
        raise DataError("\n".join([*shown, advice]))
    return warnings


def some(numbers: Iterable) -> str:
    """The first of many numbers as a list."""
    listed = list(numbers)
    more = ", ..." if len(listed) > 8 else ""
    return f"[{', '.join(map(str, listed[:8]))}{more}]"


def check_table(
    dataset: LeRobotDataset, cameras: list[str], chosen: list[Episode], warnings: list[str]
) -> list[str]:
    """Problems of the episode table itself, by its rows and by info.json's totals.

    Numbers must differ, and episodes must share neither rows nor frames of a video file. Episodes
    that are not chosen count where they collide with a chosen one.
    """
    numbers = {episode.index for episode in chosen}
    problems = []
    first: dict[int, Episode] = {}
    for episode in dataset.listed:
        other = first.setdefault(episode.index, episode)
        if other is not episode and episode.index in numbers:
            problems.append(
                f"{episode.place}: episode_index {episode.index} is taken, see {other.place}"
            )
    present = [episode for episode in dataset.listed if episode.length]
    spans = [Span(*e.rows, e) for e in present if e.rows]
    for span in spans:
        if span.end - span.start != span.episode.length and span.episode.index in numbers:
            problems.append(
                f"{span.episode.place}: episode {span.episode.index}: length is "
                f"{span.episode.length}, but dataset_from_index {span.start} to dataset_to_index "
                f"{span.end} are {span.end - span.start} rows"
            )
    for a, b in collisions(spans, numbers):
        problems.append(
            f"{b.episode.place}: episodes {a.episode.index} and {b.episode.index} share rows: "
            f"dataset_from_index to dataset_to_index are {a.start} to {a.end} and {b.start} to "
            f"{b.end}"
        )
    for key in cameras:
        problems += check_segments(dataset, key, present, numbers, warnings)
    return problems + check_totals(dataset, warnings)


class Span(NamedTuple):
    """What an episode takes of a row of frames or rows, the end exclusive."""

    start: int
    end: int
    episode: Episode


def collisions(
    spans: list[Span], numbers: set[int], tolerance: int = 0
) -> Iterator[tuple[Span, Span]]:
    """Pairs that overlap by more than the tolerance, one of each among the chosen numbers."""
    last = None
    for span in sorted(spans, key=lambda span: span[:2]):
        chosen = last is not None and {last.episode.index, span.episode.index} & numbers
        if last is not None and chosen and span.start < last.end - tolerance:
            yield last, span
        if last is None or span.end > last.end:
            last = span


def check_segments(
    dataset: LeRobotDataset,
    key: str,
    episodes: list[Episode],
    numbers: set[int],
    warnings: list[str],
) -> list[str]:
    """Problems of a camera's parts of video files; adds a warning for frames beyond the rows.

    Start times are float sums of the durations of files: a frame is allowed.
    """
    problems = []
    files: dict[Path, list[Span]] = {}
    longer = []
    for episode in episodes:
        if key not in episode.videos:
            continue
        path, start, end = episode.videos[key]
        first = round(start * dataset.fps)
        last = first + episode.length
        if end is not None:
            last = round(end * dataset.fps)
        beyond = last - first - episode.length
        if beyond < -1 and episode.index in numbers:
            problems.append(
                f"{episode.place}: episode {episode.index}: {episode.length} rows, but "
                f"from_timestamp {start:g} to to_timestamp {end:g} of {key} are {last - first} "
                "frames"
            )
        if beyond > 1 and episode.index in numbers:
            longer.append(episode.index)
        span = Span(first, max(last, first + episode.length), episode)
        files.setdefault(path, []).append(span)
    for path, spans in files.items():
        for a, b in collisions(spans, numbers, tolerance=1):
            problems.append(
                f"{path}: episodes {a.episode.index} and {b.episode.index} share frames by the "
                f"episode table: {a.start} to {a.end} and {b.start} to {b.end}"
            )
    if longer:
        warnings.append(
            f"{dataset.root}: episodes {some(longer)} have more frames of {key} than rows, by "
            "from_timestamp and to_timestamp; row k is frame k"
        )
    return problems


def check_totals(dataset: LeRobotDataset, warnings: list[str]) -> list[str]:
    """More episodes or frames than info.json's totals are a problem, fewer a warning.

    A table of fewer episodes may be a part of a dataset that somebody cut out.
    """
    info = dataset.info
    problems = []
    episodes = len(dataset.listed)
    frames = sum(episode.length for episode in dataset.listed)
    complete = episodes == info.total_episodes
    for key, total, found in (
        ("total_episodes", info.total_episodes, episodes),
        ("total_frames", info.total_frames, frames),
    ):
        if total is None or found == total:
            continue
        text = f"{info.path}: {key} is {total}, but the episode table has {found}"
        if found > total or complete:
            problems.append(text)
        else:
            warnings.append(f"{text}: the rest is left out")
    return problems


def check_columns(dataset: LeRobotDataset, keys: list[str], warnings: list[str]) -> list[str]:
    """Problems of the kind of numbers in the columns, against the dtypes of info.json."""
    problems = []
    for key in keys:
        dtype = dataset.features.get(key, {}).get("dtype")
        stored = dataset.schema.field(key).type
        if dtype is None or kind_of(dtype) == kind_of(leaf(stored)):
            continue
        text = f"{dataset.info.path}: features: dtype of {key!r} is {dtype!r}, stored is {stored}"
        if kind_of(dtype):
            warnings.append(text)
        else:
            problems.append(text)
    return problems


def kind_of(dtype: object) -> str:
    """int, float or bool, of info.json's or pyarrow's name of a type; nothing for other types."""
    names = {"halffloat": "float", "double": "float"}
    found = re.fullmatch(r"u?(int|float|bool)\d*|halffloat|double", str(dtype))
    return found[1] or names[found[0]] if found else ""


def check_owners(dataset: LeRobotDataset, chosen: list[Episode], warnings: list[str]) -> list[str]:
    """Problems of the column episode_index against the episode table."""
    problems = []
    places = {episode.index: episode for episode in dataset.listed}
    for group in by_file(chosen):
        path = group[0].data_path
        try:
            owners = dataset.numbers("episode_index", group[0])
        except DataError:
            continue  # check_rows says so
        unlisted = []
        for number in [] if owners is None else np.unique(owners).tolist():
            place = places.get(number)
            if dataset.version != "v3.0" and number != group[0].index:
                problems.append(
                    f"{path}: is of episode {group[0].index} by its name, but of episode {number} "
                    "by its column episode_index"
                )
            elif place is None:
                unlisted.append(number)
            elif place.data_path != path:
                problems.append(
                    f"{path}: has rows of episode {number}, which the episode table places in "
                    f"{place.data_path}"
                )
            elif not place.length:
                problems.append(
                    f"{path}: has rows of episode {number}, of which the episode table says that "
                    "it has none"
                )
        if unlisted:
            warnings.append(
                f"{path}: has rows of episodes {some(unlisted)}, which are not in the episode "
                "table: left out"
            )
    return problems


def check_tasks(dataset: LeRobotDataset, chosen: list[Episode]) -> list[str]:
    """Warnings for a task_index that is not in the table of tasks; training reads neither."""
    path = dataset.root / "meta" / ("tasks.parquet" if dataset.version == "v3.0" else "tasks.jsonl")
    if "task_index" not in dataset.schema.names or not path.is_file():
        return []
    try:
        known = task_numbers(path)
        used = [dataset.numbers("task_index", group[0]) for group in by_file(chosen)]
    except DataError as error:
        return [str(error)]
    numbers = {number for column in used if column is not None for number in np.unique(column)}
    unknown = sorted(map(int, numbers - known))
    return [f"{path}: has no task_index {some(unknown)} of the rows"] if unknown else []


def task_numbers(path: Path) -> set[int]:
    """The column task_index of tasks.parquet or tasks.jsonl."""
    if path.suffix == ".parquet":
        with reading(path):
            rows = pq.read_table(path, columns=["task_index"], partitioning=None).to_pylist()
    else:
        with reading(path):
            lines = path.read_text(encoding="utf-8").splitlines()
        rows = [parse_json(line, path) for line in lines if line.strip()]
    return {Record(row, str(path)).integer("task_index") for row in rows}


def check_rows(
    dataset: LeRobotDataset, keys: list[str], chosen: list[Episode], warnings: list[str]
) -> list[str]:
    """Problems of the rows of episodes; adds a warning if timestamps are not k / fps."""
    problems = []
    # Largest difference of a timestamp from k / fps in frames, episode, its own rate in Hz.
    drifts = [(0.0, 0, 0.0)]
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
                    with np.errstate(invalid="ignore"):
                        frames = (time - time[:1]) * dataset.fps
                        apart = np.abs(frames - steps)
                        rate = dataset.fps * steps[-1] / frames[-1] if len(steps) > 1 else 0.0
                    apart[np.isnan(apart)] = np.inf
                    drifts.append((apart.max(initial=0), episode.index, rate))
        except DataError as error:
            problems.append(str(error))
    drift, number, rate = max(drifts)
    if drift > 0.6:
        warnings.append(
            f"{dataset.root}: timestamps are up to {drift:.1f} frames off k / fps (episode "
            f"{number}, of {rate:.1f} Hz by its timestamps, {dataset.fps:g} by info.json); k / fps "
            "is used"
        )
    return problems


def check_width(place: str, key: str, values: np.ndarray, shape: Sequence[int] | None) -> list[str]:
    """values (frames, dim) must be as wide as info.json's shape says, if it does."""
    width = values.shape[1]
    if shape is None or width == math.prod(shape):
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
                path, start, _ = episode.videos[key]
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
            stream = video_stream(container, path)
            size = path.stat().st_size
            end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
            if end > size:  # its index comes first and is whole
                raise DataError(f"{path}: cut short: {size} bytes, its frames need {end}")
            return stream.frames or len(timed_packets(container, path))
    except DataError as error:
        return error
