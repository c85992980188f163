"""Speed of the data path on one core; prints a Markdown table.

    python benchmarks/data.py [--rounds 20] [--batch 64] [--size 96]

Writes a small dataset with three cameras to a temporary folder, decodes it into the frame cache, and times random
batches: frames from the cache (here always in memory), samples from Windows, and what `to_device` does to them.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.data.frames import FrameCache
from common.data.lerobot import LeRobotDataset
from common.data.loader import TrainingSet, to_device
from common.data.windows import Windows
from common.data.writer import DatasetWriter
from common.schema import Augment, Data

CAMERAS = {name: f"observation.images.{name}" for name in ("head", "left", "right")}


def write(root, size, rng, episodes=8, length=200):
    """Noise that is smooth enough to be a video."""
    vector = {"dtype": "float32", "shape": [6], "names": None}
    video = {"dtype": "video", "shape": [size, size, 3], "names": ["height", "width", "channels"]}
    features = {
        "observation.state": vector,
        "action": vector,
        **dict.fromkeys(CAMERAS.values(), video),
    }
    writer = DatasetWriter(root, 20, features)
    for _ in range(episodes):
        arrays = {
            key: rng.normal(size=(length, 6)).astype(np.float32)
            for key in ("observation.state", "action")
        }
        for key in CAMERAS.values():
            arrays[key] = (
                rng.integers(0, 255, (length, 8, 8, 3), np.uint8)
                .repeat(size // 8, 1)
                .repeat(size // 8, 2)
            )
        writer.add_episode(arrays, task="none")
    writer.finish()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--size", type=int, default=96, help="side of the pictures, a multiple of 8"
    )
    options = parser.parse_args()
    rng, size, batch = np.random.default_rng(0), options.size, options.batch
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "set", size, rng)
        dataset = LeRobotDataset(Path(folder) / "set")
        frames = FrameCache.open(
            dataset, CAMERAS, (size, size), None, Path(folder) / "cache", max_gb=10
        )
        settings = {"root": "set", "cameras": CAMERAS, "image_size": [size, size], "HZ": 20.0}
        cfg = Data(**settings, augment=Augment(), action_horizon=32, obs_proprio_history=6)
        windows = Windows(cfg, dataset, list(range(8)), frames)
        loaded = TrainingSet(windows, seed=0)
        rows = [rng.choice(len(windows), batch) for _ in range(options.rounds + 1)]
        cases = {
            "frames of one camera": (lambda r: frames.gather("head", r), "frames"),
            "Windows, three cameras": (lambda r: windows[r], "samples"),
            "to_device, plain": (lambda b: to_device(dict(b), "cpu"), "samples"),
            "to_device, augmented": (lambda b: to_device(dict(b), "cpu", cfg.augment), "samples"),
        }
        print(
            f"\nBatch {batch}, {size} x {size}, one thread, median of {options.rounds} rounds; ms per batch:\n"
        )
        print("| what | CPU ms | wall ms | per second and core |\n|---|---|---|---|")
        for name, (run, unit) in cases.items():
            inputs = [loaded[0, 0, r] for r in rows] if name.startswith("to_device") else rows
            times = []
            for item in inputs:
                start = time.process_time(), time.perf_counter()
                run(item)
                times.append((time.process_time() - start[0], time.perf_counter() - start[1]))
            cpu, wall = (statistics.median(both[k] for both in times[1:]) for k in (0, 1))
            print(f"| {name} | {1000 * cpu:.2f} | {1000 * wall:.2f} | {batch / cpu:,.0f} {unit} |")


if __name__ == "__main__":
    main()
