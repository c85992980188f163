"""vfp_single_expert's exp1 and exp2: full size on the meta device, small size in training."""

import importlib
import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Experiment
from helpers import (
    CONFIGS,
    DA3_TINY,
    RADIO_TINY,
    assert_same_run,
    configured,
    on_meta,
    published_da3,
    published_radio,
    timm_radio,
    tiny_da3,
)
from safetensors.torch import load_file, save_file
from torch import nn

import evaluate
import train_cfg_vqvae
import train_flow_matching
import train_vfp
from common import checkpoint, run
from common.blocks.depth_anything import PREFIX
from common.build import block
from common.config import UserError, Yaml
from common.data.loader import to_device
from common.parts import Parts, build_parts
from common.schema import Model

FOLDER = Path(train_vfp.__file__).parent / "configs/vfp_single_expert"
RADIO, DECODER_LAYER = 319_931_392, 2 * 4 * 512**2 + 2 * 512 + 2 * 512 * 3200 + 3200 + 512 + 9 * 512
PROJECTOR = (
    2 * 1024 + 1024**2 + 1024 + 1024 * 512 + 512 + 2 * 512
)  # of one visual input, to width 512
EXP1 = {f"{camera}_backbone": RADIO for camera in ("head", "left", "right")}
EXP1 |= {"info_embedder": 33_127_936, "vae_posterior": 52_055_328, "vae_prior": 60_694_816}
EXP1 |= {"action_decoder": 7 * DECODER_LAYER + 2_924_056}
EXP2 = EXP1 | {"da3": 241_381_120, "info_embedder": EXP1["info_embedder"] + PROJECTOR + 2 * 512}
EXP2 |= {"action_decoder": EXP1["action_decoder"] + DECODER_LAYER}
SMALL = {"dim": 16, "heads": 2, "ff": 32, "layers": 1, "tokens": 2, "latent_dim": 4}
SMALL |= {"visual_dim": 32, "semantic_dim": 96, "extra_visual_dims": [32]}
STEPS = ("train.total_steps=4", "train.micro_steps=1")


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(run, "draw_curves", lambda folder: None)


@pytest.mark.parametrize(("name", "counts", "tokens"), [("exp1", EXP1, 943), ("exp2", EXP2, 1725)])
def test_full_size_without_allocating_anything(name, counts, tokens):
    cfg = configured(name)
    policy, memory, z, velocity = on_meta(cfg)
    parts = policy.parts
    assert {key: sum(p.numel() for p in part.parameters()) for key, part in parts.items()} == counts
    assert (memory.shape, z.shape, velocity.shape) == ((2, tokens, 512), (2, 5, 16), (2, 40, 24))
    assert parts.frozen == {"da3"} & counts.keys()
    table = {
        line.split()[0]: line.replace(",", "").split()[1:] for line in parts.table(cfg).splitlines()
    }
    assert table["head_backbone"][:3] == [str(RADIO), str(RADIO), "0"]
    everything, frozen = sum(counts.values()), counts.get("da3", 0)
    assert table["total"][:3] == [str(n) for n in (everything, everything - frozen, frozen)]
    # weights, gradients, two of the optimizer, EMA; of what is frozen only weights
    assert float(table["total"][-1]) == pytest.approx(
        (5 * everything - 4 * frozen) * 4 / 2**20, abs=0.1
    )
    cfg.train.optim.type = "schedule_free_radam"
    assert parts.table(cfg).splitlines()[1].split()[-2:] == ["0.0", f"{RADIO * 16 / 2**20:,.1f}"]


SCRIPT_OF = {
    "naive_flow_matching_policy": "train_flow_matching",
    "vfp_single_expert": "train_vfp",
    "variational_flow_matching_policy": "train_vfp_moe",
    "cfg_vqvae_flow_matching": "train_cfg_vqvae",
    "mutual_information_estimator": "train_mi",
}


