"""benchmarks/evidence.py as a user runs it, on runs of five steps: training, resuming, tables."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import evaluate
from common import config
from common.build import build

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # as when a benchmark is run


def fresh():
    """The module, as no test has changed it."""
    spec = importlib.util.spec_from_file_location("evidence", ROOT / "benchmarks/evidence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = sorted(path.stem for path in (ROOT / "benchmarks/tables").glob("*.yaml"))
FIVE_STEPS = {
    "label": "five steps",
    "script": "train_flow_matching.py",
    "config": "configs/naive_flow_matching_policy/avoid/train.yaml",
    "overrides": ["train.total_steps=5", "data.batch_size=32"],
    "evaluate": {"replan_steps": 25, "episodes": 12},
}


@pytest.fixture
def evidence(monkeypatch, tmp_path):
    """The module with a single table, `tiny`, whose last row is broken."""
    module = fresh()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shorter = FIVE_STEPS | {"label": "five steps, shorter chunks", "evaluate": {}}
    broken = FIVE_STEPS | {"label": "broken", "overrides": ["data.no_such_key=1"]}
    table = {"evaluate": {"env": "avoid"}, "rows": [FIVE_STEPS, shorter, broken]}
    monkeypatch.setattr(module, "TABLES", tmp_path / "tables")
    module.TABLES.mkdir()
    (module.TABLES / "tiny.yaml").write_text(yaml.safe_dump(table))
    return module


@pytest.mark.slow
def test_a_table_is_what_its_runs_measured(evidence, tmp_path, capsys, monkeypatch):
    out_folder = tmp_path / "out"
    command = ["tiny", "--out", str(out_folder), "--seeds", "0", "1", "--jobs", "1", "--nfe"]
    assert evidence.main([*command, "1", "2"]) == 1  # one row is broken, the others are done
    out, err = capsys.readouterr()
    assert "no_such_key" in err + out
    assert "broken" not in out
    trained = sorted(out_folder.glob("*/seed_*/trained"))
    assert len(trained) == 2  # rows share their runs
    results = {
        file: json.loads(file.read_text()) for file in out_folder.glob("*/seed_*/*/results.json")
    }
    assert len(results) == 4
    metas = [json.loads((file.parents[1] / "step_5/meta.json").read_text()) for file in results]
    assert {meta["config"]["seed"] for meta in metas} == {0, 1}
    assert {r["seed"] for r in results.values()} == {0, 1}
    for label, episodes in (("five steps", 12), ("five steps, shorter chunks", 100)):
        line = next(line for line in out.splitlines() if line.startswith(f"| {label} |"))
        own = [r["results"] for r in results.values() if r["results"][0]["episodes"] == episodes]
        cells = [cell.strip() for cell in line.split("|")[5:-1]]
        for i, cell in enumerate(cells):
            success = [r[i]["success"] for r in own]
            assert float(re.match(r"[\d.]+", cell)[0]) == pytest.approx(np.mean(success), abs=6e-4)
    assert (out_folder / "tiny.png").stat().st_size > 5000

    called = []

    def call(command, log):
        called.append(command)
        raise RuntimeError("not today")

    def scripts():
        return [command[0] for command in called if "no_such_key" not in str(command)]

    monkeypatch.setattr(evidence, "call", call)
    next(iter(results)).unlink()  # one evaluation is missing: only that is done again
    assert evidence.main([*command, "1", "2"]) == 1
    assert scripts() == ["evaluate.py"]
    called.clear()
    evidence.main([*command, "2", "4"])  # NFE 4 was not measured
    assert scripts() == ["evaluate.py"] * 4


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"overides": []}, "rows.0.overides: unknown key; did you mean 'overrides'?"),
        ({"script": "train_fm.py"}, "rows.0.script: no such file: train_fm.py"),
        ({"config": "configs/none.yaml"}, "rows.0.config: no such file: configs/none.yaml"),
        ({"label": None}, "rows.0.label: expected str, found null"),
    ],
)
def test_mistakes_in_a_table_are_named(evidence, change, problem):
    (evidence.TABLES / "tiny.yaml").write_text(yaml.safe_dump({"rows": [FIVE_STEPS | change]}))
    with pytest.raises(config.ConfigError, match=rf"tiny\.yaml:\d+: {re.escape(problem)}"):
        evidence.main(["tiny"])


def test_a_row_takes_the_options_of_its_table(evidence):
    options = [row.evaluate for row in evidence.read_table("tiny").rows]
    assert options[:2] == [
        {"env": "avoid", "replan_steps": 25, "episodes": 12},
        {"env": "avoid"},
    ]


def test_every_table_names_what_there_is(monkeypatch):
    """Scripts, configs, keys of a script's Config, and options of evaluate.py."""
    monkeypatch.chdir(ROOT)  # where overrides with ./ start
    module = fresh()
    for row in [row for name in TABLES for row in module.read_table(name).rows]:
        path = ROOT / row.script
        spec = importlib.util.spec_from_file_location(path.stem, path)
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        argv = ["--config", str(ROOT / row.config), *row.overrides]
        cfg, _ = config.load(script.Config, script.__file__, argv, "")
        assert cfg.seed == 0
        words = [word for name, value in row.evaluate.items() for word in (f"--{name}", str(value))]
        options = evaluate.arguments(["--checkpoint", "run", *words])
        assert options.env in evaluate.ENVIRONMENTS


