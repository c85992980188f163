"""Writes LeRobot v3.0 datasets that this project's reader and `lerobot` itself can open.

features = {
    "action": {"dtype": "float32", "shape": [6], "names": None},
    "observation.images.cam": {"dtype": "video", "shape": [96, 96, 3], "names": ["h", "w", "c"]},
}
with DatasetWriter(root, fps=20, features=features) as writer:
    writer.add_episode({"action": actions, "observation.images.cam": frames}, task="lift the bar")
    writer.finish()
"""

import json
import shutil
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.config import DataError
from common.files import WriteError, writing

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
BOOKKEEPING = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
SAMPLED_FRAMES = 16  # of an episode and camera, for the image statistics


class DatasetWriter:
    """One dataset, written to `<root>.tmp` and renamed to `root` by finish().

    features: info.json's entries of the user's keys. "video" entries are RGB (h, w, 3) uint8 with
    even sides; the others are vectors (shape [n]). All episodes of a camera share one mp4 and all
    rows one parquet file: files are not split by size. An old `<root>.tmp` is deleted. Raises
    DataError if `root` has files in it, WriteError if the disk refuses.

    With `with DatasetWriter(...) as writer`, an error deletes `<root>.tmp`.
    """

    def __init__(self, root: str | Path, fps: float, features: dict, robot_type: str = "unknown"):
        self.root = Path(root)
        self.fps = fps
        self.robot_type = robot_type
        self.rate = Fraction(fps).limit_denominator(10**6)
        self.tmp = self.root.with_name(self.root.name + ".tmp")
        if self.root.exists() and any(self.root.iterdir()):
            raise DataError(
                f"{self.root}: already exists; delete it or write the dataset elsewhere"
            )
        self.cameras = [key for key in features if features[key]["dtype"] == "video"]
        self.columns = {key: features[key]["dtype"] for key in features if key not in self.cameras}
        self.columns |= BOOKKEEPING
        self.features = {}
        for key, feature in features.items():
            check_shape(key, feature)
            self.features[key] = dict(feature)
            if key in self.cameras:
                self.features[key]["info"] = video_info(feature["shape"], fps)
        for key, dtype in BOOKKEEPING.items():
            self.features[key] = {"dtype": dtype, "shape": [1], "names": None}
        shutil.rmtree(self.tmp, ignore_errors=True)
        self.tasks: dict[str, int] = {}
        self.episodes: list[dict] = []
        # Rows and histograms of all episodes are kept for the exact statistics of the dataset.
        self.rows: dict[str, list] = {key: [] for key in self.columns}
        self.histograms: dict[str, list] = {key: [] for key in self.cameras}
        self.frames = 0
        try:
            with writing(self.tmp):
                self.videos = {key: self._open_video(key) for key in self.cameras}
                self.parquet = self._open_parquet()
        except WriteError:
            shutil.rmtree(self.tmp, ignore_errors=True)
            raise

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            self.discard()

    def discard(self) -> None:
        """Close the files and delete `<root>.tmp`."""
        shutil.rmtree(self.tmp, ignore_errors=True)
        for container, _ in self.videos.values():
            with suppress(OSError):  # what could not be written is of no use any more
                container.close()
        with suppress(OSError):
            self.parquet.close()
        self.parquet.is_open = False  # else its destructor tries to write once more

    def add_episode(self, arrays: dict, task: str) -> None:
        """Append an episode: arrays[key] is (n, ...) of the declared shape, for every key."""
        number = len(self.episodes)
        length = self._check_episode(arrays, f"{self.root}: episode {number}")
        index = np.arange(length)
        arrays = arrays | {
            "timestamp": index / self.fps,
            "frame_index": index,
            "index": index + self.frames,
            "episode_index": np.full(length, number),
            "task_index": np.full(length, self.tasks.setdefault(task, len(self.tasks))),
        }
        columns = {key: np.asarray(arrays[key], dtype) for key, dtype in self.columns.items()}
        with writing(self.tmp):
            self._write_rows(columns)
            for key in self.cameras:
                self._write_video(key, arrays[key])
        row = {
            "episode_index": number,
            "tasks": [task],
            "length": length,
            "data/chunk_index": 0,
            "data/file_index": 0,
            "dataset_from_index": self.frames,
            "dataset_to_index": self.frames + length,
        }
        statistics = {}
        for key in self.cameras:
            row |= {
                f"videos/{key}/chunk_index": 0,
                f"videos/{key}/file_index": 0,
                f"videos/{key}/from_timestamp": self.frames / self.fps,
                f"videos/{key}/to_timestamp": (self.frames + length) / self.fps,
            }
            sampled = np.unique(np.linspace(0, length - 1, SAMPLED_FRAMES).astype(int))
            pixels = np.stack([arrays[key][i] for i in sampled]).reshape(-1, 3)
            histogram = np.stack([np.bincount(channel, minlength=256) for channel in pixels.T])
            self.histograms[key].append((histogram, len(sampled)))
            statistics[key] = image_statistics(histogram, len(sampled))
        for key, column in columns.items():
            self.rows[key].append(column)
            statistics[key] = column_statistics(column)
        for key, values in statistics.items():
            row |= {f"stats/{key}/{name}": value for name, value in values.items()}
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        self.episodes.append(row)
        self.frames += length

    def finish(self) -> None:
        """Close the files, write the metadata and rename `<root>.tmp` to `root`."""
        with writing(self.tmp):
            self.parquet.close()
            for container, stream in self.videos.values():
                container.mux(stream.encode())
                container.close()
            self._write_metadata(self.tmp / "meta")
            self.tmp.rename(self.root)

    def _write_metadata(self, meta: Path) -> None:
        episodes = meta / "episodes/chunk-000/file-000.parquet"
        episodes.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self.episodes), episodes)
        tasks = pa.table({"task_index": list(self.tasks.values()), "task": list(self.tasks)})
        tasks = tasks.replace_schema_metadata({"pandas": json.dumps(TASK_INDEX)})
        pq.write_table(tasks, meta / "tasks.parquet")
        statistics = {}
        if self.episodes:
            for key, rows in self.rows.items():
                statistics[key] = column_statistics(np.concatenate(rows))
            for key, histograms in self.histograms.items():
                totals, counts = zip(*histograms, strict=True)
                statistics[key] = image_statistics(np.sum(totals, axis=0), sum(counts))
        (meta / "stats.json").write_text(json.dumps(statistics, indent=4))
        info = {
            "codebase_version": "v3.0",
            "robot_type": self.robot_type,
            "total_episodes": len(self.episodes),
            "total_frames": self.frames,
            "total_tasks": len(self.tasks),
            "chunks_size": 1000,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": self.fps,
            "splits": {"train": f"0:{len(self.episodes)}"},
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
            "features": self.features,
        }
        (meta / "info.json").write_text(json.dumps(info, indent=4))

    def _check_episode(self, arrays: dict, place: str) -> int:
        """The episode's length. Raises DataError if a key or a shape is not as declared."""
        wanted = self.features.keys() - BOOKKEEPING.keys()
        if arrays.keys() != wanted:
            raise DataError(f"{place}: keys {sorted(arrays)}, expected {sorted(wanted)}")
        length = len(next(iter(arrays.values())))
        for key, array in arrays.items():
            expected = (length, *self.features[key]["shape"])
            if np.shape(array) != expected or length == 0:
                raise DataError(
                    f"{place}: {key}: shape {np.shape(array)}, expected {expected}, one frame or "
                    "more"
                )
        return length

    def _write_rows(self, columns: dict[str, np.ndarray]) -> None:
        cells = []
        for key, column in columns.items():
            array = pa.array(column.reshape(-1))
            size = self.features[key]["shape"][0]
            cells.append(array if size == 1 else pa.FixedSizeListArray.from_arrays(array, size))
        table = pa.Table.from_arrays(cells, schema=self.parquet.schema)
        self.parquet.write_table(table, row_group_size=len(table))

    def _write_video(self, key: str, images) -> None:
        container, stream = self.videos[key]
        for k, image in enumerate(images):
            image = np.ascontiguousarray(image, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = self.frames + k
            frame.time_base = 1 / self.rate
            if k == 0:  # an episode can be decoded without the one before
                frame.pict_type = av.video.frame.PictureType.I
            container.mux(stream.encode(frame))

    def _arrow_type(self, key: str) -> pa.DataType:
        kind = pa.from_numpy_dtype(np.dtype(self.columns[key]))
        size = self.features[key]["shape"][0]
        return (
            kind if size == 1 else pa.list_(kind, size)
        )  # lerobot stores single numbers as scalars

    def _open_parquet(self) -> pq.ParquetWriter:
        path = self.tmp / "data/chunk-000/file-000.parquet"
        path.parent.mkdir(parents=True)
        schema = pa.schema([(key, self._arrow_type(key)) for key in self.columns])
        return pq.ParquetWriter(path, schema, compression="snappy")

    def _open_video(self, key: str):
        path = self.tmp / f"videos/{key}/chunk-000/file-000.mp4"
        path.parent.mkdir(parents=True)
        container = av.open(path, "w")
        # A keyframe every second frame, no B-frames: random access decodes at most two frames.
        options = {"g": "2", "bf": "0", "crf": "18", "preset": "veryfast"}
        stream = container.add_stream("libx264", rate=self.rate, options=options)
        stream.height, stream.width, _ = self.features[key]["shape"]
        stream.pix_fmt = "yuv420p"
        return container, stream


def check_shape(key: str, feature: dict) -> None:
    shape = feature["shape"]
    if feature["dtype"] == "video":
        good = len(shape) == 3 and shape[0] % 2 == shape[1] % 2 == 0 and shape[2] == 3
    else:
        good = len(shape) == 1
    if not good:
        raise DataError(f"{key}: shape {shape}; videos are [even, even, 3], other features [n]")


def video_info(shape: list[int], fps: float) -> dict:
    height, width, channels = shape
    return {
        "video.height": height,
        "video.width": width,
        "video.codec": "h264",
        "video.pix_fmt": "yuv420p",
        "video.is_depth_map": False,
        "video.fps": fps,
        "video.channels": channels,
        "has_audio": False,
    }


def column_statistics(values: np.ndarray) -> dict:
    """(frames, n) or (frames,) -> min, max, mean, std and quantiles (n,), count (1,), as lists."""
    values = values.reshape(len(values), -1).astype(np.float64)
    result = {name: getattr(values, name)(axis=0) for name in ("min", "max", "mean", "std")}
    result["count"] = np.array([len(values)])
    for name, q in QUANTILES.items():
        result[name] = np.quantile(values, q, axis=0)
    return {name: value.tolist() for name, value in result.items()}


def image_statistics(histogram: np.ndarray, count: int) -> dict:
    """Histograms of 8-bit values (3, 256) -> the same statistics in [0, 1] of shape (3, 1, 1)."""
    levels = np.arange(256) / 255
    share = histogram / histogram.sum(axis=1, keepdims=True)
    cumulative = np.cumsum(share, axis=1)
    seen = histogram > 0
    mean = share @ levels
    result = {
        "min": levels[seen.argmax(axis=1)],
        "max": levels[255 - seen[:, ::-1].argmax(axis=1)],
        "mean": mean,
        "std": np.sqrt(np.maximum(share @ levels**2 - mean**2, 0)),
    }
    for name, q in QUANTILES.items():
        result[name] = levels[(cumulative >= q).argmax(axis=1)]
    result = {name: value.reshape(3, 1, 1).tolist() for name, value in result.items()}
    return result | {"count": [count]}


# By this, pandas takes the text column of tasks.parquet as the index, as lerobot expects.
TASK_INDEX = {
    "index_columns": ["task"],
    "column_indexes": [],
    "columns": [
        {
            "name": name,
            "field_name": name,
            "pandas_type": kind,
            "numpy_type": numpy,
            "metadata": None,
        }
        for name, kind, numpy in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
    ],
    "pandas_version": "2.2.0",
}