def test_the_experiments_are_as_published_and_use_what_they_list():
    exp1, exp2 = configured("exp1"), configured("exp2")
    assert (exp1.train.optim.peak_lr, exp1.train.optim.warmup_steps, exp1.train.optim.eps) == (
        1e-4,
        2000,
        1e-10,
    )
    assert (exp2.train.optim.peak_lr, exp2.train.optim.warmup_steps, exp2.train.optim.betas) == (
        2e-4,
        1000,
        [0.9, 0.995],
    )
    assert "da3" not in exp1.model.component_config_paths
    for cfg in (exp1, exp2):
        assert (cfg.data.image_size, cfg.data.action_horizon, cfg.data.obs_proprio_history) == (
            [240, 320],
            40,
            40,
        )
    folder = (
        CONFIGS / "vfp_single_expert/exp2"
    )  # the nine files that the seeds list, and train.yaml
    assert {path.stem for path in folder.glob("*.yaml")} == {
        "train",
        "head_backbone",
        "left_backbone",
        "right_backbone",
        "info_embedder",
        "action_decoder",
        "multimodal_bridge",
        "vae_posterior",
        "vae_prior",
        "da3",
    }


def test_only_the_published_decoder_of_vfp_exp1_is_causal():
    causal = []
    for path in CONFIGS.rglob("*.yaml"):
        if "causal: true" in "".join(re.findall(r"^[^#\n]*", path.read_text(), flags=re.M)):
            causal.append(path.relative_to(CONFIGS))
    assert list(map(str, causal)) == ["vfp_single_expert/exp1/action_decoder.yaml"]


def test_a_config_folder_can_be_copied_alone():
    """Only exp2 of two policies, for which no files of their own are published, names exp1's."""
    borrowing = set()
    for path in CONFIGS.rglob("train*.yaml"):
        files = Yaml.read(path).data["model"]["component_config_paths"].values()
        if any(not file.startswith("./") for file in files):
            borrowing.add(str(path.parent.relative_to(CONFIGS)))
    assert borrowing == {
        "naive_flow_matching_policy/exp2",
        "variational_flow_matching_policy/exp2",
    }


def test_every_loss_key_is_written_out_at_full_size():
    for path in CONFIGS.glob("*/exp*/train.yaml"):
        script = importlib.import_module(SCRIPT_OF[path.parents[1].name])
        keys = {field.name for field in fields(script.Loss)}
        assert keys == Yaml.read(path).data["loss"].keys(), path


def small(folder, demos, freeze=("left_backbone",)):
    """exp2's structure at small size, its backbones and da3 from files in the public layouts."""
    exp = Experiment(folder, demos, "train_vfp")
    torch.manual_seed(0)
    paths, args = {}, {name: {"freeze": True} for name in freeze}
    for name, path in configured("exp2").model.component_config_paths.items():
        data = Yaml.read(path).data
        data["args"] |= {key: value for key, value in SMALL.items() if key in data["args"]}
        if name == "da3":
            save_file(
                published_da3(tiny_da3()),
                folder / "da3.safetensors",
            )
            data["args"] = {
                "weights": "./da3.safetensors",
                "layers": [1, 3],
                **DA3_TINY,
            }
        elif data["block"] == "RadioV3":
            save_file(published_radio(timm_radio()), folder / f"{name}.safetensors")
            data["args"] = {
                "weights": f"./{name}.safetensors",
                "channels": [32, 96],
                **RADIO_TINY,
            }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(data))
        paths[name] = f"./{name}.yaml"
    exp.config["model"] = {"component_config_paths": paths, "component_build_args": args}
    exp.config["data"]["image_size"], exp.config["loss"] = [32, 48], {"camera_dropout": 0.5}
    exp.write()
    return exp


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


