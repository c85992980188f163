"""The sections of train.yaml that scripts share; each has its own `loss`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.config import Keys, Reader, key, suggest
from common.data.columns import Kind

LARGEST_SEED = 2**63 - 1  # that torch and NumPy take


@dataclass
class Part:
    init: Literal["scratch"] | Path | None = key(
        None,
        "a .safetensors file to start from; scratch: random weights; null: the weights that the "
        "block's `weights` names, if any, else random ones",
    )
    freeze: bool = key(False, "whether the weights stay as they are, in eval mode")
    same_as: str | None = key(
        None, "another component whose module this one shares; one call serves both"
    )


@dataclass
class Model:
    component_config_paths: dict[str, Path] = key(
        ..., "YAML file of each component, by name", names=True
    )
    component_build_args: dict[str, Part] = key(
        {}, "how components start, for those that differ from the defaults"
    )
    component_optims: dict[str, dict] = key(
        {}, "keys of train.optim that have another value for one component, by component name"
    )

    def check(self, reader: Reader, keys: Keys) -> None:
        names = self.component_config_paths
        for section in ("component_build_args", "component_optims"):
            for name in getattr(self, section):
                if name not in names:
                    problem = f"no such component{suggest(name, names)}"
                    raise reader.error((*keys, section, name), problem)
        for name, path in names.items():
            here = (*keys, "component_config_paths", name)
            _refuse_taken_name(reader, here, name)
            _require_file(reader, here, path)
        for name, part in self.component_build_args.items():
            here = (*keys, "component_build_args", name)
            if isinstance(part.init, Path):
                _require_file(reader, (*here, "init"), part.init)
            if part.same_as is not None:
                self._check_shared(reader, here, part)
        for name, changes in self.component_optims.items():
            self._check_optim(reader, (*keys, "component_optims", name), name, changes)

    def _check_shared(self, reader, here, part):
        other = part.same_as
        names = self.component_config_paths
        if other not in names:
            raise reader.error((*here, "same_as"), f"no component '{other}'{suggest(other, names)}")
        if self.component_build_args.get(other, Part()).same_as:
            problem = f"'{other}' is shared itself: name a component without same_as"
            raise reader.error((*here, "same_as"), problem)
        if part.init or part.freeze:
            raise reader.error(here, f"init and freeze are those of '{other}': set them there")

    def _check_optim(self, reader, here, name, changes):
        """Give the changes the types of Optim's keys, in their bounds."""
        part = self.component_build_args.get(name, Part())
        if part.freeze or part.same_as:
            why = f"the same as '{part.same_as}'" if part.same_as else "frozen"
            raise reader.error(here, f"'{name}' is {why}: it has no optimizer of its own")
        changes |= reader.changes(Optim, changes, here)


def _refuse_taken_name(reader, here, name):
    """A component is an attribute of Parts and a file of a checkpoint, under its own name."""
    from common.parts import Parts  # here, as it imports this module

    if hasattr(Parts({}), name) or name == "dataset_stats":
        raise reader.error(here, f"the name '{name}' is taken: choose another one")


def _require_file(reader, here, path):
    if not os.path.isfile(path):  # unlike Path's, never raises
        raise reader.error(here, f"no such file: {path}")


@dataclass
class Augment:
    brightness: float = key(
        0.2, "colour jitter: brightness is multiplied by 1 +- this", low=0, high=1
    )
    contrast: float = key(0.2, "colour jitter: contrast is multiplied by 1 +- this", low=0, high=1)
    saturation: float = key(
        0.2, "colour jitter: saturation is multiplied by 1 +- this", low=0, high=1
    )
    hue: float = key(
        0.1, "colour jitter: hue moves by +- this share of the colour circle", low=0, high=0.5
    )
    blur: float = key(0.0, "probability of a Gaussian blur", low=0, high=1)
    shift: int = key(0, "largest shift of a picture in pixels, in both directions", low=0)


