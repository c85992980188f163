"""Frozen, shared and preloaded components; mistakes of users and mistakes in code."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import CAMERAS, Experiment, forget_accelerator, write_demos
from safetensors.torch import load_file, save_file
from torch import nn

import evaluate
import train_cfg_vqvae
import train_flow_matching
import train_mi
import train_vfp
import train_vfp_moe
from common import build, checkpoint, log, optim, preflight, run
from common.blocks.vision import TinyCNN
from common.build import UnknownBlock
from common.config import DataError, UserError, Yaml, refuse_config_of_another_script
from common.data import frames, loader
from common.data.lerobot import cache_folder

FREEZE = "model.component_build_args={backbone: {freeze: true}}"


def part(state, name):
    """The tensors of one component of a policy's state_dict."""
    return {key: value for key, value in state.items() if key.startswith(f"parts.{name}.")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_frozen_components_stay_and_the_others_all_change(experiment):
    exp = experiment("train_vfp")
    exp.main(FREEZE, "train.total_steps=5")
    policy, backbone = exp.job.policy, exp.job.policy.parts["backbone"]
    assert same(part(exp.start, "backbone"), part(policy.state_dict(), "backbone"))
    assert not any(p.requires_grad or p.grad is not None for p in backbone.parameters())
    assert not any(module.training for module in backbone.modules())
    assert all(policy.parts[name].training for name in policy.parts.trainable())
    assert not any(
        same(part(exp.start, n), part(policy.state_dict(), n)) for n in policy.parts.trainable()
    )
    for name in policy.parts.trainable():
        changed = [
            not torch.equal(exp.start[f"parts.{name}.{k}"], p)
            for k, p in policy.parts[name].named_parameters()
        ]
        assert sum(changed) > 0.9 * len(changed), name  # a mask token may not have been drawn


@pytest.fixture
def frozen(experiment):
    """A run whose frozen backbone no file held before."""
    exp = experiment()
    exp.main(FREEZE, "train.total_steps=3")
    return exp, exp.save_dir / "frozen/backbone.safetensors"


def test_a_frozen_component_without_a_file_is_kept_once(frozen):
    exp, _ = frozen
    assert exp.meta("step_3")["frozen"]["backbone"]["path"] == "frozen/backbone.safetensors"
    assert not (exp.save_dir / "step_3/backbone.safetensors").exists()
    policy, _ = checkpoint.open_policy(exp.save_dir)
    assert same(part(exp.start, "backbone"), part(policy.state_dict(), "backbone"))
    start = exp.start
    exp.main(FREEZE, "train.total_steps=5", "seed=1")  # another seed would draw other weights
    assert same(part(start, "backbone"), part(exp.job.policy.state_dict(), "backbone"))
    assert not same(part(start, "backbone"), part(exp.start, "backbone"))
    moved = exp.folder / "elsewhere"
    exp.save_dir.rename(moved)
    assert same(
        part(checkpoint.open_policy(moved)[0].state_dict(), "backbone"), part(start, "backbone")
    )


def test_a_frozen_file_that_is_gone_or_changed_is_named(frozen, tmp_path):
    exp, file = frozen
    away = tmp_path / "weights.safetensors"
    shutil.move(file, away)
    for use in (lambda: checkpoint.open_policy(exp.save_dir), lambda: exp.main(FREEZE)):
        with pytest.raises(
            UserError,
            match=rf"{file}: weights of frozen 'backbone' are gone; .*--weights backbone=PATH",
        ):
            use()
    assert evaluate.main(argv(exp, f"--weights=backbone={away}")) == 0
    with pytest.raises(
        UserError, match=r"nowhere.safetensors: weights of frozen 'backbone' are gone"
    ):
        evaluate.main(argv(exp, "--weights=backbone=nowhere.safetensors"))
    with pytest.raises(UserError, match=r"--weights: \['backbon'\]"):
        evaluate.main(argv(exp, f"--weights=backbon={away}"))
    tensors = load_file(away)
    next(iter(tensors.values())).mul_(1.01)
    save_file(tensors, file)
    for use in (lambda: checkpoint.open_policy(exp.save_dir), lambda: exp.main(FREEZE)):
        with pytest.raises(
            UserError, match=rf"{file}: not the file that 'backbone' was trained with"
        ):
            use()


def argv(exp, *more):
    return [
        "--checkpoint",
        str(exp.save_dir),
        "--out",
        str(exp.folder / "results"),
        "--nfe",
        "2",
        *more,
    ]


@pytest.fixture
def trained(experiment):
    """A finished run of 3 steps, to start others from."""
    exp = experiment(name="first")
    exp.main("train.total_steps=3")
    return exp.save_dir / "step_3"


def test_weights_come_from_init_then_load_dir_then_chance(experiment, trained):
    exp = experiment(name="second")
    other = exp.folder / "other.safetensors"
    tensors = load_file(trained / "info_embedder.safetensors")
    save_file({key: value + 1 for key, value in tensors.items()}, other)
    init = (
        "model.component_build_args={backbone: {init: scratch}, "
        f"info_embedder: {{init: {other}, freeze: true}}}}"
    )
    exp.main(init, f"train.load_dir={trained.parent}", "train.total_steps=3")
    start = exp.start
    assert same(
        part(start, "action_decoder"),
        prefixed(load_file(trained / "action_decoder.safetensors"), "action_decoder"),
    )
    assert same(part(start, "info_embedder"), prefixed(load_file(other), "info_embedder"))
    exp.main("train.total_steps=1", f"train.save_dir={exp.folder / 'fresh'}")
    assert same(part(start, "backbone"), part(exp.start, "backbone"))
    record = exp.meta("step_3")["frozen"]["info_embedder"]
    assert record == {"path": str(other), "sha256": checkpoint.sha256(other)}
    assert not (exp.save_dir / "frozen").exists()
    other.unlink()
    with pytest.raises(UserError, match=rf"{other}: weights of frozen 'info_embedder' are gone"):
        checkpoint.open_policy(exp.save_dir)


def prefixed(tensors, name):
    return {f"parts.{name}.{key}": value for key, value in tensors.items()}


def test_load_dir_that_holds_nothing(experiment, trained):
    exp = experiment(name="second")
    with pytest.raises(UserError, match="holds no checkpoint"):
        exp.main(f"train.load_dir={exp.folder}")
    for file in trained.glob("*.safetensors"):
        file.rename(file.with_suffix(".away"))
    with pytest.raises(UserError, match=r"first/run/step_3/\w+.safetensors is missing"):
        exp.main(f"train.load_dir={trained.parent}")
    with pytest.raises(
        UserError, match="holds no file for any of backbone, info_embedder, action_decoder"
    ):
        exp.main(f"train.load_dir={trained}")


def cameras_of_their_own(exp):
    names = ["head_backbone", "left_backbone", "right_backbone"]
    for name in names:
        shutil.copy(exp.folder / "backbone.yaml", exp.folder / f"{name}.yaml")
    paths = exp.config["model"]["component_config_paths"]
    del paths["backbone"]
    exp.config["model"]["component_config_paths"] = {
        name: f"./{name}.yaml" for name in [*names, *paths]
    }
    exp.config["model"]["component_build_args"] = {"left_backbone": {"same_as": "head_backbone"}}
    exp.write()


def test_a_shared_component_is_one_module_and_one_call(experiment, monkeypatch):
    exp = experiment()
    cameras_of_their_own(exp)
    sizes, forward = [], TinyCNN.forward
    monkeypatch.setattr(
        TinyCNN, "forward", lambda self, image: (sizes.append(len(image)), forward(self, image))[1]
    )
    exp.main("train.total_steps=2", "data.val_episodes=0.0")
    # Two samples in the preflight, for a loss and for a chunk, then two steps of two micro-batches
    # of 4: head and left together, right alone.
    assert sorted(sizes) == sorted([4, 2] * 2 + [8, 4] * 4)
    assert list(exp.job.policy.parts) == [
        "head_backbone",
        "right_backbone",
        "info_embedder",
        "action_decoder",
    ]
    files = {file.stem for file in (exp.save_dir / "step_2").glob("*.safetensors")}
    assert files == {*exp.job.policy.parts, "dataset_stats"}
    policy, cfg = checkpoint.open_policy(exp.save_dir)
    assert policy.parts.aliases == {"left_backbone": "head_backbone"}
    assert list(cfg.data.cameras) == ["head", "left", "right"]


@pytest.mark.parametrize(
    "order", [["head_backbone", "left_backbone"], ["left_backbone", "head_backbone"]]
)
def test_a_shared_component_is_set_up_by_its_own_entry_wherever_it_stands(experiment, order):
    exp = experiment()
    cameras_of_their_own(exp)
    paths = exp.config["model"]["component_config_paths"]
    exp.config["model"]["component_config_paths"] = {
        name: paths[name] for name in [*order, *list(paths)[2:]]
    }
    exp.config["model"]["component_build_args"]["head_backbone"] = {"freeze": True}
    exp.write()
    exp.main("train.total_steps=1")
    assert exp.job.policy.parts.frozen == {"head_backbone"}
    assert exp.job.policy.parts.aliases == {"left_backbone": "head_backbone"}


def test_the_long_form_of_the_readme_is_a_backbone(experiment):
    exp = experiment()
    text = (checkpoint.ROOT / "README.md").read_text()
    block = next(
        part for part in text.split("```") if "backbone.yaml" in part and "nn.Conv2d" in part
    )
    (exp.folder / "backbone.yaml").write_text(
        block.removeprefix("yaml\n").replace("dim: 64", "dim: 16")
    )
    info = exp.folder / "info_embedder.yaml"
    info.write_text(info.read_text().replace("visual_dim: 8", "visual_dim: 16"))
    assert exp.main("train.total_steps=1") == 0
    assert set(exp.job.policy.parts["backbone"].state_dict()) == {"stem.weight", "stem.bias"}


@pytest.mark.parametrize(
    ("script", "name", "old", "new", "found"),
    [
        ("train_flow_matching", "info_embedder", "visual_dim: 8", "visual_dim: 9", 8),
        ("train_vfp", "action_decoder", "latent_dim: 4", "latent_dim: 5", 4),
    ],
)
def test_components_that_do_not_fit_together(experiment, script, name, old, new, found):
    exp = experiment(script)
    edit(name, old, new)(exp)
    key, expected = new.split(": ")
    message = (
        rf"component '{name}' \({exp.folder}/{name}.yaml\): "
        rf"found size {found}, expected {expected}\n"
        rf"    {exp.folder}/{name}.yaml:\d+: args.{key}: {expected}\n(?s:.)*"
        rf"called in {script}.py:\d+: .*\n    the first batch is observation.state \(2, 3, 5\)"
    )
    with pytest.raises(UserError, match=message):
        exp.main()
    assert not list(exp.save_dir.glob("*_*"))


def test_pictures_of_another_size_than_a_component_is_built_for(experiment, capsys):
    exp = experiment()
    args = {"dim": 16, "layers": 1, "state_dim": None, "proprio_history": None, "num_cameras": None}
    content = {
        "block": "mlp_info_encoder",
        "args": {**args, "visual_size": 900, "semantic_dim": 16},
    }
    file = exp.folder / "info_embedder.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(SystemExit) as stopped:
        run.cli(exp.main)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    for text in (
        f"error: component 'info_embedder' ({file}): found size 32, expected 900\n",
        f"{file}:8: args.visual_size: 900\n",
        "called in train_flow_matching.py:",
        "observation.images.head (2, 3, 32, 32)",
    ):
        assert text in error, error
    assert "Traceback" not in error


def torch_error(function, *args):
    with pytest.raises(RuntimeError) as caught:
        function(*args)
    return caught.value


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch_error(nn.Linear(9, 2), torch.zeros(3, 5, 8)),
        lambda: torch_error(nn.LayerNorm(9), torch.zeros(3, 8)),
        lambda: torch_error(nn.LayerNorm((3, 9)), torch.zeros(3, 8)),
        lambda: torch_error(nn.Conv2d(9, 2, 1), torch.zeros(3, 8, 4, 4)),
        lambda: torch_error(torch.add, torch.zeros(3, 8), torch.zeros(9)),
        lambda: torch_error(torch.bmm, torch.zeros(3, 2, 8), torch.zeros(3, 9, 2)),
    ],
)
def test_shape_errors_of_torch_are_read(call):
    text = "inputs: [x]\nblocks:\n  a: {args: {dim: 9, sizes: [7, null]}}\n  b: {args: {dim: 8}}\n"
    source = Yaml.parse(text, "part.yaml")
    problem = "found size 8, expected 9\n    part.yaml:3: blocks.a.args.dim: 9"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Yaml, "read", lambda path: source)
        assert preflight._shape_mistake(call(), source, {}) == problem
        source.data["blocks"]["a"]["args"]["dim"] = None
        found = "found size 8, expected 9\n    part.yaml:4: blocks.b.args.dim: 8"
        assert preflight._shape_mistake(call(), source, {}) == found
        assert preflight._shape_mistake(call(), source, {"dim": 9}) == problem
        assert preflight._shape_mistake(call(), source, {"dim": 1}) == found
        source.data["blocks"]["b"]["args"]["dim"] = True
        assert preflight._shape_mistake(call(), source, {}) == ""
    assert preflight._shape_mistake(ValueError("9 and 8"), source, {}) == ""