def test_exp2_small_trains_resumes_and_is_evaluated(tmp_path, demos):
    exp = small(tmp_path / "exp", demos)
    straight = exp.folder / "straight"
    assert exp.main(*STEPS, f"train.save_dir={straight}") == 0
    assert exp.stop_at(2, *STEPS) == 143
    assert exp.main(*STEPS) == 0
    assert_same_run(straight, exp.save_dir, "step_4")
    policy, parts = exp.job.policy, exp.job.policy.parts
    assert parts.frozen == {"da3", "left_backbone"}
    now = policy.state_dict()
    for name in parts:
        keys = [f"parts.{name}.{key}" for key, _ in parts[name].named_parameters()]
        changed = [not torch.equal(now[key], exp.start[key]) for key in keys]
        assert not any(changed) if name in parts.frozen else sum(changed) > 0.9 * len(keys), name
    file = load_file(exp.folder / "left_backbone.safetensors")
    key = "blocks.0.attn.qkv.weight"
    assert torch.equal(
        now[f"parts.left_backbone.block.model.{key}"], file[f"radio_model.model.{key}"]
    )
    frozen = {name: exp.folder / f"{name}.safetensors" for name in sorted(parts.frozen)}
    record = {
        name: {"path": str(path), "sha256": checkpoint.sha256(path)}
        for name, path in frozen.items()
    }
    assert exp.meta("step_4")["frozen"] == record
    saved = {path.stem for path in (exp.save_dir / "step_4").glob("*.safetensors")}
    assert saved == {*parts.trainable(), "dataset_stats"}
    assert evaluate.main(argv(exp)) == 0
    assert json.loads((exp.folder / "results/results.json").read_text())["chunk_error"]["mean"] < 10
    opened, _ = checkpoint.open_policy(exp.save_dir)
    assert torch.equal(
        opened.state_dict()["parts.da3.block.pos_embed"], now["parts.da3.block.pos_embed"]
    )


def test_published_weights_that_are_gone_or_changed_are_named(tmp_path, demos):
    exp = small(tmp_path / "exp", demos)
    exp.main("train.total_steps=1")
    file, away = exp.folder / "da3.safetensors", exp.folder / "away.safetensors"
    file.rename(away)
    with pytest.raises(
        UserError, match=rf"{file}: weights of frozen 'da3' are gone; .*--weights da3=PATH"
    ):
        evaluate.main(argv(exp))
    with pytest.raises(UserError, match=rf"weights: no such file {file}"):
        exp.main("train.total_steps=2")
    assert checkpoint.open_policy(exp.save_dir, {"da3": away})[0].parts.sources["da3"] == away
    tensors = load_file(away)
    next(iter(tensors.values())).add_(1)
    save_file(tensors, file)
    for use in (lambda: evaluate.main(argv(exp)), lambda: exp.main("train.total_steps=2")):
        with pytest.raises(UserError, match=rf"{file}: not the file that 'da3' was trained with"):
            use()
    (exp.folder / "head_backbone.safetensors").unlink()  # trained along: the checkpoint holds it
    file.unlink()
    away.rename(file)
    checkpoint.open_policy(exp.save_dir)


def test_a_hidden_head_camera_hides_its_depth_as_well(tmp_path, demos):
    exp = small(tmp_path / "exp", demos)
    exp.main("train.total_steps=1")
    policy = exp.job.policy.eval()
    batch = to_device(exp.job.data.windows[[0, 30]], "cpu")
    other = batch | {"observation.images.head": 1 - batch["observation.images.head"]}
    for drop, hidden in ((None, False), ([True, False, False], True), ([False, True, True], False)):
        drop = None if drop is None else torch.tensor([drop] * 2)
        seen = [policy.encode(obs, drop).tokens for obs in (batch, other)]
        assert torch.equal(*seen) == hidden
        read = [
            policy.parts["vae_prior"](**policy.encode(obs, drop).latent_inputs).mu
            for obs in (batch, other)
        ]
        assert torch.equal(*read) == hidden
    # The depth tokens alone, which the encoder mixes with all others.
    visual, semantic = policy.parts.encode_cameras(batch, policy.cameras)
    hidden = policy.parts.visual_mask(
        torch.tensor([[True, False, False], [False, False, False]]), policy.cameras
    )
    assert hidden.tolist() == [[True, False, False, True], [False] * 4]
    bridge, moved = policy.parts["info_embedder"].block.bridge, [*visual[:3], visual[3] + 1]
    inputs = {
        "cond_proprio": torch.zeros(2, 3, 5),
        "cond_semantic": semantic,
        "visual_mask": hidden,
    }
    before, after = (bridge(cond_visual=x, **inputs) for x in (visual, moved))
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False]


