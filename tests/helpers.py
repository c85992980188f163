"""Helpers that several test modules share."""

import threading
import typing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import train_vfp
from common import config
from common.config import Yaml
from common.data.images import IMAGE
from common.data.normalizer import Normalizer, statistics
from common.noise import Noise
from common.parts import build_parts
from common.policy import ActionPolicy
from common.schema import Model, Part

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
        assert self.released.wait(60)
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
