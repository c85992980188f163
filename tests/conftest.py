"""A tiny dataset, tiny experiments, and training runs, here or in a forked child to be killed."""

import importlib
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from tqdm import tqdm

from common import hub, run
from common.data.writer import DatasetWriter

HANG = 1800  # seconds after which something hangs, however busy the machine is
CAMERAS = {"head": "observation.images.cam_head", "left": "observation.images.cam_left"}
CAMERAS["right"] = "observation.images.cam_right"
LENGTHS = (14, 16, 18, 20, 15, 17)
SIZE = {"dim": 16, "heads": 2, "ff": 32, "layers": 1}
SEEN = {"state_dim": None, "visual_dim": 8, "semantic_dim": 16}
LATENT = {
    "block": "vae_prior",
    "args": {**SIZE, **SEEN, "tokens": 2, "latent_dim": 4, "dropout": 0.1},
}
COMPONENTS = {
    "backbone": {"block": "tiny_cnn", "args": {"dim": 8, "width": 4}},
    "info_embedder": {
        "block": "info_encoder",
        "args": {**SIZE, **SEEN, "num_cameras": None, "dropout": 0.1},
    },
    "action_decoder": {
        "block": "vfp_single_action_decoder",
        "args": {**SIZE, "action_dim": None, "dropout": 0.1},
    },
}
LATENT_COMPONENTS = {
    **COMPONENTS,
    "vae_posterior": {"block": "vae_posterior", "args": {**LATENT["args"], "action_dim": None}},
    "vae_prior": LATENT,
    "action_decoder": {
        "block": "vfp_single_action_decoder",
        "args": {**COMPONENTS["action_decoder"]["args"], "latent_dim": 4},
    },
}
POINT = {**LATENT["args"], "head": "point"}
CODES = {key: value for key, value in LATENT_COMPONENTS.items() if not key.startswith("vae_")} | {
    "vqvae_posterior": {"block": "vae_posterior", "args": {**POINT, "action_dim": None}},
    "vqvae_codebook": {"block": "vq_codebook", "args": {"num_codes": 6, "latent_dim": 4}},
    "vqvae_prior": {
        "block": "vae_prior",
        "args": {**LATENT["args"], "latent_dim": None, "head": "codes", "num_codes": 6},
    },
}
GUIDED = {
    "info_encoder" if name == "info_embedder" else name: component
    for name, component in CODES.items()
}
GUIDED |= {
    "vqvae_codebook": {
        "block": "vq_codebook",
        "args": {"num_codes": 6, "latent_dim": 4, "null_tokens": 2},
    }
}
ONE = {
    "vqvae_posterior": {**POINT, "action_dim": None},
    "vqvae_prior": CODES["vqvae_prior"]["args"],
}
EXPERTS = {name: component for name, component in CODES.items() if name != "action_decoder"} | {
    name: {**CODES[name], "args": {**args, "tokens": 1}} for name, args in ONE.items()
}
EXPERTS["gate"] = {"block": "gate", "args": {"latent_size": 4, "dim": 16, "experts": 3}}
EXPERTS["moe_action_decoder"] = {
    "block": "moe_action_decoder",
    "args": {**LATENT_COMPONENTS["action_decoder"]["args"], "experts": 3},
}
VAE = {"dim": 16, "layers": 1, "latent_dim": 4}
STATE = {
    **VAE,
    "state_dim": None,
    "proprio_history": None,
    "num_cameras": None,
    "width": 8,
    "depths": [1],
}
CHUNK = {**VAE, "action_dim": None, "action_horizon": None}
ESTIMATOR = {}
for side in ("encoder", "decoder"):
    ESTIMATOR[f"state_resnet34_{side}"] = {"block": f"resnet_state_{side}", "args": STATE}
    ESTIMATOR[f"action_{side}"] = {"block": f"chunk_{side}", "args": CHUNK}
POLICIES = {  # script, or script:variant -> its components
    "train_flow_matching": COMPONENTS,
    "train_vfp": LATENT_COMPONENTS,
    "train_vfp:flow": LATENT_COMPONENTS
    | {"vae_prior": {**LATENT, "args": {**LATENT["args"], "head": "flow"}}},
    "train_vfp_moe": EXPERTS,
    "train_cfg_vqvae": GUIDED,
    "train_cfg_vqvae:point": GUIDED | {"vqvae_prior": {"block": "vae_prior", "args": POINT}},
    "train_mi": ESTIMATOR,
}