def test_multimodal_bridge_is_listed_in_place_of_info_embedder(tmp_path, demos):
    exp = small(tmp_path / "exp", demos)
    data = Yaml.read(FOLDER / "exp2/multimodal_bridge.yaml").data
    data["args"] |= {key: value for key, value in SMALL.items() if key in data["args"]}
    file = exp.folder / "multimodal_bridge.yaml"
    file.write_text(yaml.safe_dump(data))
    assert (
        exp.main("train.total_steps=2", f"model.component_config_paths.info_embedder={file}") == 0
    )
    assert "info_embedder.visual.3.1.weight" in "".join(exp.start).replace(".block", "")


def test_init_reaches_a_block_whose_yaml_names_no_weights(tmp_path, demos, capsys):
    exp = small(tmp_path / "exp", demos)
    for name in ("da3", "head_backbone"):
        file = exp.folder / f"{name}.yaml"
        file.write_text(file.read_text().replace(f"weights: ./{name}.safetensors", "weights: null"))
        exp.config["model"]["component_build_args"][name] = {
            "init": f"./{name}.safetensors",
            "freeze": name == "da3",
        }
    exp.write()
    exp.main("train.total_steps=1")
    published = load_file(exp.folder / "da3.safetensors")[PREFIX + "pos_embed"]
    assert torch.equal(exp.start["parts.da3.block.pos_embed"], published)
    policy, _ = checkpoint.open_policy(exp.save_dir)
    assert policy.parts.sources["da3"] == exp.folder / "da3.safetensors"
    with pytest.raises(
        UserError, match=r"(?s)left_backbone.safetensors.*not the weights of this da3"
    ):
        exp.main(
            "model.component_build_args="
            f"{{da3: {{init: {exp.folder / 'left_backbone.safetensors'}}}}}"
        )


def test_a_dry_run_of_exp2_small(tmp_path, demos, capsys):
    exp = small(tmp_path / "exp", demos)
    before = sorted(exp.folder.rglob("*"))
    assert exp.main("--dry_run") == 0
    out = capsys.readouterr().out
    assert sorted(exp.folder.rglob("*")) == before
    table = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert table["da3"][1] == table["da3"][3] != "0"
    assert table["da3"][2] == table["left_backbone"][2] == "0"
    assert "activations" in out
    assert "sample (2, 6, 4)" in out


class Counting(nn.Module):
    """Pictures -> what `result` makes of them; counts its calls."""

    def __init__(self, result):
        super().__init__()
        self.scale, self.result, self.calls = nn.Parameter(torch.ones(())), result, 0

    def forward(self, image):
        self.calls += 1
        return self.result(self.scale * image)


def seeing():
    """Parts of which two cameras share a backbone, and both a hand extractor."""
    modules = {
        "head_backbone": Counting(lambda x: (x[:, :, ::4, ::4], x.mean((2, 3)))),
        "left_backbone": Counting(lambda x: (2 * x[:, :, ::4, ::4], 2 * x.mean((2, 3)))),
        "left_hand_extractor": Counting(lambda x: x[:, :, 0, :5].transpose(1, 2)),
        "da3": Counting(lambda x: torch.stack([x, -x], 1)[..., ::8, ::8].movedim(2, -1)),
    }
    aliases = {"right_backbone": "left_backbone", "right_hand_extractor": "left_hand_extractor"}
    return Parts(modules, ["da3"], aliases)


CAMERAS = ["head", "left", "right"]


