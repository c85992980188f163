"""Checkpoints with mutated manifests and damaged files: each command works, or says why not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import Experiment, forget_accelerator
from fuzz import damaged, ending, mutated
from helpers import rewrite_meta
from safetensors.torch import load_file, save_file

import evaluate
import train_mi
from common import checkpoint, plots, run

SCRIPTS = ("train_flow_matching", "train_vfp", "train_vfp_moe", "train_cfg_vqvae", "train_mi")
FREEZE = "model.component_build_args={action_decoder: {freeze: true}}"
CASES = [pytest.param(n, marks=[pytest.mark.slow] if n >= 15 else []) for n in range(200)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, demos):
    """script -> a finished run of one step; some have a frozen component, some schedule-free."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_mi, "scored", lambda job: 0)
        patch.setattr(run, "draw_curves", lambda folder: None)
        for script in SCRIPTS:
            exp = Experiment(tmp_path_factory.mktemp(script) / "exp", demos, script)
            settings = ["train.total_steps=1"]
            if script == "train_flow_matching":
                settings.append(FREEZE)
            if script == "train_vfp":
                settings.append("train.optim={type: schedule_free_radam}")
            exp.settings = settings[1:]
            exp.main(*settings)
            found[script] = exp
    forget_accelerator()
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Figures cost more than all the rest."""
    for name in vars(plots).copy():
        if name.startswith("draw_"):
            monkeypatch.setattr(plots, name, lambda *args, **kwargs: Path(args[-1]).touch())
    monkeypatch.setattr(run, "draw_curves", lambda folder: None)
    monkeypatch.setattr(train_mi, "scored", lambda job: 0)


def hostile(folder, rng):
    """Change one thing of a checkpoint; its hashes are those of the new content, or are not."""
    kind = rng.choice(["meta", "component", "tensor", "bytes"], p=[0.4, 0.1, 0.2, 0.3])
    if kind == "meta":
        hostile_meta(folder, rng)
        return
    if kind == "component":
        rewrite_meta(folder, lambda meta: hostile_component(meta["components"], rng))
        return
    files = sorted(file for file in folder.rglob("*.safetensors"))
    file = files[rng.integers(len(files))]
    if kind == "tensor":
        save_file(hostile_tensors(load_file(file), rng), file)
    else:
        file.write_bytes(damaged(file.read_bytes(), rng))
    if kind == "tensor" or rng.random() < 0.7:
        entry = [file.stat().st_size, checkpoint.sha256(file)]
        name = str(file.relative_to(folder))
        rewrite_meta(folder, lambda meta: meta["files"].update({name: entry}))


def hostile_meta(folder, rng):
    meta = json.loads((folder / "meta.json").read_text())
    digest = meta.pop("sha256")
    part = rng.choice(["all", "config", "others"])
    if part == "config":
        meta["config"] = mutated(meta["config"], rng)
    elif part == "others":
        meta |= mutated({key: meta[key] for key in meta if key != "config"}, rng)
    else:
        meta = mutated(meta, rng)
    if rng.random() < 0.9:
        digest = checkpoint._digest(meta)
    (folder / "meta.json").write_text(json.dumps({**meta, "sha256": digest}))


def hostile_component(components, rng):
    name = rng.choice(sorted(components))
    component = mutated(yaml.safe_load(components[name]), rng)
    components[name] = json.dumps(component)  # which is YAML


def hostile_tensors(tensors, rng):
    """One tensor is missing, renamed, doubled, of another shape or kind, or has other numbers."""
    name = rng.choice(sorted(tensors))
    x = tensors.pop(name)
    kind = rng.choice(["remove", "rename", "add", "shape", "scalar", "dtype", "huge", "nan"])
    if kind == "rename":
        tensors[f"{name}x"] = x
    elif kind != "remove":
        tensors[name] = x
    if kind == "add":
        tensors["parts.backbone/step"] = torch.ones(1)
    elif kind == "shape":
        tensors[name] = torch.stack([x, x])
    elif kind == "scalar":
        tensors[name] = x.flatten()[:1].clone()[0]
    elif kind == "dtype":
        kinds = (torch.int64, torch.bool, torch.float64, torch.float16, torch.complex64)
        tensors[name] = x.to(kinds[rng.integers(len(kinds))])
    elif kind in ("huge", "nan"):
        tensors[name] = torch.full_like(x.float(), 1e38 if kind == "huge" else torch.nan)
    return tensors


def command(exp, kind, tmp_path):
    """A command that reads the checkpoint in tmp_path/run."""
    folder = tmp_path / "run"
    if kind == "evaluate":
        out = ["--out", str(tmp_path / "out"), "--nfe", "1"]
        return lambda: evaluate.main(["--checkpoint", str(folder), *out])
    if kind == "score":
        return lambda: train_mi.rescore(["--score", str(folder)])
    if kind == "resume":
        settings = [f"train.save_dir={folder}", "train.total_steps=2"]
    else:
        settings = [f"train.save_dir={tmp_path / 'new'}", f"train.load_dir={folder}"]
        settings.append("train.total_steps=1")
    return lambda: exp.main(*exp.settings, *settings)


def stopped(main):
    """main(), for which weights that are huge may end the run by its own check of the loss."""

    def call():
        try:
            return main()
        except SystemExit as e:
            if "not finite" not in str(e):
                raise
            return 0

    return call


@pytest.mark.parametrize("seed", CASES)
def test_a_hostile_checkpoint_is_one_message_at_most(runs, seed, tmp_path, capsys, monkeypatch):
    rng = np.random.default_rng(seed)
    exp = runs[SCRIPTS[seed % len(SCRIPTS)]]
    acts = "score" if exp.script == "train_mi" else "evaluate"
    kind = (acts, "resume", "load_dir")[seed // len(SCRIPTS) % 3]
    shutil.copytree(exp.save_dir, tmp_path / "run")
    hostile(tmp_path / "run/step_1", rng)
    monkeypatch.chdir(tmp_path)
    ending(stopped(command(exp, kind, tmp_path)), capsys)
    forget_accelerator()
