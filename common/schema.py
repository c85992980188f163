"""The sections of train.yaml that scripts share; each has its own `loss`."""

import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.config import key, suggest


@dataclass
class Part:
    init: Literal["scratch"] | Path | None = key(
        None, "a .safetensors; scratch: random; null: the block's `weights:`"
    )
    freeze: bool = key(False, "not trained, kept in eval mode")
    same_as: str | None = key(
        None, "the component whose module this one shares; one call serves both"
    )


@dataclass
class Model:
    component_config_paths: dict[str, Path] = key(..., "component name -> its YAML")
    component_build_args: dict[str, Part] = key({}, "the exceptions only")
    component_optims: dict[str, dict] = key(
        {}, "component name -> the keys of train.optim that differ for it"
    )

    def check(self, reader, keys):
        names, args, optim = (
            self.component_config_paths,
            self.component_build_args,
            typing.get_type_hints(Optim),
        )
        for where, parts in (
            ("component_build_args", args),
            ("component_optims", self.component_optims),
        ):
            for name in [n for n in parts if n not in names]:
                raise reader.error((*keys, where, name), f"no such component{suggest(name, names)}")
        files = {("component_config_paths", name): path for name, path in names.items()}
        files |= {("component_build_args", n, "init"): part.init for n, part in args.items()}
        for where, path in files.items():
            if isinstance(path, Path) and not path.is_file():
                raise reader.error((*keys, *where), f"no such file: {path}")
        for name, part in args.items():
            here, other = (*keys, "component_build_args", name), part.same_as
            if other is not None and other not in names:
                raise reader.error(
                    (*here, "same_as"), f"no component '{other}'{suggest(other, names)}"
                )
            if other is not None and args.get(other, Part()).same_as:
                raise reader.error(
                    (*here, "same_as"),
                    f"'{other}' is shared itself: name a component without same_as",
                )
            if other is not None and (part.init or part.freeze):
                raise reader.error(here, f"init and freeze are those of '{other}': set them there")
        for name, changes in self.component_optims.items():
            here, part = (*keys, "component_optims", name), args.get(name, Part())
            if part.freeze or part.same_as:
                why = f"the same as '{part.same_as}'" if part.same_as else "frozen"
                raise reader.error(here, f"'{name}' is {why}: it has no optimizer of its own")
            for k in [k for k in changes if k not in optim]:
                raise reader.error((*here, k), f"unknown key{suggest(k, optim)}")
            changes.update(
                {k: reader.read(optim[k], value, (*here, k)) for k, value in changes.items()}
            )


@dataclass
class Augment:
    brightness: float = key(0.2, "colour jitter: a factor of 1 +- this", low=0)
    contrast: float = key(0.2, "colour jitter: a factor of 1 +- this", low=0)
    saturation: float = key(0.2, "colour jitter: a factor of 1 +- this", low=0)
    hue: float = key(0.1, "colour jitter: +- this share of the colour circle", low=0)
    blur: float = key(0.0, "probability of a Gaussian blur", low=0)
    shift: int = key(0, "pixels, +- in both directions", low=0)