@dataclass
class Data:
    root: str = key(..., "a LeRobot folder, a Hub id org/name, or a generated set such as tabletop")
    cameras: dict[str, str] = key(
        {},
        "name of each camera -> its key in the dataset; a latent reads the first one",
        names=True,
    )
    state_keys: list[str] = key(
        ["observation.state"],
        "low-dimensional columns of the state, concatenated in this order",
        least=1,
        unique=True,
    )
    hold_keys: list[str] = key(
        [],
        "columns whose nearest value is taken when resampling, the same as discrete",
        unique=True,
    )
    resample: dict[str, Kind] = key(
        {},
        "how columns, or numbers of them like action[3], are resampled, where what is recognised "
        "from the data is wrong",
    )
    action_key: str = key("action", "column of the action")
    action_horizon: int = key(40, "actions per chunk", low=1, high=10_000)
    action_offset: int = key(
        0,
        "steps from the observation to the first action of its chunk",
        low=-10_000,
        high=10_000,
    )
    obs_proprio_history: int = key(40, "states per observation", low=1, high=10_000)
    obs_images_history: int = key(1, "images per observation and camera", low=1, high=1000)
    HZ: float = key(
        ..., "steps per second; a dataset of another fps is resampled", low=0.01, high=1000
    )
    image_size: list[int] = key(
        [240, 320], "[height, width] that images are resized to", low=1, high=4096, size=2
    )
    augment: Augment | None = key(
        None, "random changes of the images in training; null: no augmentation"
    )
    normalize: Literal["mean_std", "quantile"] = key(
        "mean_std", "how states and actions are scaled"
    )
    min_std: float = key(
        0.0, "smallest spread, in raw units, that a dimension is scaled by; 0: its own", low=0
    )
    first_frames: int | None = key(
        None, "samples start at this many first frames of an episode; null: at all frames", low=1
    )
    neighbours: int = key(
        1, "samples of similar state that share a batch, for K-OT; 1: a plain shuffle", low=1
    )
    episodes: list[int] | None = key(
        None, "episodes that are used; null: all", low=0, least=1, unique=True
    )
    scores: Path | None = key(
        None, "scores.parquet of train_mi.py; null: no episode is left out for its score"
    )
    keep_top: float | None = key(
        None,
        "share of the training episodes that is kept, the best by data.scores",
        above=0,
        high=1,
    )
    val_episodes: float | list[int] = key(
        0.1,
        "held-out episodes: a share, taken from the end, or a list of episodes",
        low=0,
        unique=True,
    )
    val_samples: int = key(512, "held-out windows per held-out loss, evenly spaced", low=0)
    cache: Literal["none", "frames", "features"] = key(
        "frames",
        "decoded frames are cached on disk; features: the outputs of frozen components as well",
    )
    cache_max_gb: float = key(
        200.0, "largest size of a cache; a larger one is an error", low=0, high=1e20
    )
    batch_size: int = key(
        60, "samples per optimizer step, over all processes and micro-steps", low=1
    )
    num_workers: int = key(2, "loader processes per training process", low=0, high=256)

    def check(self, reader: Reader, keys: Keys) -> None:
        root = reader.path(self.root, (*keys, "root"))
        if self.root.split("/")[0] in ("", ".", "..", "~") or os.path.isdir(root):
            self.root = str(root)
        if self.cache == "features" and self.augment is not None:
            problem = "set it to null: data.cache: features sees each picture once, unchanged"
            raise reader.error((*keys, "augment"), problem)
        if isinstance(self.val_episodes, float) and self.val_episodes >= 1:
            problem = f"expected a share below 1, or a list; found {self.val_episodes}"
            raise reader.error((*keys, "val_episodes"), problem)
        if (self.scores is None) != (self.keep_top is None):
            problem = "data.scores and data.keep_top go together: set both, or neither"
            raise reader.error((*keys, "keep_top"), problem)
        if self.scores is not None:
            _require_file(reader, (*keys, "scores"), self.scores)
        if self.augment and self.augment.shift >= min(self.image_size):
            problem = f"expected less than a side of data.image_size, found {self.augment.shift}"
            raise reader.error((*keys, "augment", "shift"), problem)
        columns = [*self.state_keys, self.action_key]
        for k in self.hold_keys:
            if k not in columns:
                problem = f"'{k}' is no state or action key{suggest(k, columns)}"
                raise reader.error((*keys, "hold_keys"), problem)