@pytest.mark.parametrize("frames", [None, 2])
def test_look_lists_grids_then_hands_then_depth(frames):
    parts, shape = seeing(), (3, *([frames] if frames else []), 3, 16, 24)
    obs = {f"observation.images.{camera}": torch.rand(shape) for camera in CAMERAS}
    visual, semantic = parts.encode_cameras(obs, CAMERAS)
    n = frames or 1
    assert [x.shape for x in visual] == [(3, 4 * n, 6, 3)] * 3 + [(3, 5 * n, 3)] * 2 + [
        (3, 2 * 2 * n, 3, 3)
    ]
    assert [x.shape for x in semantic] == [(3, 1, 3)] * 3
    assert [part.calls for part in parts.values()] == [1, 1, 1, 1]
    right, head = (
        obs[f"observation.images.{camera}"].view(3, n, 3, 16, 24) for camera in ("right", "head")
    )
    assert torch.equal(visual[2], 2 * right[..., ::4, ::4].movedim(2, -1).flatten(1, 2))
    assert torch.equal(visual[4], right[..., 0, :5].transpose(2, 3).flatten(1, 2))
    depth = head[..., ::8, ::8].movedim(2, -1).flatten(1, 2)
    assert torch.equal(visual[5], torch.cat([depth, -depth], 1))  # layer by layer
    assert [x.requires_grad for x in visual] == [True] * 5 + [False]
    drop = torch.tensor([[True, False, False], [False, False, True], [False, False, False]])
    expected = [[1, 0, 0, 0, 0, 1], [0, 0, 1, 0, 1, 0], [0] * 6]
    assert parts.visual_mask(drop, CAMERAS).int().tolist() == expected
    assert parts.visual_mask(None, CAMERAS) is None


def test_look_takes_cached_features_in_place_of_running_a_component():
    parts = seeing()
    obs = {f"observation.images.{camera}": torch.rand(3, 3, 16, 24) for camera in CAMERAS}
    visual, semantic = parts.encode_cameras(obs, CAMERAS)
    cached = {}
    for i, key in enumerate(("head_backbone.head", "left_backbone.left", "left_backbone.right")):
        cached |= {
            f"features.{key}": visual[i].half(),
            f"features.{key}.summary": semantic[i].half(),
        }
    cached["features.da3.head"] = visual[5].unflatten(1, (2, 2)).bfloat16()
    cached |= {
        f"observation.images.{camera}": obs[f"observation.images.{camera}"]
        for camera in ("left", "right")
    }
    again, summaries = parts.encode_cameras(cached, CAMERAS)
    assert [part.calls for part in parts.values()] == [1, 1, 2, 1]
    for x, y in zip([*again, *summaries], [*visual, *semantic], strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y, atol=4e-3, rtol=1e-2)
    del cached["features.left_backbone.right"], cached["features.left_backbone.right.summary"]
    assert torch.equal(parts.encode_cameras(cached, CAMERAS)[0][2], visual[2])
    assert [part.calls for part in parts.values()] == [1, 2, 3, 1]


def test_da3_needs_a_camera_and_no_optimizer(tmp_path, demos):
    exp = small(tmp_path / "exp", demos, freeze=())
    with pytest.raises(
        UserError,
        match=r"model.component_optims.da3: 'da3' is frozen: it has no optimizer of its own",
    ):
        exp.main("model.component_optims={da3: {peak_lr: 1e-5}}")
    assert exp.main("train.total_steps=1") == 0
    assert exp.job.policy.parts.frozen == {"da3"}
    with pytest.raises(UserError, match=r"'da3' is listed, but data.cameras names no camera"):
        exp.main("data.cameras={}")


def graph(exp, name, blocks, result):
    data = {"inputs": ["image"], "blocks": blocks, "return": result}
    (exp.folder / f"{name}.yaml").write_text(yaml.safe_dump(data))


