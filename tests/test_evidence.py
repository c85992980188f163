"""benchmarks/evidence.py as a user runs it, on runs of five steps: what it trains, repeats, resumes and prints."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

import evaluate
from common import config
from common.build import build

ROOT = Path(__file__).resolve().parents[1]


def fresh():
    """The module, as no test has changed it."""
    spec = importlib.util.spec_from_file_location("evidence", ROOT / "benchmarks/evidence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def evidence(monkeypatch):
    module = fresh()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    short = ("train.total_steps=5", "data.batch_size=32")
    again = module.episodes("avoid", 12, 25)
    rows = [module.Row("five steps", module.NAIVE, "avoid/train.yaml", short, again)]
    rows.append(
        module.Row(
            "five steps, shorter chunks",
            module.NAIVE,
            "avoid/train.yaml",
            short,
            ("--env", "avoid"),
        )
    )
    rows.append(
        module.Row("broken", module.NAIVE, "avoid/train.yaml", ("data.no_such_key=1",), again)
    )
    monkeypatch.setattr(module, "TABLES", {"tiny": rows})
    return module


def test_a_table_is_what_its_runs_measured(evidence, tmp_path, capsys, monkeypatch):
    command = [
        "tiny",
        "--seeds",
        "0",
        "1",
        "--nfe",
        "1",
        "2",
        "--out",
        str(tmp_path),
        "--jobs",
        "1",
    ]
    assert evidence.main(command) == 1  # one row is broken, the others are done all the same
    out, err = capsys.readouterr()
    assert "no_such_key" in err + out
    assert "broken" not in out
    folders = sorted(tmp_path.glob("*/seed_*"))
    assert (
        len([folder for folder in folders if (folder / "trained").exists()]) == 2
    )  # rows share their runs
    results = {
        file: json.loads(file.read_text()) for file in tmp_path.glob("*/seed_*/*/results.json")
    }
    assert len(results) == 4
    assert {
        json.loads((file.parents[1] / "step_5/meta.json").read_text())["config"]["seed"]
        for file in results
    } == {
        0,
        1,
    }
    assert {r["seed"] for r in results.values()} == {0, 1}
    for label, episodes in (("five steps", 12), ("five steps, shorter chunks", 100)):
        line = next(line for line in out.splitlines() if line.startswith(f"| {label} |"))
        own = [r["results"] for r in results.values() if r["results"][0]["episodes"] == episodes]
        cells = [cell.strip() for cell in line.split("|")[5:-1]]
        for i, cell in enumerate(cells):
            success = [r[i]["success"] for r in own]
            assert float(re.match(r"[\d.]+", cell)[0]) == pytest.approx(np.mean(success), abs=6e-4)
    assert (tmp_path / "tiny.png").stat().st_size > 5000

    called = []

    def call(command, log, core):
        called.append(command)
        raise RuntimeError("not today")

    monkeypatch.setattr(evidence, "call", call)
    next(iter(results)).unlink()  # one evaluation is missing: only that is done again
    assert evidence.main(command) == 1
    assert [command[0] for command in called if "no_such_key" not in str(command)] == [
        "evaluate.py"
    ]
    called.clear()
    evidence.main([*command[:-1], "1", "--nfe", "2", "4"])  # NFE 4 was not measured
    assert [command[0] for command in called if "no_such_key" not in str(command)] == [
        "evaluate.py"
    ] * 4


def test_every_row_names_what_there_is_and_has_a_folder_of_its_own(tmp_path):
    module, folders = fresh(), {}
    for row in [row for rows in module.TABLES.values() for row in rows]:
        folder = row.folder(tmp_path, 0)
        assert re.fullmatch(r"[\w.=,-]+", folder.parent.name)
        assert folders.setdefault(folder, (row.policy, row.config, row.overrides)) == (
            row.policy,
            row.config,
            row.overrides,
        )
        script = importlib.import_module(module.SCRIPTS[row.policy].removesuffix(".py"))
        file = ROOT / "configs" / row.policy / row.config
        cfg, _ = config.load(
            script.Config, script.__file__, ["--config", str(file), *row.overrides], ""
        )
        assert cfg.seed == 0
        assert (
            evaluate.arguments(["--checkpoint", "run", *row.evaluate]).env in evaluate.ENVIRONMENTS
        )


FACTS = {  # of the generated datasets
    "avoid": {"action_dim": 2, "state_dim": 4, "num_cameras": 0},
    "tabletop": {"action_dim": 6, "state_dim": 6, "num_cameras": 3},
    "tabletop-hard": {"action_dim": 6, "state_dim": 6, "num_cameras": 3},
}


@pytest.mark.parametrize(
    "name", ["avoid/train", "avoid/train_closed", "tabletop/train", "tabletop_hard/train"]
)
def test_policies_that_are_compared_have_as_many_parameters(name):
    """The naive policy's networks are wider, so that a latent does not win by its size: within 5 %."""
    sizes = []
    for policy, script in fresh().SCRIPTS.items():
        file = ROOT / "configs" / policy / f"{name}.yaml"
        if file.exists():
            script = importlib.import_module(script.removesuffix(".py"))
            cfg, _ = config.load(script.Config, script.__file__, ["--config", str(file)], "")
            sizes_of = {
                "action_horizon": cfg.data.action_horizon,
                "proprio_history": cfg.data.obs_proprio_history,
            }
            paths = cfg.model.component_config_paths.values()
            parts = [
                build(config.Yaml.read(path), FACTS[cfg.data.root] | sizes_of) for path in paths
            ]
            sizes.append(sum(p.numel() for part in parts for p in part.parameters()))
    assert len(sizes) > 1
    assert max(sizes) < 1.05 * min(sizes)


def test_unknown_tables_are_named(evidence, capsys):
    with pytest.raises(SystemExit):
        evidence.main(["avoidance"])
    assert "no table avoidance; there are tiny" in capsys.readouterr().err