FORWARDS = {  # a mistake in the forward of a plugin's block -> its exception
    "return self.nett(image), image.mean((2, 3))": AttributeError,
    "return self.net(image) + torch.zeros(1, 8, 1013, 1), image.mean((2, 3))": RuntimeError,
    "return {}['key']": KeyError,
    "return self.net(torch.cat([image, image], 1)), image.mean((2, 3))": RuntimeError,
}


@pytest.mark.parametrize("line", FORWARDS)
def test_a_mistake_in_the_code_of_a_block_keeps_its_traceback(
    experiment, monkeypatch, capsys, line
):
    exp = experiment()
    (exp.folder / "mistaken_blocks.py").write_text(
        "import torch\n"
        "from common.build import block\n"
        "@block('mistaken')\n"
        "class Mistaken(torch.nn.Module):\n"
        "    def __init__(self, dim):\n"
        "        super().__init__()\n"
        "        self.net = torch.nn.Conv2d(dim, 8, 4, 4)\n"
        "    def forward(self, image):\n"
        f"        {line}\n"
    )
    monkeypatch.syspath_prepend(str(exp.folder))
    monkeypatch.delitem(sys.modules, "mistaken_blocks", raising=False)
    file = exp.folder / "backbone.yaml"
    file.write_text("block: mistaken\nargs: {dim: 3}\n")
    with pytest.raises(FORWARDS[line]) as caught:
        run.cli(lambda: exp.main("plugins=[mistaken_blocks]"))
    assert exp.folder / "mistaken_blocks.py" in [entry.path for entry in caught.traceback]
    assert type(caught.value) is FORWARDS[line]
    header = f"component 'backbone' ({file}) fails on two samples: observation.state (2, 3, 5)"
    assert header in capsys.readouterr().err
    del build._BLOCKS["mistaken"]


