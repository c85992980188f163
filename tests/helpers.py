"""Models, configurations and comparisons that several test modules use."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

import train_vfp
from common import config
from common.blocks.depth_anything import PREFIX, DepthAnything3
from common.config import Yaml
from common.data.normalizer import Normalizer
from common.parts import build_parts
from common.schema import Model, Part

# backbones

RADIO_TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2, "table": 6}
DA3_TINY = {"embed_dim": 32, "depth": 4, "num_heads": 2, "alt_start": 1, "table_side": 5}


def awake(model):
    """The model with weights that all have an effect (LayerScale starts at 1e-5)."""
    for name, p in model.named_parameters():
        if p.requires_grad or not name.endswith("bias"):
            nn.init.normal_(p, mean=float("norm" in name or "gamma" in name), std=0.2)
    return model


def timm_radio(layer_scale=True, table=RADIO_TINY["table"]):
    """timm's model of the tiny size."""
    sizes = {name: RADIO_TINY[name] for name in ("embed_dim", "depth", "num_heads")}
    model = timm.create_model(
        "naflexvit_large_patch16_radio_v3",
        num_classes=0,
        init_values=1e-5 * layer_scale,
        pos_embed_grid_size=(table, table),
        **sizes,
    )
    nn.init.zeros_(awake(model).embeds.proj.bias)
    return model.eval()


def published_radio(model):
    """The state of timm's model in NVIDIA's layout."""
    state = {name: x.detach() for name, x in model.state_dict().items()}
    file = {
        "radio_model.summary_idxs": torch.tensor([0, 1, 2]),
        "radio_model.model.reg_token": torch.zeros(1, 4, RADIO_TINY["embed_dim"]),
    }
    for name in ("mean", "std"):
        value = torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1)
        file[f"radio_model.input_conditioner.norm_{name}"] = value
    patches = state["embeds.proj.weight"].unflatten(1, (16, 16, 3))
    generator = "radio_model.model.patch_generator"
    file[f"{generator}.embedder.weight"] = patches.permute(0, 3, 1, 2).flatten(1)
    file[f"{generator}.pos_embed"] = state["embeds.pos_embed"].flatten(1, 2)
    tokens = [state[f"embeds.{kind}_token"][0] for kind in ("cls", "reg")]
    file[f"{generator}.cls_token.token"] = torch.cat(tokens)
    file |= {
        f"radio_model.model.{name.replace('gamma', 'grandma')}": x
        for name, x in state.items()
        if "blocks" in name
    }
    return {name: x.contiguous() for name, x in file.items()}


def tiny_da3(layers=(1, 3), **options):
    """A small model in which every tensor matters."""
    model = DepthAnything3(list(layers), **DA3_TINY | options)
    for p in model.parameters():
        p.add_(0.1 * torch.randn_like(p))
    return model


def published_da3(model):
    """The tensors of a model with all of its blocks in the authors' layout, heads included."""
    heads = {"model.head.norm.weight": torch.ones(3), "model.cam_dec.fc_t.bias": torch.ones(3)}
    return {PREFIX + key: value for key, value in model.state_dict().items()} | heads


# full-size configurations

CONFIGS = Path(train_vfp.__file__).parent / "configs"
FACTS = {
    "action_dim": 24,
    "state_dim": 48,
    "num_cameras": 3,
    "action_horizon": 40,
    "proprio_history": 40,
}


def configured(name, script=train_vfp, folder=CONFIGS / "vfp_single_expert"):
    """The Config of `script` for folder / name / train.yaml."""
    argv = ["--config", str(folder / name / "train.yaml")]
    return config.load(script.Config, script.__file__, argv)[0]


def on_meta(cfg, script=train_vfp):
    """(policy, memory, z, velocity) of two observations at full size, nothing of it allocated."""
    sources = {key: Yaml.read(path) for key, path in cfg.model.component_config_paths.items()}
    args = dict(cfg.model.component_build_args)
    for key in sources:
        part = args.get(key, Part())
        if not part.same_as:
            args[key] = replace(part, init="scratch")
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        # grouped_mm itself gives shapes of bfloat16 only.
        patch.setattr(nn.functional, "grouped_mm", lambda x, w, offs: x @ w[0])
        model = Model(component_config_paths={}, component_build_args=args)
        parts = build_parts(model, sources, FACTS, list(cfg.data.cameras))
        stats = {
            "state_mean": torch.ones(48),
            "state_std": torch.ones(48),
            "action_mean": torch.ones(24),
            "action_std": torch.ones(24),
        }
        policy = script.Policy(parts, Normalizer("mean_std", stats), cfg)
        batch = {"observation.state": torch.zeros(2, 40, 48)}
        for camera in cfg.data.cameras:
            batch[f"observation.images.{camera}"] = torch.zeros(2, 3, 240, 320)
        memory = policy.encode(batch, torch.zeros(2, 3) > 0)
        z = policy.latent(memory, SimpleNamespace(normal=torch.zeros, uniform=torch.zeros))
        tokens = getattr(memory, "tokens", memory)
        experts = policy.chosen(z, 2)[0] if "gate" in parts else {}
        decoder = parts["moe_action_decoder" if experts else "action_decoder"]
        decode = decoder.bind(memory=tokens, z=z, **experts)
        velocity = decode(x_t=torch.zeros(2, 1, 40, 24), t=torch.zeros(2, 1))
    assert all(x.is_meta for x in policy.state_dict().values())
    return policy, tokens, z, velocity


# runs

TIMING = ("data_s", "updt_s", "samples_per_s")


def steps_of(log):
    """Lines of log.jsonl without what depends on the clock."""
    lines = map(json.loads, log.read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def assert_same_run(a, b, name):
    """Asserts that checkpoints `name` of two run folders hold the same bytes, and equal logs."""
    metas = [json.loads((folder / name / "meta.json").read_text()) for folder in (a, b)]
    assert metas[0]["files"] == metas[1]["files"]
    assert metas[0]["optimizers"] == metas[1]["optimizers"]
    assert steps_of(a / "log.jsonl") == steps_of(b / "log.jsonl")
