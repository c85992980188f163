"""Helpers that several test modules share."""

import json
import os
import sys
import threading
import time
import typing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
import yaml
from conftest import HANG
from torch import nn

import train_vfp
from common import checkpoint, config
from common.blocks.depth_anything import PREFIX, DepthAnything3
from common.config import Yaml
from common.data.images import IMAGE
from common.data.normalizer import Normalizer, statistics
from common.data.writer import DatasetWriter
from common.noise import Noise
from common.parts import build_parts
from common.policy import ActionPolicy
from common.schema import Model, Part

ROOT = Path(__file__).resolve().parents[1]

# runs
TIMING = ("time", "data_s", "updt_s", "samples_per_s")
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


def rewrite_meta(folder, change=None, **changes):
    """meta.json of a checkpoint with other entries, as if it had been written so; None: without.

    change: a function that changes it in place.
    """
    meta = json.loads((folder / "meta.json").read_text()) | changes
    meta = {key: value for key, value in meta.items() if value is not None and key != "sha256"}
    if change:
        change(meta)
    (folder / "meta.json").write_text(json.dumps({**meta, "sha256": checkpoint._digest(meta)}))


def environment():
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
    }


def wait_for_step(exp, step):
    """Wait until a run in another process has logged so many steps."""
    until = time.time() + HANG
    while not (exp.save_dir / "log.jsonl").is_file() or len(exp.log()) < step:
        assert time.time() < until, "the run does not get going"
        time.sleep(0.01)


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


def edit_table(path, change):
    """Change the rows of a parquet file, a list of dicts, in place."""
    rows = pq.read_table(path).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows), path)


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
            batch[IMAGE + camera] = torch.zeros(2, 3, 240, 320)
        memory = policy.encode(batch, torch.zeros(2, 3) > 0)
        z = policy.latent(memory, SimpleNamespace(normal=torch.zeros, uniform=torch.zeros))
        velocity = policy.velocity(torch.zeros(2, 40, 24), 0.5, policy.context(memory, z))
    assert all(x.is_meta for x in policy.state_dict().values())
    return policy, memory.tokens, z, velocity


# policies

TINY_FACTS = {
    "action_dim": 4,
    "state_dim": 5,
    "num_cameras": 3,
    "action_horizon": 6,
    "proprio_history": 3,
}
CAMERAS = ("head", "left", "right")
ROWS = 8


class NoAverage:
    """Stands for optim.AveragedWeights where no weights are averaged."""

    trained, ema = {}, {}


def tiny_batch(rows=ROWS):
    """A batch of random observations and chunks of TINY_FACTS, two of the chunks padded."""
    noise = Noise("tiny batch")
    batch = {
        "observation.state": noise.normal(rows, 3, 5),
        "action": noise.normal(rows, 6, 4),
        "action_is_pad": torch.zeros(rows, 6, dtype=torch.bool),
    }
    batch["action_is_pad"][:2, 4:] = True
    for camera in CAMERAS:
        batch[IMAGE + camera] = noise.uniform(rows, 3, 32, 32)
    return batch


def tiny_policy(script, components, loss=None, sampling=None):
    """A new Policy of a script's module, of component mappings, without a dataset.

    loss, sampling: sections of train.yaml, read and checked as from a file.
    """
    torch.manual_seed(0)
    sources = {
        name: Yaml.parse(yaml.safe_dump(component), f"{name}.yaml")
        for name, component in components.items()
    }
    parts = build_parts(Model(component_config_paths={}), sources, TINY_FACTS, CAMERAS)
    given = {"loss": loss or {}, "sampling": sampling or {}}
    source = Yaml.parse(yaml.safe_dump(given), "train.yaml")
    reader = config.Reader(source, None)
    kinds = typing.get_type_hints(script.Config)
    sections = {
        name: reader.read(kinds[name], given[name], (name,)) for name in given if name in kinds
    }
    data = SimpleNamespace(
        cameras=dict.fromkeys(CAMERAS),
        action_horizon=TINY_FACTS["action_horizon"],
        obs_proprio_history=TINY_FACTS["proprio_history"],
        obs_images_history=1,
    )
    cfg = SimpleNamespace(**sections, data=data, seed=0, pictures_every=1)
    batch = tiny_batch()
    state = batch["observation.state"].flatten(0, 1).numpy()
    action = batch["action"].flatten(0, 1).numpy()
    return script.Policy(parts, Normalizer("mean_std", statistics(state, action)), cfg)


class ScriptedPolicy(ActionPolicy):
    """A policy whose chunks tell where they come from.

    A state is (name, tick). Action j of the chunk planned from it is (100 tick + j, a number drawn
    for it); a prefix is kept. `seen` has all that sample() was given, row by row; sample() waits
    for `released`, which is set unless a test clears it.
    """

    def __init__(self, latent=True, prefix=0):
        nn.Module.__init__(self)
        self.parts = nn.ModuleDict(
            {"decoder": nn.Linear(2, 3), "frozen": nn.Linear(2, 2).requires_grad_(False)}
        )
        flat = {"mean": 0.0, "std": 1.0, "min": -1e6, "max": 1e6, "q01": -1.0, "q99": 1.0}
        values = {
            f"{name}_{key}": torch.full((2,), x)
            for name in ("state", "action")
            for key, x in flat.items()
        }
        self.stats = Normalizer("mean_std", values)
        self.weights = SimpleNamespace(prefix=prefix)
        self.has_latent = latent
        self.seen = []
        self.autocast = []
        self.released = threading.Event()
        self.released.set()

    def encode(self, obs, camera_mask=None):
        enabled = torch.is_autocast_enabled("cpu")
        self.autocast.append(torch.get_autocast_dtype("cpu") if enabled else None)
        return obs

    def latent(self, memory, noise):
        return noise.normal(len(memory["observation.state"]), 1) if self.has_latent else None

    def sample(self, memory, x0, steps=10, z=None, prefix=None):
        assert self.released.wait(HANG)
        state = memory["observation.state"][:, -1]
        first = 100 * state[:, 1, None] + torch.arange(x0.shape[1])
        chunk = torch.stack([first, x0[..., 1]], -1)
        for row in range(len(x0)):
            self.seen.append(
                {
                    "name": int(state[row, 0]),
                    "tick": int(state[row, 1]),
                    "x0": x0[row].numpy().copy(),
                    "states": memory["observation.state"][row],
                    "nfe": steps,
                    "z": None if z is None else z[row].item(),
                    "prefix": None if prefix is None else prefix[row].numpy().copy(),
                }
            )
            for key, value in memory.items():
                if key.startswith(IMAGE):
                    self.seen[-1][key] = value[row] * 255
        if prefix is not None:
            chunk[:, : prefix.shape[1]] = prefix
        return chunk
