"""benchmarks/curation.py on nine demonstrations: how they are ranked, what is kept, and what is told of it."""

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

import train_flow_matching
from common import config, information, run
from common.data import scores
from common.data.lerobot import LeRobotDataset, cache_folder
from common.data.loader import Data
from common.envs import mixed

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def curation(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    module = importlib.import_module("curation")
    monkeypatch.setattr(module, "STEPS", {"tabletop": ("train.total_steps=2", "data.batch_size=4")})
    monkeypatch.setattr(run, "draw_curves", lambda folder: None)
    return module


def test_rankings_are_made_told_of_and_used(curation, tmp_path, monkeypatch, capsys):
    mixed.generate_tabletop(
        demos := cache_folder() / "tabletop-mixed", episodes=9, image_size=(32, 32)
    )
    dataset, trained = LeRobotDataset(demos), []
    made = [
        int(columns["quality"][0, 0]) for _, columns in dataset.read(["quality"], dataset.episodes)
    ]

    def call(command, log):
        argv = dict(word.split("=", 1) for word in command if "=" in word)
        if command[0] == "train_mi.py":  # one that knows
            folder = Path(argv["train.save_dir"])
            folder.mkdir()
            knows = information.rank(
                -1.0 * (np.array(made) > 0) - 0.01 * np.arange(9), np.arange(9)
            )
            scores.save_scores(knows, folder / "scores.parquet", dataset)
        else:
            trained.append(yaml.safe_load(argv["data.episodes"]))
            assert train_flow_matching.main(command[1:]) == 0

    monkeypatch.setattr(curation.evidence, "call", call)
    curation.ranked("tabletop", 0, tmp_path)
    assert trained == [[0, 2, 4, 6, 8], [1, 3, 5, 7]]
    curation.ranked("tabletop", 0, tmp_path)
    assert len(trained) == 2  # what is there is not made again
    tables = {
        kind: pq.read_table(tmp_path / f"rankings/tabletop/seed_0/{kind}.parquet")
        for kind in curation.KEPT
    }
    assert all(sorted(table["episode"].to_pylist()) == [*range(9)] for table in tables.values())
    assert len({tuple(table["episode"].to_pylist()) for table in tables.values()}) == 3

    capsys.readouterr()
    curation.report("tabletop", [0], tmp_path)
    lines = re.findall(r"^\| (by [\w ]+) \| (.*) \|$", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, _ in lines] == list(curation.KEPT.values())
    assert lines[0][1] == " | ".join(["1.000 (1.000-1.000)"] * 5)
    assert all(0 <= float(cell[:5]) <= 1 for _, cells in lines for cell in cells.split(" | "))

    kept, rows = set(), list(curation.rows("tabletop", tmp_path))
    assert len({row.folder(tmp_path, 0) for row in rows}) == len(rows) == 8
    for row in rows:
        script = importlib.import_module(row.script.removesuffix(".py"))
        changes = [change.replace("{seed}", "0") for change in row.overrides]
        file = ROOT / row.config
        cfg, _ = config.load(script.Config, script.__file__, ["--config", str(file), *changes], "")
        episodes = Data(cfg.data).episodes  # the last is held out
        assert len(episodes) == (5 if cfg.data.scores else 8)
        kept.add((row.label.split(", ")[1], *episodes))
    assert len(kept) == 4
    assert [episodes for label, *episodes in kept if label.endswith("mutual information")] == [
        [number for number in range(8) if made[number] == 0][:5]
    ]