def test_frozen_is_what_has_nothing_to_learn_by_whatever_name(tmp_path, demos):
    """The da3 block is frozen under any name; a projection after it in component `da3` learns."""
    exp = small(tmp_path / "exp", demos, freeze=())
    paths = exp.config["model"]["component_config_paths"]
    paths["left_hand_extractor"] = paths["da3"]
    depth = Yaml.read(exp.folder / "da3.yaml").data | {"in": ["$image"]}
    narrow = {
        "block": "nn.Linear",
        "in": ["$depth"],
        "args": {"in_features": 32, "out_features": 32},
    }
    graph(exp, "narrowed", {"depth": depth, "narrow": narrow}, "$narrow")
    paths["da3"] = "./narrowed.yaml"
    data = Yaml.read(exp.folder / "info_embedder.yaml").data
    data["args"]["extra_visual_dims"] = [32, 32]
    (exp.folder / "info_embedder.yaml").write_text(yaml.safe_dump(data))
    exp.write()
    assert exp.main(*STEPS, "model.component_optims={da3: {peak_lr: 1e-2}}") == 0
    assert exp.job.policy.parts.frozen == {"left_hand_extractor"}
    now = exp.job.policy.state_dict()
    changed = {
        key
        for key in now
        if key.startswith("parts.da3.") and not torch.equal(now[key], exp.start[key])
    }
    assert changed == {"parts.da3.narrow.weight", "parts.da3.narrow.bias"}
    opened = checkpoint.open_policy(exp.save_dir)[0].state_dict()
    assert torch.equal(opened["parts.da3.depth.pos_embed"], now["parts.da3.depth.pos_embed"])


def test_a_frozen_component_that_is_more_than_a_published_file_is_saved_whole(tmp_path, demos):
    exp = small(
        tmp_path / "exp", demos, freeze=("head_backbone", "left_backbone", "right_backbone")
    )
    eyes = {name: Yaml.read(exp.folder / f"{name}_backbone.yaml").data for name in ("head", "left")}
    first = {**eyes["head"], "in": ["$image"], "out": ["f", "s"]}
    second = {**eyes["left"], "in": ["$image"], "out": ["g", "u"]}
    more = {
        "block": "nn.Conv2d",
        "in": ["$f"],
        "args": {"in_channels": 32, "out_channels": 32, "kernel_size": 1},
    }
    graph(exp, "head_backbone", {"eye": first, "more": more}, ["$more", "$s"])
    graph(exp, "left_backbone", {"eye": first, "other": second}, ["$f", "$u"])
    exp.main("train.total_steps=1")
    frozen = exp.meta("step_1")["frozen"]
    assert [frozen[f"{name}_backbone"]["path"].split("/")[0] for name in ("head", "left")] == [
        "frozen"
    ] * 2
    assert frozen["right_backbone"]["path"] == str(exp.folder / "right_backbone.safetensors")
    saved = exp.job.policy.state_dict()
    opened, _ = checkpoint.open_policy(exp.save_dir)
    exp.main("train.total_steps=2", "seed=7")  # another seed would draw another convolution
    for policy in (opened, exp.job.policy):
        for name in ("head_backbone", "left_backbone"):
            keys = [key for key in saved if key.startswith(f"parts.{name}.")]
            assert all(torch.equal(policy.state_dict()[key], saved[key]) for key in keys)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_checkpoint_knows_the_sizes_that_a_file_gave(tmp_path, demos, frozen):
    exp = small(tmp_path / "exp", demos, freeze=("left_backbone",) if frozen else ())
    for name in ("left_backbone", "da3"):
        data = Yaml.read(exp.folder / f"{name}.yaml").data
        data["args"] = {
            k: v
            for k, v in data["args"].items()
            if k in ("weights", "layers", "num_heads", "channels")
        }
        (exp.folder / f"{name}.yaml").write_text(yaml.safe_dump(data))
    exp.main("train.total_steps=1", "train.ema=null")
    moved = {name: exp.folder / f"{name}_moved.safetensors" for name in ("left_backbone", "da3")}
    for name, file in moved.items():
        (exp.folder / f"{name}.safetensors").rename(file)
    policy, _ = checkpoint.open_policy(
        exp.save_dir, {k: file for k, file in moved.items() if frozen or k == "da3"}
    )
    now, opened = exp.job.policy.state_dict(), policy.state_dict()
    keys = [key for key in now if key.startswith(("parts.left_backbone", "parts.da3"))]
    assert all(torch.equal(now[key], opened[key]) for key in keys)
    with pytest.raises(
        UserError,
        match=r"no such file .*\n    The sizes come from that file; to do without it, give",
    ):
        exp.main("train.total_steps=2")