@dataclass
class Data:
    root: str = key(..., "a LeRobot folder, a Hub id org/name, or a generated set such as tabletop")
    cameras: dict[str, str] = key(
        {}, "name of a camera here -> its key in the dataset; the order counts"
    )
    state_keys: list[str] = key(
        ["observation.state"], "low-dimensional columns, concatenated in this order"
    )
    hold_keys: list[str] = key([], "columns taken nearest, not interpolated, when resampling")
    action_key: str = key("action", "column of the action")
    action_horizon: int = key(40, "actions per chunk", low=1)
    action_offset: int = key(0, "steps from the observation to the first action of its chunk")
    obs_proprio_history: int = key(40, "states per observation", low=1)
    obs_images_history: int = key(1, "images per observation and camera", low=1)
    HZ: float = key(..., "steps per second; a dataset of another fps is resampled", low=0.01)
    image_size: list[int] = key(
        [240, 320], "[height, width] that images are resized to", low=1, size=2
    )
    augment: Augment | None = key(None, "of the images, in training; null: none")
    normalize: Literal["mean_std", "quantile"] = key(
        "mean_std", "how states and actions are scaled"
    )
    first_frames: int | None = key(
        None, "samples start at the first frames of an episode only; null: at all", low=1
    )
    neighbours: int = key(
        1, "samples of similar state that share a batch, for K-OT; 1: a plain shuffle", low=1
    )
    episodes: list[int] | None = key(None, "null: all", low=0)
    scores: Path | None = key(
        None, "scores.parquet of train_mi.py; null: no episode is left out for its score"
    )
    keep_top: float | None = key(
        None, "share of the training episodes that data.scores keeps, the best"
    )
    val_episodes: float | list[int] = key(
        0.1, "held-out episodes: a share, taken from the end, or a list", low=0
    )
    val_samples: int = key(
        512, "held-out windows evaluated at the end of each epoch, evenly spaced", low=0
    )
    cache: Literal["none", "frames", "features"] = key(
        "frames", "on disk; features: what frozen components see, too"
    )
    cache_max_gb: float = key(200.0, "a larger cache is refused", low=0)
    batch_size: int = key(
        60, "samples per optimizer step, over all processes and micro-steps", low=1
    )
    num_workers: int = key(2, "loader processes per training process", low=0)

    def check(self, reader, keys):
        root = reader.path(self.root, (*keys, "root"))
        if self.root.split("/")[0] in ("", ".", "..", "~") or root.is_dir():
            self.root = str(root)
        if self.cache == "features" and self.augment is not None:
            raise reader.error(
                (*keys, "augment"),
                "set it to null: data.cache: features looks at plain pictures, once",
            )
        if isinstance(self.val_episodes, float) and (held := self.val_episodes) >= 1:
            raise reader.error(
                (*keys, "val_episodes"), f"expected a share below 1, or a list; found {held}"
            )
        if (self.scores is None) != (self.keep_top is None):
            raise reader.error(
                (*keys, "keep_top"),
                "data.scores and data.keep_top go together: set both, or neither",
            )
        if self.keep_top is not None and not 0 < self.keep_top <= 1:
            raise reader.error(
                (*keys, "keep_top"), f"expected a share above 0, at most 1; found {self.keep_top}"
            )
        for k in self.hold_keys:
            if k not in (known := [*self.state_keys, self.action_key]):
                raise reader.error(
                    (*keys, "hold_keys"), f"'{k}' is no state or action key{suggest(k, known)}"
                )


@dataclass
class Optim:
    type: Literal["adamw_warmup_cosine_decay", "adamw_onecycle", "schedule_free_radam"] = key(
        "adamw_warmup_cosine_decay", "optimizer and schedule of the learning rate"
    )
    peak_lr: float = key(1.0e-4, "highest learning rate", low=0)
    warmup_steps: int = key(2000, "optimizer steps from start_lr to peak_lr", low=0)
    betas: list[float] = key([0.9, 0.999], "Adam's decay rates", low=0, size=2)
    eps: float = key(1.0e-10, "Adam's epsilon", low=0)
    weight_decay: float = key(1.0e-5, "decoupled", low=0)
    start_lr: float = key(1.0e-6, "learning rate of the first step", low=0)
    end_lr: float = key(1.0e-6, "learning rate of the last step", low=0)


@dataclass
class Train:
    project_name: str = key(..., "name of the run")
    optim: Optim = key(Optim(), "of every component; model.component_optims names exceptions")
    epoch: int = key(1000, "epochs to train", low=1)
    total_steps: int | None = key(
        None, "optimizer steps to train, if that is fewer; null: all of epoch's", low=1
    )
    micro_steps: int = key(1, "gradient accumulation: batches per optimizer step", low=1)
    clip: float = key(1.0, "largest norm of a component's gradient", low=0)
    val_every: int = key(1, "epochs between held-out losses", low=1)
    ema: float | None = key(
        0.999, "decay of the average of the weights that is evaluated and saved; null: none", low=0
    )
    save_every: int = key(3, "epochs between checkpoints", low=1)
    save_every_steps: int | None = key(
        None, "optimizer steps between further checkpoints; null: none", low=1
    )
    keep_last: int = key(2, "checkpoints kept", low=1)
    save_dir: Path = key(..., "run folder; the same command again resumes it")
    load_dir: Path | None = key(
        None, "checkpoint of another run whose components a new run starts from"
    )
    tracker: str | None = key(None, "any of Accelerate's; null: log.jsonl only")
    log_every: int = key(20, "optimizer steps between lines of the log", low=1)


@dataclass
class Sinkhorn:
    weight: float = key(0.05, "of the K-OT term")
    lam_state: float = key(2.0, "cost of pairing different states")
    blur: float = key(0.05, "entropic regularisation as a share of the median cost")
    iterations: int = key(100, "of the annealed Sinkhorn solver")
    solver: Literal["sinkhorn", "exact"] = key("sinkhorn", "exact: optimal assignment on the host")


@dataclass
class FlowLoss:
    """Keys of `loss` that all flow-matching policies share."""

    target: Literal["velocity", "x1"] = key(
        "velocity", "what the decoder predicts; it is converted when sampling"
    )
    draws: int = key(1, "noise and time draws per observation, which is encoded once", low=1)
    camera_dropout: float = key(0.15, "probability that a sample loses a camera", low=0, high=1)
    prefix: int = key(
        0, "longest given prefix of a chunk in training, for real-time chunking; 0: none", low=0
    )