@pytest.fixture(scope="session", autouse=True)
def one_thread_and_own_cache(tmp_path_factory):
    """Results depend on the number of threads; nothing may be written into the user's cache.

    No test depends on whether there is a network.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda pid: {0})
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(hub, "reachable", lambda endpoint: True)
        torch.set_num_threads(1)
        yield


@pytest.fixture(autouse=True)
def ctrl_c_interrupts():
    """A shell lets its background jobs ignore Ctrl-C; a run that failed leaves its own handler."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def write_demos(root: Path, lengths=LENGTHS, fps=10, seed=0, edit=None) -> Path:
    """A LeRobot v3.0 dataset: 3 cameras of 32 x 32, state (5,), action (4,).

    edit(episode, arrays) may change it.
    """
    features = {"observation.state": {"dtype": "float32", "shape": [5], "names": None}}
    features["action"] = {"dtype": "float32", "shape": [4], "names": None}
    features |= {
        key: {"dtype": "video", "shape": [32, 32, 3], "names": ["h", "w", "c"]}
        for key in CAMERAS.values()
    }
    writer, rng = DatasetWriter(root, fps, features), np.random.default_rng(seed)
    for episode, n in enumerate(lengths):
        arrays = {
            "observation.state": rng.normal(size=(n, 5)).cumsum(0),
            "action": rng.normal(size=(n, 4)).cumsum(0),
        }
        for shift, key in enumerate(CAMERAS.values()):
            ramp = np.arange(32)[None, :, None] * 5 + np.arange(n)[:, None, None] * 4 + 10 * shift
            arrays[key] = np.broadcast_to((ramp % 256)[..., None], (n, 32, 32, 3)).astype(np.uint8)
        if edit:
            edit(episode, arrays)
        writer.add_episode(arrays, task="move")
    writer.finish()
    return root


@pytest.fixture(scope="session")
def demos(tmp_path_factory) -> Path:
    return write_demos(tmp_path_factory.mktemp("demos") / "demos")


def forget_accelerator():
    """Accelerate keeps its state in classes; a second main() in one process needs them new."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


class Experiment:
    """A config folder of one policy, and ways to run its script.

    83 training samples: 10 steps of 8 an epoch.
    """

    def __init__(self, folder: Path, demos: Path, script="train_flow_matching", write=True):
        self.folder, self.script = folder, script.partition(":")[0]
        self.file, self.save_dir = folder / "train.yaml", folder / "run"
        if not write:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in POLICIES[script].items():
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
        self.config = {
            "model": {
                "component_config_paths": {name: f"./{name}.yaml" for name in POLICIES[script]}
            },
            "data": {
                "root": str(demos),
                "cameras": CAMERAS,
                "action_horizon": 6,
                "obs_proprio_history": 3,
                "HZ": 10,
                "image_size": [32, 32],
                "augment": {},
                "val_episodes": [5],
                "batch_size": 8,
                "num_workers": 0,
            },
            "train": {
                "project_name": "tiny",
                "optim": {"peak_lr": 1e-3, "warmup_steps": 5},
                "epoch": 2,
                "micro_steps": 2,
                "ema": 0.9,
                "save_every": 1000,
                "min_interval": 1,
                "save_dir": str(self.save_dir),
                "log_every": 1,
            },
        }
        if "vqvae_codebook" in POLICIES[script]:
            self.config["loss"] = {"revive_every": 2}
        if script == "train_cfg_vqvae:point":
            self.config["loss"]["label_smoothing"] = 0.0
        self.write()

    def write(self):
        self.file.write_text(yaml.safe_dump(self.config, sort_keys=False))

    def argv(self, *overrides):
        return ["--config", str(self.file), *map(str, overrides)]

    def main(self, *overrides):
        """The script's main() in this process.

        Afterwards `job` is its Run and `start` the policy before step 1.
        """
        forget_accelerator()
        resume = run.Run.resume

        def watched(job, policy, optimizers, average):
            self.job, self.start = job, {k: v.clone() for k, v in policy.state_dict().items()}
            resume(job, policy, optimizers, average)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run.Run, "resume", watched)
            return importlib.import_module(self.script).main(self.argv(*overrides))

    def stop_at(self, step, *overrides, number=signal.SIGTERM):
        """The same, as if the signal arrived while `step` was computed."""
        clip = run.Run.clip

        def interrupted(job):
            if job.step + 1 == step:
                os.kill(os.getpid(), number)
            clip(job)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run.Run, "clip", interrupted)
            return self.main(*overrides)

    def fork(self, *overrides, output=os.devnull) -> int:
        """The same command in a child process, by the script's own way in; its pid."""
        pid = os.fork()
        if pid:
            return pid
        signal.alarm(HANG)  # a child that hangs fails its test
        # tqdm's own lock is one for all children, and a killed one may have held it.
        tqdm.set_lock(threading.RLock())
        try:
            with open(output, "w") as f:
                os.dup2(f.fileno(), 1)
                os.dup2(f.fileno(), 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            run.cli(lambda: self.main(*overrides))
        except SystemExit as e:
            if isinstance(e.code, str):
                print(e.code)
            code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def log(self, key="loss", save_dir=None):
        """{step: value} of log.jsonl."""
        lines = ((save_dir or self.save_dir) / "log.jsonl").read_text().splitlines()
        return {line["step"]: line[key] for line in map(json.loads, lines) if key in line}

    def meta(self, name, save_dir=None):
        return json.loads(((save_dir or self.save_dir) / name / "meta.json").read_text())


@pytest.fixture
def experiment(tmp_path, demos):
    """experiment(script, name) -> Experiment in a fresh folder."""
    yield lambda script="train_flow_matching", name="exp": Experiment(
        tmp_path / name, demos, script
    )
    forget_accelerator()
