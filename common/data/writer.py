"""Writes LeRobot v3.0 datasets that this project's reader and `lerobot` itself can open.

writer = DatasetWriter(root, fps=20, features={"action": {"dtype": "float32", "shape": [6], "names": None},
    "observation.images.cam": {"dtype": "video", "shape": [96, 96, 3], "names": ["height", "width", "channels"]}})
writer.add_episode({"action": actions, "observation.images.cam": frames}, task="lift the bar")
writer.finish()
"""

import json
import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.config import DataError

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
BOOKKEEPING = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
}
BOOKKEEPING["task_index"] = "int64"
SAMPLED_FRAMES = 16  # frames of an episode and camera that the image statistics look at


class DatasetWriter:
    """One dataset, written to `<root>.tmp` and renamed to `root` by finish(), so nobody ever sees half of it.

    features: info.json's entries of the user's keys. "video" entries are RGB (h, w, 3) uint8 with even sides; the
    others are vectors (shape [n]). All episodes of a camera share one mp4 and all rows one parquet file: files are not
    split by size. An old `<root>.tmp` is deleted. Raises DataError if `root` has files in it.
    """

    def __init__(self, root, fps, features: dict, robot_type: str = "unknown"):
        self.root, self.fps, self.robot_type = Path(root), fps, robot_type
        self.rate = Fraction(fps).limit_denominator(10**6)
        self.tmp = self.root.with_name(self.root.name + ".tmp")
        if self.root.exists() and any(self.root.iterdir()):
            raise DataError(
                f"{self.root}: already exists; delete it or write the dataset elsewhere"
            )
        kinds = {key: feature["dtype"] for key, feature in features.items()}
        for key, kind in kinds.items():
            height, width, channels = shape = (*features[key]["shape"], 0, 0)[:3]
            good = (
                height % 2 == width % 2 == 0 and channels == 3
                if kind == "video"
                else shape[1:] == (0, 0)
            )
            if not good:
                raise DataError(
                    f"{key}: shape {features[key]['shape']}; videos are [even, even, 3], other features [n]"
                )
        self.cameras = [key for key, kind in kinds.items() if kind == "video"]
        self.columns = {key: kind for key, kind in kinds.items() if kind != "video"} | BOOKKEEPING
        codec = {
            "video.codec": "h264",
            "video.pix_fmt": "yuv420p",
            "video.is_depth_map": False,
            "video.fps": fps,
        }
        codec |= {"video.channels": 3, "has_audio": False}
        self.features = {key: dict(feature) for key, feature in features.items()}
        for key in self.cameras:
            height, width = features[key]["shape"][:2]
            self.features[key]["info"] = {"video.height": height, "video.width": width} | codec
        self.features |= {
            key: {"dtype": dtype, "shape": [1], "names": None} for key, dtype in BOOKKEEPING.items()
        }
        shutil.rmtree(self.tmp, ignore_errors=True)
        self.tasks: dict[str, int] = {}
        self.episodes: list[dict] = []
        self.rows: dict[str, list] = {
            key: [] for key in self.columns
        }  # kept for the exact statistics of all frames
        self.histograms: dict[str, list] = {key: [] for key in self.cameras}
        self.frames = 0
        self.videos = {key: self._open_video(key) for key in self.cameras}
        fields = [(key, self._arrow_type(key)) for key in self.columns]
        (self.tmp / "data/chunk-000").mkdir(parents=True)
        path = self.tmp / "data/chunk-000/file-000.parquet"
        self.parquet = pq.ParquetWriter(path, pa.schema(fields), compression="snappy")

    def add_episode(self, arrays: dict, task: str) -> None:
        """Append one episode: arrays[key] is (n, ...) with the declared shape, for every declared key."""
        place = f"{self.root}: episode {len(self.episodes)}"
        wanted = self.features.keys() - BOOKKEEPING.keys()
        if arrays.keys() != wanted:
            raise DataError(f"{place}: keys {sorted(arrays)}, expected {sorted(wanted)}")
        length = len(next(iter(arrays.values())))
        for key, array in arrays.items():
            expected = (length, *self.features[key]["shape"])
            if np.shape(array) != expected or length == 0:
                raise DataError(
                    f"{place}: {key}: shape {np.shape(array)}, expected {expected}, one frame or more"
                )
        index = np.arange(length)
        number = len(self.episodes)
        arrays = arrays | {
            "timestamp": index / self.fps,
            "frame_index": index,
            "index": index + self.frames,
        }
        arrays["episode_index"] = np.full(length, number)
        arrays["task_index"] = np.full(length, self.tasks.setdefault(task, len(self.tasks)))
        columns = {key: np.asarray(arrays[key], dtype) for key, dtype in self.columns.items()}
        table = [pa.array(c.reshape(-1)) for c in columns.values()]
        sizes = [self.features[key]["shape"][0] for key in columns]
        table = [
            a if n == 1 else pa.FixedSizeListArray.from_arrays(a, n)
            for a, n in zip(table, sizes, strict=True)
        ]
        self.parquet.write_table(
            pa.Table.from_arrays(table, schema=self.parquet.schema), row_group_size=length
        )

        row = {
            "episode_index": number,
            "tasks": [task],
            "length": length,
            "data/chunk_index": 0,
            "data/file_index": 0,
        }
        row |= {"dataset_from_index": self.frames, "dataset_to_index": self.frames + length}
        statistics = {}
        for key in self.cameras:
            container, stream = self.videos[key]
            for k, image in enumerate(arrays[key]):
                frame = av.VideoFrame.from_ndarray(
                    np.ascontiguousarray(image, dtype=np.uint8), format="rgb24"
                )
                frame.pts, frame.time_base = self.frames + k, 1 / self.rate
                if k == 0:
                    frame.pict_type = (
                        av.video.frame.PictureType.I
                    )  # an episode can be decoded without the one before
                container.mux(stream.encode(frame))
            row |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": 0}
            row[f"videos/{key}/from_timestamp"] = self.frames / self.fps
            row[f"videos/{key}/to_timestamp"] = (self.frames + length) / self.fps
            chosen = np.unique(np.linspace(0, length - 1, SAMPLED_FRAMES).astype(int))
            pixels = np.stack([arrays[key][i] for i in chosen]).reshape(-1, 3)
            histogram = np.stack([np.bincount(pixels[:, c], minlength=256) for c in range(3)])
            self.histograms[key].append((histogram, len(chosen)))
            statistics[key] = image_statistics(histogram, len(chosen))
        for key, column in columns.items():
            self.rows[key].append(column)
            statistics[key] = column_statistics(column)
        row |= {
            f"stats/{key}/{name}": value
            for key in statistics
            for name, value in statistics[key].items()
        }
        self.episodes.append(row | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
        self.frames += length

    def finish(self) -> None:
        """Close the files, write the metadata and rename `<root>.tmp` to `root`."""
        self.parquet.close()
        for container, stream in self.videos.values():
            container.mux(stream.encode())
            container.close()
        meta = self.tmp / "meta"
        (meta / "episodes/chunk-000").mkdir(parents=True)
        pq.write_table(
            pa.Table.from_pylist(self.episodes), meta / "episodes/chunk-000/file-000.parquet"
        )
        tasks = pa.table({"task_index": list(self.tasks.values()), "task": list(self.tasks)})
        pq.write_table(
            tasks.replace_schema_metadata({"pandas": json.dumps(TASK_INDEX)}),
            meta / "tasks.parquet",
        )
        statistics = {
            key: column_statistics(np.concatenate(rows)) for key, rows in self.rows.items() if rows
        }
        for key, histograms in self.histograms.items():
            if histograms:
                statistics[key] = image_statistics(
                    sum(h for h, _ in histograms), sum(n for _, n in histograms)
                )
        (meta / "stats.json").write_text(json.dumps(statistics, indent=4))
        info = {
            "codebase_version": "v3.0",
            "robot_type": self.robot_type,
            "total_episodes": len(self.episodes),
        }
        info |= {"total_frames": self.frames, "total_tasks": len(self.tasks), "chunks_size": 1000}
        info |= {"data_files_size_in_mb": 100, "video_files_size_in_mb": 200, "fps": self.fps}
        info |= {"splits": {"train": f"0:{len(self.episodes)}"}}
        info |= {"data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"}
        info |= {
            "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        }
        (meta / "info.json").write_text(json.dumps(info | {"features": self.features}, indent=4))
        self.tmp.rename(self.root)

    def _arrow_type(self, key):
        kind, n = pa.from_numpy_dtype(np.dtype(self.columns[key])), self.features[key]["shape"][0]
        return (
            kind if n == 1 else pa.list_(kind, n)
        )  # lerobot stores vectors of one number as scalars

    def _open_video(self, key):
        path = self.tmp / f"videos/{key}/chunk-000/file-000.mp4"
        path.parent.mkdir(parents=True)
        container = av.open(path, "w")
        # A keyframe every second frame and no B-frames: random access costs at most two decoded frames.
        options = {"g": "2", "bf": "0", "crf": "18", "preset": "veryfast"}
        stream = container.add_stream("libx264", rate=self.rate, options=options)
        stream.height, stream.width = self.features[key]["shape"][:2]
        stream.pix_fmt = "yuv420p"
        return container, stream


def column_statistics(values: np.ndarray) -> dict:
    """(frames, n) or (frames,) -> min, max, mean, std and quantiles (n,), count (1,), as lists."""
    values = values.reshape(len(values), -1).astype(np.float64)
    result = {
        name: getattr(values, name)(axis=0).tolist() for name in ("min", "max", "mean", "std")
    }
    result["count"] = [len(values)]
    return result | {name: np.quantile(values, q, axis=0).tolist() for name, q in QUANTILES.items()}


def image_statistics(histogram: np.ndarray, count: int) -> dict:
    """Histograms of 8-bit values per channel (3, 256) -> the same statistics in 0..1 with shape (3, 1, 1)."""
    levels, share = np.arange(256) / 255, histogram / histogram.sum(axis=1, keepdims=True)
    mean, cumulative, seen = share @ levels, np.cumsum(share, axis=1), histogram > 0
    result = {"min": levels[seen.argmax(axis=1)], "max": levels[255 - seen[:, ::-1].argmax(axis=1)]}
    result |= {"mean": mean, "std": np.sqrt(np.maximum(share @ levels**2 - mean**2, 0))}
    result |= {name: levels[(cumulative >= q).argmax(axis=1)] for name, q in QUANTILES.items()}
    return {name: value.reshape(3, 1, 1).tolist() for name, value in result.items()} | {
        "count": [count]
    }


# What pandas needs to read the text column of tasks.parquet as the index, as lerobot expects it.
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