def test_a_mistake_in_a_forked_script_keeps_its_traceback(experiment):
    exp = experiment()
    text = Path(train_flow_matching.__file__).read_text()
    fork = exp.folder / "train_mine.py"
    fork.write_text(text.replace("self.encode(", "self.encod("))
    number = next(i for i, line in enumerate(fork.read_text().splitlines(), 1) if "encod(" in line)
    done = subprocess.run(
        [sys.executable, str(fork), *exp.argv("train.total_steps=2")],
        env={**os.environ, "PYTHONPATH": str(checkpoint.ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    header, _, trace = done.stderr.partition("Traceback (most recent call last)")
    assert f"{fork} fails on two samples: observation.state (2, 3, 5), action (2," in header
    assert f'File "{fork}", line {number}, in ' in trace
    assert "AttributeError: " in trace.splitlines()[-1]
    assert "error: " not in done.stderr


MEMORY = {  # exception of torch, whether it says so in its type
    "CUDA out of memory. Tried to allocate 2.00 GiB": torch.OutOfMemoryError,
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes": RuntimeError,
    "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes": RuntimeError,
}


@pytest.mark.parametrize("text", MEMORY)
@pytest.mark.parametrize("training", [False, True])
def test_running_out_of_memory_is_one_message(experiment, monkeypatch, capsys, text, training):
    forward = TinyCNN.forward

    def out_of_memory(self, image):
        if self.training == training:
            raise MEMORY[text](text)
        return forward(self, image)

    monkeypatch.setattr(TinyCNN, "forward", out_of_memory)
    with pytest.raises(SystemExit) as stopped:
        run.cli(experiment().main)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f"error: {text}\n    Memory ran out." in error
    for key in ("data.batch_size", "train.micro_steps", "data.image_size", "loss.draws", "freeze"):
        assert key in error
    assert "fails on" not in error


def test_other_runtime_errors_are_not_dressed_up(experiment, monkeypatch):
    monkeypatch.setattr(optim, "set_learning_rate", lambda *_: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        run.cli(experiment().main)
    monkeypatch.setattr(optim, "set_learning_rate", lambda *_: torch.zeros(2).view(3))
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        run.cli(experiment().main)


def test_a_config_of_another_script_is_refused(experiment):
    naive, latent = experiment(name="naive"), experiment("train_vfp", "latent")
    naive.script, latent.script = latent.script, naive.script
    with pytest.raises(UserError, match=r"lists no 'vae_posterior' and .* of train_flow_matching"):
        naive.main()
    with pytest.raises(
        UserError,
        match=rf"{latent.file} lists 'vae_posterior' and 'vae_prior': .* a config of train_vfp.py",
    ):
        latent.main("loss={kl: 1.0}")


OWNERS = {  # folder of configs -> its script
    "naive_flow_matching_policy": train_flow_matching,
    "vfp_single_expert": train_vfp,
    "variational_flow_matching_policy": train_vfp_moe,
    "cfg_vqvae_flow_matching": train_cfg_vqvae,
    "mutual_information_estimator": train_mi,
}


@pytest.mark.parametrize("folder", OWNERS)
def test_every_config_is_taken_by_its_own_script_alone(folder):
    files = sorted((checkpoint.ROOT / "configs" / folder).glob("*/train*.yaml"))
    assert len(files) > 2
    for file, script in product(files, OWNERS.values()):
        source = Yaml.read(file)
        if script is OWNERS[folder]:
            refuse_config_of_another_script(script.Config, script.__file__, source)
            continue
        owner = Path(OWNERS[folder].__file__).name
        with pytest.raises(UserError, match=rf"{file} lists .*: this is a config of {owner}$"):
            refuse_config_of_another_script(script.Config, script.__file__, source)


def test_a_component_that_the_script_does_not_use(experiment):
    exp = experiment()
    spare = f"model.component_config_paths.spare={exp.folder}/info_embedder.yaml"
    with pytest.raises(
        UserError, match=r"'spare' is listed, but train_flow_matching.py does not use it"
    ):
        exp.main(spare)


def test_a_run_is_not_resumed_by_another_script_and_tells_what_changed(experiment, capsys):
    exp = experiment()
    exp.main("train.total_steps=1")
    assert exp.main("train.total_steps=2", "loss.target=velocity", "train.log_every=1") == 0
    out = capsys.readouterr().out
    assert "warning: train.total_steps was 1, now 2" in out
    assert "log_every" not in out
    meta = exp.meta("step_2")
    checkpoint_meta = exp.save_dir / "step_2" / "meta.json"
    meta["script"] = "train_other.py"
    del meta["sha256"]
    checkpoint_meta.write_text(json.dumps({**meta, "sha256": checkpoint._digest(meta)}))
    with pytest.raises(
        UserError, match=r"step_2: of train_other.py, not of train_flow_matching.py"
    ):
        exp.main("train.total_steps=3")


def test_components_of_an_absent_camera_are_left_out(experiment, capsys):
    exp = experiment()
    cameras_of_their_own(exp)
    exp.config["model"]["component_build_args"]["head_backbone"] = {"freeze": True}
    exp.config["data"]["cameras"] = {name: CAMERAS[name] for name in ("left", "right")}
    exp.write()
    exp.main("train.total_steps=1")
    assert (
        "notice: head_backbone is left out, data.cameras has no 'head'" in capsys.readouterr().out
    )
    assert exp.job.policy.parts.frozen == {"left_backbone"}  # in the place of the one it shares
    policy, _ = checkpoint.open_policy(exp.save_dir)
    assert same(part(policy.state_dict(), "left_backbone"), part(exp.start, "left_backbone"))


@pytest.mark.parametrize("freeze", ["true", "false"])
def test_weights_that_a_block_names_are_loaded_moved_and_not_needed_for_trained_ones(
    experiment, monkeypatch, freeze
):
    exp = experiment()
    (exp.folder / "pretrained_blocks.py").write_text(
        "from pathlib import Path\n"
        "from safetensors.torch import load_file\n"
        "from common.blocks.vision import TinyCNN\n"
        "from common.build import block\n"
        "@block('pretrained_cnn')\n"
        "class PretrainedCNN(TinyCNN):\n"
        "    def __init__(self, dim, width, weights=None):\n"
        "        super().__init__(dim, width)\n"
        "        self.weights = weights\n"
        "    def load_weights(self):\n"
        "        tensors = load_file(self.weights).items()\n"
        "        self.load_state_dict({k.removeprefix('net.'): v for k, v in tensors})\n"
        "        return Path(self.weights)\n"
    )
    monkeypatch.syspath_prepend(str(exp.folder))
    content = {
        "block": "pretrained_cnn",
        "args": {"dim": 8, "width": 4, "weights": "./cnn.safetensors"},
    }
    (exp.folder / "backbone.yaml").write_text(yaml.safe_dump(content))
    file = exp.folder / "cnn.safetensors"
    given = TinyCNN(8, 4).state_dict()
    save_file({f"net.{key}": value for key, value in given.items()}, file)
    settings = [
        "plugins=[pretrained_blocks]",
        f"model.component_build_args={{backbone: {{freeze: {freeze}}}}}",
    ]
    exp.main(*settings, "train.total_steps=2")
    assert same(part(exp.start, "backbone"), prefixed(given, "backbone.block"))
    moved = file.rename(exp.folder / "moved.safetensors")
    if freeze == "true":
        with pytest.raises(UserError, match=rf"{file}: weights of frozen 'backbone' are gone"):
            checkpoint.open_policy(exp.save_dir, plugins=["pretrained_blocks"])
        policy, _ = checkpoint.open_policy(
            exp.save_dir, {"backbone": moved}, plugins=["pretrained_blocks"]
        )
        assert same(part(policy.state_dict(), "backbone"), part(exp.start, "backbone"))
    else:
        checkpoint.open_policy(exp.save_dir, plugins=["pretrained_blocks"])
    del sys.modules["pretrained_blocks"]
    del build._BLOCKS["pretrained_cnn"]


def edit(name, old, new):
    """A change to one component's YAML."""

    def change(exp):
        file = exp.folder / f"{name}.yaml"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    return change


def override(text):
    return lambda exp: exp.overrides.append(text)


def dataset(change):
    """The same demonstrations, copied and harmed."""

    def changed(exp):
        folder = exp.folder / "harmed"
        shutil.copytree(exp.config["data"]["root"], folder)
        exp.overrides.append(f"data.root={folder}")
        change(folder)

    return changed


VIDEO = "videos/observation.images.cam_left/chunk-000/file-000.mp4"


def cut_video(folder):
    data = (folder / VIDEO).read_bytes()
    (folder / VIDEO).write_bytes(data[: len(data) // 2])


def not_a_number(folder):
    file = folder / "data/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    values = table["action"].to_pylist()
    values[14 + 7][2] = float("nan")
    column = table.column_names.index("action")
    field = table.schema.field("action")
    pq.write_table(table.set_column(column, field, pa.array(values, field.type)), file)


def no_episodes(folder):
    file = folder / "meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(file)[:0], file)


def pickled(exp):
    torch.save({}, exp.folder / "weights.pt")
    exp.overrides.append(
        f"model.component_build_args={{backbone: {{init: {exp.folder}/weights.pt}}}}"
    )


def long_form(exp):
    content = {
        "inputs": ["image"],
        "blocks": {
            "a": {"block": "nn.Identity", "in": ["$b"]},
            "b": {"block": "nn.Identity", "in": ["$image"]},
        },
        "return": "$a",
    }
    (exp.folder / "backbone.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def execute(exp):
    text = exp.file.read_text() + "plugins: !!python/object/apply:os.system ['touch executed']\n"
    exp.file.write_text(text)


def one_backbone_too_few(exp):
    cameras_of_their_own(exp)
    del exp.config["model"]["component_config_paths"]["right_backbone"]
    exp.write()


MISTAKES = {
    "unknown key": (override("train.save_evry=3"), r"train.save_evry.*did you mean 'save_every'"),
    "wrong type": (
        override("data.batch_size=many"),
        r"data.batch_size=many: expected int, found \"many\"",
    ),
    "batch too large": (
        override("data.batch_size=90"),
        r"data.batch_size 90 is more than the 83 training samples",
    ),
    "batch indivisible": (
        override("data.batch_size=9"),
        r"data.batch_size 9 must be a multiple of micro_steps",
    ),
    "no such file": (
        lambda exp: (exp.folder / "backbone.yaml").unlink(),
        r"train.yaml:3: .*backbone: no such file: .*backbone.yaml",
    ),
    "unknown block": (
        edit("backbone", "tiny_cnn", "tiny_cn"),
        r"backbone.yaml:4: block: no block 'tiny_cn'; did you mean 'tiny_cnn'",
    ),
    "forward reference": (long_form, r"backbone.yaml:\d+: blocks.a.in: 'b' is not there yet"),
    "wrong dimension": (
        edit("action_decoder", "action_dim: null", "action_dim: 7"),
        r"action_decoder.yaml:\d+: args.action_dim: 7 here, but the dataset has 4",
    ),
    "missing camera": (
        override("data.cameras={head: observation.images.cam_heat}"),
        r"(?s)'observation.images.cam_heat' is not in the dataset; "
        r"did you mean .*cam_head.*available: .*cam_left",
    ),
    "camera without a backbone": (
        one_backbone_too_few,
        "camera 'right' has neither 'right_backbone' nor 'backbone'",
    ),
    "unknown column": (
        override("data.state_keys=[observation.stat]"),
        r"no numeric column 'observation.stat'; did you mean 'observation.state'",
    ),
    "truncated video": (dataset(cut_video), rf"{VIDEO}.*cut short.*episode"),
    "missing video": (
        dataset(lambda folder: (folder / VIDEO).unlink()),
        r"cam_left' is declared in info.json but has no files",
    ),
    "nan": (dataset(not_a_number), r"file-000.parquet: episode 1, frame 7: action\[2\] is nan"),
    "no episodes": (dataset(no_episodes), r"harmed: no episodes"),
    "no scores": (
        lambda exp: exp.overrides.extend(["data.scores=./none.parquet", "data.keep_top=0.5"]),
        r"data.scores=./none.parquet: no such file: .*none.parquet",
    ),
    "no run to start from": (
        override("train.load_dir=./nothing_here"),
        r"train.load_dir=./nothing_here: no such folder: .*nothing_here",
    ),
    "no dataset": (override("data.root=./nothing_here"), r"data.root: no folder .*nothing_here"),
    "no generated dataset": (
        override("data.root=tabletopp"),
        r"no folder 'tabletopp'.*did you mean 'tabletop'",
    ),
    "unwritable folder": (
        lambda exp: exp.overrides.append(f"train.save_dir={exp.file}/run"),
        r"train.save_dir: .*train.yaml/run cannot be written: Not a directory",
    ),
    "python object": (
        execute,
        r"train.yaml:\d+: plugins: .*python/object/apply:os.system is refused",
    ),
    "pickle": (pickled, r"weights.pt: expected a .safetensors file; pickles"),
    "missing plugin": (
        override("plugins=[no_such_lab.blocks]"),
        r"cannot import plugin 'no_such_lab.blocks'",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_and_nothing_is_begun(experiment, mistake, capsys, monkeypatch):
    exp = experiment()
    monkeypatch.chdir(exp.folder)
    exp.overrides = []
    change, message = MISTAKES[mistake]
    change(exp)
    with pytest.raises(SystemExit) as stopped:
        run.cli(lambda: exp.main(*exp.overrides))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") or "\nerror: " in error
    assert "Traceback" not in error
    assert re.search(message, error), error
    assert not [path for path in exp.save_dir.rglob("*") if path.is_file() and path.name != ".lock"]
    assert not list(exp.folder.rglob("executed"))


def test_an_unknown_block_is_a_key_error_as_well(experiment):
    exp = experiment()
    edit("backbone", "tiny_cnn", "my_cnn")(exp)
    with pytest.raises(
        UnknownBlock, match=r"`plugins` in train.yaml names the modules of blocks of your own"
    ):
        exp.main()


def test_evaluate_says_what_is_wrong(experiment, capsys):
    exp = experiment()
    with pytest.raises(UserError, match="no checkpoint here"):
        evaluate.main(argv(exp))
    exp.main("train.total_steps=2", "data.val_episodes=0.0")
    with pytest.raises(UserError, match="held no episodes out"):
        evaluate.main(argv(exp))
    with pytest.raises(
        UserError, match=r"--env: no environment 'tabletob'; did you mean 'tabletop'"
    ):
        evaluate.main(argv(exp, "--env", "tabletob"))
    with pytest.raises(UserError, match="runs at 20 Hz, the policy at 10"):
        evaluate.main(argv(exp, "--env", "tabletop"))
    (exp.save_dir / "step_2/backbone.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"backbone.safetensors is missing; take another checkpoint"
    ):
        evaluate.main(["--checkpoint", str(exp.save_dir / "step_2")])


@pytest.mark.parametrize("script", ["train_flow_matching", "train_vfp"])
def test_help_lists_every_key(script, capsys):
    module = sys.modules.get(script) or __import__(script)
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for key in (
        "train.optim.peak_lr",
        "data.augment.hue",
        "model.component_build_args.NAME.freeze",
        "loss.camera_dropout",
    ):
        assert key in out
    assert ("loss.sinkhorn.blur" in out) == (script == "train_vfp")


def test_dry_run_prints_components_and_writes_nothing(experiment, capsys):
    exp = experiment("train_vfp")
    before = sorted(exp.folder.rglob("*"))
    assert exp.main("--dry_run", FREEZE) == 0
    out = capsys.readouterr().out
    assert sorted(exp.folder.rglob("*")) == before
    assert [line.split()[0] for line in out.splitlines()[1:6]] == [
        "backbone", "info_embedder", "action_decoder", "vae_posterior", "vae_prior",
    ]  # fmt: skip
    count = sum(p.numel() for p in TinyCNN(8, 4).parameters())
    assert out.splitlines()[1].split()[:4] == ["backbone", f"{count:,}", "0", f"{count:,}"]
    assert "sample (2, 6, 4); 20 steps of 10 per epoch" in out
    config = yaml.safe_load(out[out.index("\nmodel:") :])
    assert config["train"]["save_dir"] == str(exp.save_dir)


def test_pictures_are_decoded_last(experiment, capsys):
    exp, size = experiment("train_vfp"), "data.image_size=[26, 38]"
    frames = cache_folder() / "frames"
    before = {*frames.glob("*.npy")}
    save_file({"other": torch.zeros(1)}, exp.folder / "other.safetensors")
    with pytest.raises(
        UserError, match=r"other\.safetensors: not the weights of component 'backbone'"
    ):
        exp.main(
            size,
            "model.component_build_args="
            f"{{backbone: {{init: {exp.folder / 'other.safetensors'}}}}}",
        )
    assert exp.main("--dry_run", size) == 0
    assert {*frames.glob("*.npy")} == before
    assert re.search(
        r"frames of \d cameras? at 26 x 38 take .* GB: \w+.* decoded once", capsys.readouterr().out
    )
    with pytest.raises(DataError, match=r"above data\.cache_max_gb: 0\.0001"):
        exp.main("--dry_run", size, "data.cache_max_gb=0.0001")
    assert exp.main(size, "train.total_steps=1") == 0
    assert {*frames.glob("*.npy")} > before


LATE = {  # what takes minutes or hours -> how a test notices that it begins
    "generating": (loader, "locate"),
    "building": (run, "build_parts"),
    "decoding": (frames, "build"),
}
EARLY = {  # what is wrong -> overrides, an edit of the files, message, what must not begin
    "a batch": (
        ["data.batch_size=9"],
        None,
        r"data.batch_size 9 must be .* 2 x 1: set data.batch_size to 8 or 10",
        "generating",
    ),
    "a block": (
        [],
        edit("backbone", "block: tiny_cnn", "block: tiny_cn"),
        r"backbone.yaml:\d+: block: no block 'tiny_cn'; did you mean 'tiny_cnn'",
        "generating",
    ),
    "an argument": (
        [],
        edit("info_embedder", "heads: 2", "head: 2"),
        r"info_embedder.yaml:\d+: args.head: block 'info_encoder' takes no 'head'",
        "generating",
    ),
    "a number of the config": (
        [],
        edit("info_embedder", "num_cameras: null", "num_cameras: 2"),
        r"num_cameras: 2 here, but the dataset has 3",
        "generating",
    ),
    "a camera": (
        ["data.cameras={}", "model.component_config_paths.da3=DA3"],
        lambda exp: shutil.copy(exp.folder / "backbone.yaml", exp.folder / "da3.yaml"),
        "'da3' is listed, but data.cameras names no camera",
        "generating",
    ),
    "frames above the limit": (
        ["data.cache_max_gb=0.0001"],
        None,
        r"frames of 3 cameras at 32 x 32 take 0.00 GB, above data.cache_max_gb: 0.0001",
        "building",
    ),
    "features above the limit": (
        ["data.cache=features", "data.cache_max_gb=0.001", FREEZE, "data.augment=null"],
        edit("backbone", "dim: 8", "dim: 800"),
        r"features of 100 frames \(backbone of head, .* right\) take 0.00 GB, above data.cache_max",
        "building",
    ),
    "nothing to cache": (
        ["data.cache=features", "data.augment=null"],
        None,
        "none of them is frozen",
        "building",
    ),
    "components that do not fit": (
        [],
        edit("info_embedder", "visual_dim: 8", "visual_dim: 9"),
        "found size 8, expected 9",
        "decoding",
    ),
}


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("mistake", EARLY)
def test_a_mistake_shows_before_what_takes_long(experiment, monkeypatch, own_cache, mistake):
    exp = experiment()
    overrides, change, message, late = EARLY[mistake]
    if change:
        change(exp)
    for owner, name in [*LATE.values()][[*LATE].index(late) :]:
        monkeypatch.setattr(owner, name, lambda *args: pytest.fail("too late"))
    with pytest.raises(UserError, match=message):
        exp.main(*(text.replace("DA3", f"{exp.folder}/da3.yaml") for text in overrides))


def test_a_disk_without_space_for_frames_shows_before_models_are_built(
    experiment, monkeypatch, own_cache
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(frames.shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    monkeypatch.setattr(run, "build_parts", lambda *args: pytest.fail("too late"))
    with pytest.raises(DataError, match=r"take 0.00 GB, but 0.00 GB are free; set data.cache"):
        experiment().main()


def test_files_that_are_there_make_the_disk_no_fuller(experiment, monkeypatch, own_cache):
    """Of a frame cache that another process fills, and of features."""
    exp = experiment()
    cached = ["data.cache=features", FREEZE, "data.augment=null"]
    exp.main(*cached, "train.total_steps=1")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(frames.shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    exp.main(*cached, "train.total_steps=2")
    for file in (cache_folder() / "frames").glob("*.npy"):
        file.rename(file.with_suffix(".tmp"))
    exp.main("train.total_steps=2", f"train.save_dir={exp.folder / 'other'}")


def test_a_component_that_knows_its_size_only_with_weights_is_asked_later(
    experiment, monkeypatch, own_cache
):
    exp = experiment()
    edit("backbone", "dim: 8", "dim: 800")(exp)
    edit("info_embedder", "visual_dim: 8", "visual_dim: 800")(exp)
    edit("info_embedder", "semantic_dim: 16", "semantic_dim: 1600")(exp)
    forward = TinyCNN.forward

    def needs_values(self, image):
        if image.sum().item() < 0:
            raise AssertionError
        return forward(self, image)

    monkeypatch.setattr(TinyCNN, "forward", needs_values)
    cached = ["data.cache=features", FREEZE, "data.augment=null", "train.total_steps=1"]
    with pytest.raises(DataError, match=r"features of 100 frames .* above data.cache_max_gb: 0"):
        exp.main(*cached, "data.cache_max_gb=0.001")
    assert list((cache_folder() / "frames").glob("*.npy"))


def test_a_finished_run_decodes_nothing(experiment, monkeypatch, own_cache):
    exp = experiment()
    exp.main("data.cache=none", "train.total_steps=1")
    monkeypatch.setattr(frames, "build", lambda *args: pytest.fail("decodes"))
    assert exp.main("train.total_steps=1") == 0


def test_a_tracker_that_cannot_start_costs_a_warning(experiment, capsys):
    exp = experiment()
    for tracker, reason in (
        ("wandb", "not installed"),
        ("wanbd", "Unsupported logging capability"),
    ):
        assert (
            exp.main(
                f"train.tracker={tracker}",
                "train.total_steps=2",
                f"train.save_dir={exp.folder / tracker}",
            )
            == 0
        )
        out = capsys.readouterr().out
        assert out.count("warning: tracker") == 1
        assert f"tracker {tracker} is off: " in out
        assert reason in out


def test_a_tracker_gets_the_config_and_what_is_logged(experiment, monkeypatch):
    from accelerate.tracking import GeneralTracker

    seen = []

    class Memory(GeneralTracker):
        name, requires_logging_directory, tracker, main_process_only = "memory", False, None, True

        def __init__(self):
            super().__init__()

        def store_init_configuration(self, values):
            seen.append(yaml.safe_load(values["config"])["train"]["project_name"])

        def log(self, values, step, **kwargs):
            seen.append((step, "loss" in values))

    monkeypatch.setattr(log, "filter_trackers", lambda name, folder: [Memory()])
    experiment().main("train.tracker=memory", "train.total_steps=2", "data.val_episodes=0.0")
    assert seen == ["tiny", (1, True), (2, True)]


def test_a_copied_experiment_and_a_copied_script_are_all_a_fork_needs(
    experiment, tmp_path, monkeypatch
):
    exp = experiment("train_vfp")
    text = Path(train_vfp.__file__).read_text()
    for old, new in (
        ("from dataclasses", "from __future__ import annotations\n\nfrom dataclasses"),
        (r"\bkl: float", "my_kl: float"),
        (r"\.kl\b", ".my_kl"),
    ):
        text, count = re.subn(old, new, text)
        assert count == 1
    (tmp_path / "train_mine.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    shutil.copytree(exp.folder, tmp_path / "copied")
    fork = Experiment.__new__(Experiment)
    fork.__dict__ |= {**exp.__dict__, "script": "train_mine", "folder": tmp_path / "copied"}
    fork.file, fork.save_dir = fork.folder / "train.yaml", fork.folder / "run"
    overrides = [f"train.save_dir={fork.save_dir}", "loss={my_kl: 0.5}"]
    assert fork.stop_at(12, *overrides) == 143
    assert fork.main(*overrides) == 0
    assert fork.meta("epoch_2")["script"] == str(tmp_path / "train_mine.py")
    exp.main("loss={kl: 0.5}")
    assert fork.meta("epoch_2")["files"] == exp.meta("epoch_2")["files"]
    del sys.modules["train_mine"]
    with pytest.raises(UserError, match=r"train_mine.py', which is not beside common/.*--script"):
        evaluate.main(argv(fork))
    script = str(tmp_path / "train_mine.py")
    assert evaluate.main(argv(fork, "--script", script)) == 0
    results = json.loads((fork.folder / "results/results.json").read_text())
    assert len(results["mae"]) == 4
    assert np.isfinite(results["mae"]).all()
    (tmp_path / "train_mine.py").unlink()
    with pytest.raises(UserError, match=r"--script: no such file: .*train_mine.py"):
        evaluate.main(argv(fork, "--script", script))


def test_a_constant_dimension_is_named_and_trains(tmp_path, capsys):
    def hold(episode, arrays):
        arrays["observation.state"][:, 3] = 0.5

    exp = Experiment(tmp_path / "exp", write_demos(tmp_path / "demos", edit=hold))
    exp.main("train.total_steps=2")
    forget_accelerator()
    assert "warning: state dimensions [3] are constant" in capsys.readouterr().out
    assert all(np.isfinite(loss) for loss in exp.log().values())


def test_episodes_shorter_than_a_chunk_train(tmp_path):
    exp = Experiment(tmp_path / "exp", write_demos(tmp_path / "demos", lengths=(3, 5, 2, 4, 3, 2)))
    exp.main("data.action_horizon=8", "data.obs_proprio_history=9", "train.total_steps=2")
    forget_accelerator()
    assert all(np.isfinite(loss) for loss in exp.log().values())