def test_random_weights_are_said_once_with_what_they_are_not(tmp_path, demos, capsys):
    exp = small(tmp_path / "exp", demos)
    file = exp.folder / "head_backbone.yaml"
    file.write_text(
        file.read_text().replace("weights: ./head_backbone.safetensors", "weights: null")
    )
    scratch = "{da3: {init: scratch}, left_backbone: {init: ./left_backbone.safetensors}}"
    exp.main(
        "train.total_steps=1",
        f"model.component_build_args={scratch.replace('./', f'{exp.folder}/')}",
    )
    notices = [line for line in capsys.readouterr().out.splitlines() if "RANDOM" in line]
    start = "starts with RANDOM weights, not those of"
    da3 = f"NOTICE: da3 {start} {exp.folder}/da3.safetensors"
    assert sorted(notices) == [da3, f"NOTICE: head_backbone {start} nvidia/C-RADIOv3-L"]
    checkpoint.open_policy(exp.save_dir)
    assert "RANDOM" not in capsys.readouterr().out


def test_a_block_of_ones_own_may_read_files_without_an_argument_that_names_them(capsys):
    class OwnFiles(nn.Linear):
        def load_weights(self):
            raise AssertionError("nothing to load")

    block("own_files")(OwnFiles)
    source = Yaml.parse("block: own_files\nargs: {in_features: 1, out_features: 1}\n", "own.yaml")
    build_parts(Model(component_config_paths={}), {"own": source}, {}, {})
    assert capsys.readouterr().out == "NOTICE: own starts with RANDOM weights\n"


def real_steps(folder, demos, script, file, args, count):
    """Steps at full size and batch 1, from random weights; afterwards, what has moved."""
    exp = Experiment(folder, demos, script.__name__)
    exp.file = file
    data = [
        f"data.root={demos}",
        "data.HZ=10",
        "data.batch_size=1",
        "data.num_workers=0",
        "data.val_episodes=[5]",
    ]
    data += ["data.cache=frames"]
    train = [
        f"train.total_steps={count}",
        "train.ema=null",
        f"train.save_dir={exp.save_dir}",
        "train.log_every=1",
    ]
    assert exp.main(f"model.component_build_args={json.dumps(args)}", *data, *train) == 0
    assert sorted(exp.log()) == list(range(1, count + 1))
    parts, now = exp.job.policy.parts, exp.job.policy.state_dict()
    for part in parts:
        keys = [f"parts.{part}.{key}" for key, _ in parts[part].named_parameters()]
        changed = [not torch.equal(now[key], exp.start[key]) for key in keys]
        if part in parts.frozen:
            assert not any(changed), part
        elif count > 1:  # zero-initialised heads make one step too few
            # As the warm-up begins, some updates of weights near 1 are below float32's spacing.
            assert sum(changed) > 0.75 * len(keys), part
    assert all(0 < norm < 1e6 for norm in exp.log("norm/action_decoder").values())
    shutil.rmtree(exp.folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exp1", "exp2"])
def test_five_real_steps_at_full_size(tmp_path, demos, name):
    """RADIO-L is shared by the cameras, and no EMA is kept: 14 GiB of memory, 7 GiB of disk."""
    args = {"head_backbone": {"init": "scratch"}} | (
        {"da3": {"init": "scratch"}} if name == "exp2" else {}
    )
    args |= {f"{camera}_backbone": {"same_as": "head_backbone"} for camera in ("left", "right")}
    real_steps(tmp_path / "exp", demos, train_vfp, FOLDER / name / "train.yaml", args, 5)


@pytest.mark.slow
@pytest.mark.parametrize("script", [train_cfg_vqvae, train_flow_matching])
def test_one_real_step_of_the_other_policies(tmp_path, demos, script):
    policy = {
        train_cfg_vqvae: "cfg_vqvae_flow_matching",
        train_flow_matching: "naive_flow_matching_policy",
    }[script]
    file = FOLDER.parent / policy / "exp1/train.yaml"
    args = {
        name: vars(part)
        for name, part in configured(
            "exp1", script, file.parents[1]
        ).model.component_build_args.items()
    }
    for name in ("backbone", "da3"):
        args[name] = args.get(name, {}) | {"init": "scratch"}
    real_steps(tmp_path / "exp", demos, script, file, args, 1)