@dataclass
class Optim:
    type: Literal["adamw_warmup_cosine_decay", "adamw_onecycle", "schedule_free_radam"] = key(
        "adamw_warmup_cosine_decay", "optimizer and its learning rate schedule"
    )
    peak_lr: float = key(1.0e-4, "highest learning rate", low=0, high=1)
    warmup_steps: int = key(2000, "optimizer steps from start_lr to peak_lr", low=0)
    betas: list[float] = key([0.9, 0.999], "Adam's decay rates", above=0, below=1, size=2)
    eps: float = key(1.0e-10, "Adam's epsilon", above=0, high=1)
    weight_decay: float = key(1.0e-5, "decoupled weight decay", low=0, high=1)
    start_lr: float = key(1.0e-6, "learning rate of the first step", low=0, high=1)
    end_lr: float = key(1.0e-6, "learning rate of the last step", low=0, high=1)


@dataclass
class Train:
    project_name: str = key(..., "name of the run")
    optim: Optim = key(
        Optim(), "optimizer of every component; model.component_optims names exceptions"
    )
    epoch: int | None = key(
        1000, "epochs to train; null: no limit, the run ends after train.total_steps", low=1
    )
    total_steps: int | None = key(
        None,
        "optimizer steps to train, if train.epoch does not end the run before; null: no limit",
        low=1,
    )
    micro_steps: int = key(1, "gradient accumulation: batches per optimizer step", low=1)
    clip: float = key(1.0, "largest norm of a component's gradient", above=0, high=1e20)
    val_every: int | None = key(
        1, "epochs between held-out losses, of which the last step has one, too; null: never", low=1
    )
    ema: float | None = key(
        0.999,
        "decay of the average of the weights that is evaluated and saved; null: none",
        low=0,
        below=1,
    )
    save_every: int | None = key(
        3, "epochs between checkpoints; null: by save_every_steps and at the end only", low=1
    )
    save_every_steps: int | None = key(
        None, "optimizer steps between further checkpoints; null: none", low=1
    )
    min_interval: int = key(
        100,
        "least optimizer steps between held-out losses, and between checkpoints by save_every: "
        "where epochs are short, only each so many count",
        low=1,
    )
    keep_last: int = key(2, "newest checkpoints that are kept", low=1)
    save_dir: Path = key(..., "run folder; the same command again resumes it")
    load_dir: Path | None = key(
        None, "checkpoint of another run whose components a new run starts from"
    )
    tracker: str | None = key(
        None, "any of Accelerate's trackers, in addition to log.jsonl; null: none"
    )
    log_every: int = key(20, "optimizer steps between lines of the log", low=1)

    def check(self, reader: Reader, keys: Keys) -> None:
        if self.load_dir is not None and not os.path.isdir(self.load_dir):
            raise reader.error(
                (*keys, "load_dir"),
                f"no such folder: {self.load_dir}; a run that goes on needs none",
            )
        if self.epoch is None and self.total_steps is None:
            raise reader.error((*keys, "epoch"), "null needs train.total_steps to end the run")


@dataclass
class Sinkhorn:
    weight: float = key(0.05, "weight of the K-OT loss", low=0)
    lam_state: float = key(2.0, "cost of pairing chunks of different states", low=0)
    blur: float = key(0.05, "entropic regularisation as a share of the median cost", low=1e-6)
    iterations: int = key(100, "iterations of the annealed Sinkhorn solver", low=1, high=100_000)
    solver: Literal["sinkhorn", "exact"] = key(
        "sinkhorn", "sinkhorn, on the device; or exact, the optimal assignment on the host"
    )

    def check(self, reader: Reader, keys: Keys) -> None:
        for name in ("blur", "iterations"):
            if self.solver == "exact" and getattr(self, name) != getattr(Sinkhorn(), name):
                problem = "solver: exact does not use it: leave it out"
                raise reader.error((*keys, name), problem)


@dataclass
class FlowLoss:
    target: Literal["velocity", "x1"] = key(
        "velocity", "prediction of the decoder: the velocity, or the clean chunk x1"
    )
    draws: int = key(
        1,
        "noise and time draws per observation, which the encoder sees only once",
        low=1,
        high=10_000,
    )
    camera_dropout: float = key(
        0.0, "probability that mask tokens replace a camera of a sample", low=0, high=1
    )
    prefix: int = key(
        0, "largest number of first actions that are given, for real-time chunking; 0: none", low=0
    )
