"""Helpers that several test modules share."""

import json
import os
import sys
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.data.writer import DatasetWriter

ROOT = Path(__file__).resolve().parents[1]

# runs
TIMING = ("data_s", "updt_s", "samples_per_s")
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def steps_of(log):
    """Lines of log.jsonl without what depends on the clock."""
    lines = map(json.loads, log.read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def assert_same_run(a, b, name):
    """Checkpoints `name` of two run folders hold the same bytes, their logs the same numbers."""
    metas = [json.loads((folder / name / "meta.json").read_text()) for folder in (a, b)]
    assert metas[0]["files"] == metas[1]["files"]
    assert metas[0]["optimizers"] == metas[1]["optimizers"]
    assert steps_of(a / "log.jsonl") == steps_of(b / "log.jsonl")


def environment():
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
    }


# datasets
SHARED = ROOT.parent / "shared/data"
PAINTED_LENGTHS = (30, 17, 45)
PAINTED_SIZE = (64, 96)
PAINTED_CAMERAS = ["observation.images.head", "observation.images.left"]
PAINTED_VIDEO = f"videos/{PAINTED_CAMERAS[1]}/chunk-000/file-000.mp4"


def real_dataset(name):
    if not (SHARED / name).is_dir():
        pytest.skip(f"real dataset {name} is not on this machine")
    return SHARED / name


def paint(number, inverted=False):
    """A picture (64, 96, 3) of 12 blocks that spell a number in binary."""
    bits = (number >> np.arange(12) & 1).reshape(2, 6) ^ inverted
    return np.repeat((50 + 150 * bits).repeat(32, 0).repeat(16, 1)[..., None], 3, axis=2).astype(
        np.uint8
    )


def spelled(image, inverted=False):
    """The number in a picture (3, 64, 96)."""
    bits = image.mean(0).reshape(2, 32, 6, 16).mean((1, 3)) > 125
    return int((bits ^ inverted).ravel() @ (1 << np.arange(12)))


def write_painted(root, lengths=PAINTED_LENGTHS, fps=20):
    """Frame and row k carry the number k; the left camera is inverted. -> state, action."""
    vector = {"dtype": "float32", "shape": [6], "names": list("abcdef")}
    video = {
        "dtype": "video",
        "shape": [*PAINTED_SIZE, 3],
        "names": ["height", "width", "channels"],
    }
    done = {"dtype": "bool", "shape": [1], "names": None}
    features = {
        "observation.state": vector,
        "action": vector,
        "next.done": done,
        **dict.fromkeys(PAINTED_CAMERAS, video),
    }
    writer = DatasetWriter(root, fps, features, "two_arms")
    rng, first, wrote = np.random.default_rng(0), 0, []
    for number, length in enumerate(lengths):
        state, action = rng.normal(size=(2, length, 6)).astype(np.float32)
        head, left = (
            [paint(first + k, inverted) for k in range(length)] for inverted in (False, True)
        )
        arrays = {
            "observation.state": state,
            "action": action,
            "next.done": np.arange(length)[:, None] == length - 1,
        }
        writer.add_episode(
            arrays | dict(zip(PAINTED_CAMERAS, (head, left), strict=True)),
            task=("lift", "drop")[number % 2],
        )
        first += length
        wrote.append((state, action))
    writer.finish()
    return [np.concatenate(parts) for parts in zip(*wrote, strict=True)]


def write_v2(root, tables, info=None):
    """A v2.1 folder from {episode: parquet columns}."""
    for index, columns in tables.items():
        path = root / f"data/chunk-000/episode_{index:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
    (root / "meta").mkdir()
    rows = [
        {"episode_index": index, "length": len(next(iter(c.values())))}
        for index, c in tables.items()
    ]
    (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    template = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    info = {"codebase_version": "v2.1", "fps": 30.0, "data_path": template, "features": {}} | (
        info or {}
    )
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


def reencode(path, frames):
    """Only the first frames of a video."""
    short = path.with_suffix(".short.mp4")
    with av.open(path) as source, av.open(short, "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in [p for p in source.demux(video=0) if p.size][:frames]:
            packet.stream = stream
            target.mux(packet)
    short.rename(path)


# environments


def still(env, grip=None):
    """The action that holds the grippers where they are, at `grip` or the present one."""
    grips = env.grips if grip is None else np.full(2, grip)
    return np.column_stack([env.grippers, grips]).ravel()


def carry(env, *centres, angle=0.0, steps=30):
    """Move the held bar through `centres` in straight lines at one angle; the last result."""
    half = env.bar_length / 2 * np.array([np.cos(angle), np.sin(angle)])
    for centre in centres:
        start = env.grippers.mean(0)
        for share in np.linspace(0, 1, steps + 1)[1:]:
            middle = start + share * (np.array(centre) - start)
            result = env.step([*(middle - half), 1, *(middle + half), 1])
            if result[2] or result[3]:
                return result
    return result


def pinhole(point, position, target, focal, size):
    """Pixel of a world point by angles: yaw, then pitch. Written without geometry.camera()."""
    dx, dy, dz = np.subtract(target, position)
    yaw, pitch = np.arctan2(dx, dy), np.arctan2(-dz, np.hypot(dx, dy))
    x, y, z = np.subtract(point, position)
    x, y = x * np.cos(yaw) - y * np.sin(yaw), x * np.sin(yaw) + y * np.cos(yaw)
    y, z = y * np.cos(pitch) - z * np.sin(pitch), y * np.sin(pitch) + z * np.cos(pitch)
    return size[1] / 2 + focal * size[0] * x / y, size[0] / 2 - focal * size[0] * z / y