def test_rows_share_a_run_folder_only_if_they_train_the_same(tmp_path):
    module = fresh()
    folders = {}
    for row in [row for name in TABLES for row in module.read_table(name).rows]:
        folder = row.folder(tmp_path, 0)
        trained = (row.script, row.config, row.overrides)
        assert re.fullmatch(r"[\w.=,-]+", folder.parent.name)
        assert folders.setdefault(folder, trained) == trained
    fork = module.Row(**FIVE_STEPS | {"script": "my_lab/train_flow_matching_twice.py"})
    assert fork.folder(tmp_path, 0) != module.Row(**FIVE_STEPS).folder(tmp_path, 0)


def test_finished_runs_of_the_first_version_are_found_where_they_are_the_same(tmp_path):
    """It had codes where vfp_single_expert/avoid/train.yaml has a Gaussian latent now."""
    module = fresh()
    rows = {row.label: row for name in TABLES for row in module.read_table(name).rows}
    evaluation = "evaluation_envavoid_execute25_episodes960_batch960"
    for label, name in (
        (
            "naive, loss.target=velocity",
            "naive_flow_matching_policy,avoid,train,loss.target=velocity",
        ),
        ("research objective (control)", "variational_flow_matching_policy,avoid,train_research"),
        ("no K-OT", "vfp_single_expert,avoid,train_gaussian,train.optim.peak_lr=1e-3"),
    ):
        assert rows[label].results(tmp_path, 2) == tmp_path / name / "seed_2" / evaluation
    codes = [
        f"vfp_single_expert,{config}"
        for config in ("avoid,train", "avoid,train_closed", "avoid,train,data.root=avoid-skewed")
    ]
    folders = {
        row.folder(tmp_path, 0).parent.name
        for name in TABLES
        for row in module.read_table(name).rows
    }
    assert not folders & {*codes}


FACTS = {  # of the generated datasets
    "avoid": {"action_dim": 2, "state_dim": 4, "num_cameras": 0},
    "tabletop": {"action_dim": 6, "state_dim": 6, "num_cameras": 3},
    "tabletop-hard": {"action_dim": 6, "state_dim": 6, "num_cameras": 3},
}
COMPARED = {  # configs of equal size, by folder of configs/
    "avoid/train": [
        "naive_flow_matching_policy",
        "vfp_single_expert",
        "cfg_vqvae_flow_matching",
        "variational_flow_matching_policy",
    ],
    "avoid/train_closed": ["naive_flow_matching_policy", "cfg_vqvae_flow_matching"],
    "tabletop/train": [
        "naive_flow_matching_policy",
        "vfp_single_expert",
        "cfg_vqvae_flow_matching",
        "variational_flow_matching_policy",
    ],
    "tabletop_hard/train": [
        "naive_flow_matching_policy",
        "cfg_vqvae_flow_matching",
        "variational_flow_matching_policy",
    ],
}


@pytest.mark.parametrize("name", COMPARED)
def test_policies_that_are_compared_have_as_many_parameters(name):
    """Within 5 %: the naive policy's networks are wider, so that no latent wins by its size."""
    sizes = []
    for policy in COMPARED[name]:
        cfg = config.Yaml.read(ROOT / "configs" / policy / f"{name}.yaml").data
        data = cfg["data"]
        facts = FACTS[data["root"]] | {
            "action_horizon": data["action_horizon"],
            "proprio_history": data["obs_proprio_history"],
        }
        paths = cfg["model"]["component_config_paths"].values()
        folder = (ROOT / "configs" / policy / name).parent
        parts = [build(config.Yaml.read(folder / path), facts) for path in paths]
        sizes.append(sum(p.numel() for part in parts for p in part.parameters()))
    assert len(sizes) > 1
    assert max(sizes) < 1.05 * min(sizes)


def test_unknown_tables_are_named(evidence, capsys):
    with pytest.raises(SystemExit):
        evidence.main(["avoidance"])
    error = capsys.readouterr().err
    assert "'avoidance'" in error
    assert "tiny" in error
