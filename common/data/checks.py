"""A check of a dataset before training: every file of the chosen episodes, nothing decoded."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np

from common.config import DataError
from common.data.lerobot import Episode, LeRobotDataset, by_file, reading


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
