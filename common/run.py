"""The life of a training run: its folder, processes, batches, signals, saving and resuming."""

import ctypes
import fcntl
import math
import os
import platform
import re
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from common import checkpoint, preflight
from common.build import completed, import_plugins
from common.config import ConfigError, UserError, Yaml, to_dict
from common.data.loader import Data, facts_of_config, to_device
from common.data.normalizer import Normalizer, differences
from common.data.order import check_batch_size
from common.envs import registry  # noqa: F401 (names of data.root)
from common.files import whole_file
from common.log import Log
from common.noise import Noise, seed_of
from common.optim import AveragedWeights
from common.parts import Parts, build_parts, check_sources
from common.plots import draw_curves

PR_SET_PDEATHSIG = 1  # of Linux's prctl()
STOPPING = (signal.SIGINT, signal.SIGTERM)  # what ends a run after the step that is under way


class Terminated(KeyboardInterrupt):
    """SIGTERM where no step is under way: what Ctrl-C cleans up, this does."""


def cli(main: Callable[[], int]) -> None:
    """Run a script's main and exit: 0; 2 after a user's mistake; 130 after Ctrl-C, 143 after kill.

    Whatever the script is at when a signal comes, a command that follows it in a Makefile or shell
    script is not to take half of its work for the whole.
    """

    def terminate(number, frame):
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    _end_with_launcher()
    try:
        code = main()
    except KeyboardInterrupt as e:
        number = signal.SIGTERM if isinstance(e, Terminated) else signal.SIGINT
        print(f"stopped by {number.name}", file=sys.stderr)
        code = 128 + number
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        code = 2
    except (RuntimeError, MemoryError) as e:
        if not preflight.is_out_of_memory(e):
            raise
        print(
            f"error: {e}\n"
            "    Memory ran out. In training, lower data.batch_size, or keep it and raise "
            "train.micro_steps; lower data.image_size or loss.draws; or freeze a backbone. "
            "In evaluation, lower --batch.",
            file=sys.stderr,
        )
        code = 2
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.exit(code)


class Run:
    """One training run in its folder.

    step, epoch, offset: finished optimizer steps, finished epochs, and samples of the epoch that is
    under way. total: optimizer steps of the whole run. scalars: of this step, to be logged. signal:
    that told this process to stop; stopping: the one that all processes know of; None without any.
    """

    def __init__(self, cfg: Any, options: Namespace, script: str):
        self.cfg = cfg
        self.train = cfg.train
        self.options = options
        path = Path(script).resolve()
        self.script = path.name if path.parent == checkpoint.ROOT else str(path)
        self.folder = cfg.train.save_dir
        self.file_lock = None if options.dry_run else _lock_folder(self.folder)
        self.accelerator = _accelerator(cfg, path.name)
        self.rank = self.accelerator.process_index
        self.world = self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.device = self.accelerator.device
        if self.device.type == "cpu" and not _threads_are_chosen():
            # The launcher leaves one thread per process. Results depend on the number, bit for bit.
            cores = len(os.sched_getaffinity(0))
            processes = int(os.getenv("LOCAL_WORLD_SIZE", 1))
            torch.set_num_threads(max(1, cores // processes))
        data = cfg.data
        check_batch_size(data.batch_size, cfg.train.micro_steps, self.world, data.neighbours)
        import_plugins(cfg.plugins)
        paths = cfg.model.component_config_paths
        self.sources = {name: Yaml.read(path) for name, path in paths.items()}
        check_sources(cfg.model, self.sources, facts_of_config(cfg.data), cfg.data.cameras)
        with self.accelerator.local_main_process_first():
            self.data = Data(cfg.data)
        self.loader()  # more samples per step than there are is an error before models are built
        if cfg.data.cache != "none":
            self.data.check_frame_space()
        self.steps_per_epoch = len(self.data.train_rows) // cfg.data.batch_size
        limits = [cfg.train.total_steps]
        if cfg.train.epoch is not None:
            limits.append(cfg.train.epoch * self.steps_per_epoch)
        self.total: int = min(filter(None, limits))
        self.val_every = self._spaced(cfg.train.val_every)
        self.save_every = self._spaced(cfg.train.save_every)
        self.step = 0
        self.epoch = 0
        self.offset = 0
        self.signal: signal.Signals | None = None
        self.stopping: signal.Signals | None = None
        self.scalars = {}

    def _spaced(self, every):
        """Epochs between two events: a multiple of `every`, of at least min_interval steps.

        A function of the config alone, so that a resumed run saves at the same steps.
        """
        if every is None:
            return None
        return every * math.ceil(self.train.min_interval / (every * self.steps_per_epoch))

    def _notice_of_short_epochs(self):
        pairs = ("val_every", self.val_every), ("save_every", self.save_every)
        changed = [
            f"train.{name} is {every} in place of {getattr(self.train, name)}"
            for name, every in pairs
            if every != getattr(self.train, name)
        ]
        if changed:
            print(
                f"notice: an epoch has only {self.steps_per_epoch} steps: {', '.join(changed)} "
                f"(train.min_interval: {self.train.min_interval} steps)"
            )

    def components(self) -> tuple[Parts, Normalizer]:
        """The components, initialised as train.yaml says, and the statistics of the dataset."""
        if self.cfg.data.cache == "features":
            self.data.check_feature_space(self.cfg.model, self.sources)
        torch.manual_seed(self.cfg.seed)
        origin = checkpoint.origin(self.train.load_dir) if self.train.load_dir else None
        cameras = list(self.cfg.data.cameras)
        parts = build_parts(self.cfg.model, self.sources, self.data.facts, cameras, origin)
        for name, file in parts.files.items():
            print(f"{name}: weights from {file}")
        for name, part in parts.items():
            self.sources[name] = completed(self.sources[name], part)
        if self.options.dry_run:
            print(parts.table(self.cfg))
        if origin:
            title = f"components of {origin.folder} (train.load_dir)"
            self._warn_of_other_data(checkpoint.read_stats(origin.folder, origin.facts), title)
        data = self.cfg.data
        return parts, Normalizer(data.normalize, self.data.stats, data.min_std)

    def _warn_of_other_data(self, trained, title):
        """Name the dimensions that are of another kind than in statistics of a checkpoint."""
        lines = differences(trained, self.data.stats, self.data.names) if self.is_main else []
        if lines:
            print("\n    ".join([f"warning: other data than {title} learned from", *lines]))

    def preflight(self, policy: nn.Module) -> None:
        preflight.preflight(self, policy)

    def dry_run(self, policy: nn.Module) -> int:
        return preflight.dry_run(self, policy)

    def resume(
        self, policy: nn.Module, optimizers: list[Optimizer], average: AveragedWeights
    ) -> None:
        """Load the newest checkpoint of the run folder, if there is one; start log and signals."""
        self.policy = policy
        self.optimizers = optimizers
        self.average = average
        folder = [None]
        if self.is_main:
            checkpoint.repair(self.folder)
            folder = [checkpoint.newest(self.folder)]
        folder = broadcast_object_list(folder)[0]
        if folder:
            self._load(folder)
        if self.step < self.total:
            # Last, because it takes minutes to hours; and only now are the frozen weights final.
            if self.cfg.data.cache != "none":
                self.data.cache_frames()
            if self.cfg.data.cache == "features":
                self.data.cache_features(policy.parts, self.sources, self.accelerator)
        if self.is_main:
            print(self._beginning(folder))
            self._notice_of_short_epochs()
            if self.step < self.total:  # else it stays that of the steps that were trained
                config = yaml.safe_dump(to_dict(self.cfg), sort_keys=False)
                with whole_file(self.folder / "config.yaml") as file:
                    file.write_text(config)
        self.log = Log(self.accelerator, self.cfg, self.step, self.total)
        self.handlers = {number: signal.signal(number, self._stop) for number in STOPPING}

    def _beginning(self, folder):
        if not folder:
            return f"new run in {self.folder}"
        if self.step >= self.total:
            return f"{folder} has {self.step} steps of {self.total}: nothing is left to train"
        return f"resuming {folder} at step {self.step} of {self.total}"

    def _load(self, folder):
        meta = checkpoint.translated_meta(folder)
        self.data.require_width(folder, meta["facts"])
        if meta["script"] != self.script:
            raise UserError(
                f"{folder}: of {meta['script']}, not of {self.script}: set another train.save_dir"
            )
        checkpoint.require_same_cameras(folder, meta, self.cfg.data.cameras)
        checkpoint.load(folder, meta, self.policy, self.optimizers, self.average)
        self.step = meta["step"]
        self.epoch = meta["epoch"]
        self.offset = meta["offset"]
        configured = self.cfg.data.min_std
        self.cfg.data.min_std = self.policy.stats.min_std
        if not self.is_main:
            return
        if configured != self.cfg.data.min_std:
            kept = f"{self.cfg.data.min_std:g}, as this run began"
            print(f"warning: data.min_std stays {kept}; a new train.save_dir takes {configured:g}")
        for key, was, now in changes(meta["config"], to_dict(self.cfg)):
            print(f"warning: {key} was {was}, now {now}")
        if meta["episodes"]["trained on"] != self.data.episodes:
            print(
                "warning: other training episodes than so far "
                "(data.episodes, val_episodes, scores, keep_top)"
            )
        found = self.data.identity
        if meta.get("dataset", found)["content_key"] != found["content_key"]:
            print(
                f"warning: files of {found['root']} are not those that {folder} was trained on, in "
                f"{meta['dataset']['root']}: changed, recorded anew, or a copy with other times"
            )
        title = f"this run, which keeps the statistics of {folder},"
        self._warn_of_other_data(self.policy.stats.state_dict(), title)
        for key, now in self._conditions().items():
            if meta[key] != now:
                print(
                    f"warning: {key} was {meta[key]}, now {now}: training goes on, not bit for bit"
                )

    def _conditions(self):
        """Conditions under which the same steps give the same bits."""
        return {
            "processes": self.world,
            "threads": torch.get_num_threads(),
            "batch_size": self.cfg.data.batch_size,
            "samples": len(self.data.train_rows),
        }

    def _stop(self, number, frame):
        """Finish the step, save, exit; a second Ctrl-C stops at once."""
        self.signal = signal.Signals(number)
        signal.signal(number, self.handlers[number])

    def loader(self, epoch: int = 0, offset: int = 0) -> DataLoader:
        """Micro-batches of this process from a position on, without end, on the host."""
        return self.data.batches(
            self.cfg.seed,
            self.train.micro_steps,
            self.rank,
            self.world,
            self.device.type == "cuda",
            epoch,
            offset,
        )

    def batches(self) -> Iterator[dict]:
        """Micro-batches until the run is done or told to stop, each with the noise of its step."""
        if self.step >= self.total:
            return
        micro = 0
        for batch in self.log.timed(self.loader(self.epoch, self.offset), self.step):
            batch = to_device(batch, self.device, self.cfg.data.augment)
            self.position = batch.pop("position")
            key = (self.cfg.seed, self.step, micro)
            batch["noise"] = self._noise("objective", *key)
            batch["progress"] = self.step / self.total
            torch.manual_seed(seed_of("dropout", *key, self.rank))
            yield batch
            micro = 0 if self.accelerator.sync_gradients else micro + 1
            if self.step >= self.total or self.stopping is not None:
                return

    def _noise(self, *key):
        return Noise(*key, rank=self.rank, world=self.world, device=self.device)

    def log_scalars(self, **scalars: torch.Tensor) -> None:
        """Add scalars of this micro-step to the means that are logged; no host read."""
        for name, value in scalars.items():
            self.scalars[name] = self.scalars.get(name, 0) + value / self.train.micro_steps

    def clip(self) -> None:
        """Clip each component's gradients; stop all processes if loss or a norm is not finite.

        The weights are untouched then. This holds the only host read of a step: whether everything
        is finite, and which signals told any process to stop.
        """
        self.accelerator.unscale_gradients()
        norms = {}
        for name in self.policy.parts.trainable():
            parameters = self.policy.parts[name].parameters()
            norms[f"norm/{name}"] = torch.nn.utils.clip_grad_norm_(parameters, self.train.clip)
        self.scalars |= norms
        checked = [self.scalars["loss"]]
        if self.accelerator.scaler is None:
            # With float16 the scaler handles overflowing gradients by skipping the step.
            checked += norms.values()
        finite = torch.stack([value.float() for value in checked]).isfinite()
        broken = (~finite).any().float()
        signals = [torch.full_like(broken, self.signal == number) for number in STOPPING]
        flags = torch.stack([broken, *signals])
        broken, *received = self.accelerator.reduce(flags, "sum").tolist()
        told = [number for number, count in zip(STOPPING, received, strict=True) if count]
        self.stopping = told[0] if told else None
        if broken:
            bad = [name for name, value in self.scalars.items() if not math.isfinite(value)]
            self.close()
            raise SystemExit(
                f"step {self.step + 1}: not finite: {', '.join(bad) or 'on another process'}. The "
                f"weights were left as they are; checkpoints in {self.folder} are from before. "
                "Lower peak_lr, or look at the data."
            )

    def end_step(self, model: nn.Module) -> None:
        """After an optimizer step: position, log, held-out loss and checkpoint if they are due."""
        self.epoch, self.offset = self.position
        epoch_ends = self.offset + self.cfg.data.batch_size > len(self.data.train_rows)
        if epoch_ends:
            self.epoch += 1
            self.offset = 0
        self.log.bar.update()
        last = self.step >= self.total or self.stopping is not None
        if last or self.step % self.train.log_every == 0:
            self.log.training(self.step, self.epoch, self.scalars)
        self.scalars = {}
        validated = epoch_ends and _due(self.epoch, self.val_every)
        finished = self.step >= self.total and self.val_every is not None
        if (validated or finished) and len(self.data.val_rows):
            self._validate(model)
        saved = epoch_ends and _due(self.epoch, self.save_every)
        if last or saved or _due(self.step, self.train.save_every_steps):
            self._save()

    @torch.no_grad()
    def _validate(self, model):
        """Loss on held-out episodes with the averaged weights and the same noise every time."""
        sums = {}
        rows = 0
        size = self.cfg.data.batch_size // (self.world * self.train.micro_steps)
        model.eval()
        with self.average.applied():
            held_out = self.data.held_out(self.rank, self.world, self.device, size)
            for i, batch in enumerate(held_out):
                first, count, total = batch.pop("share")
                key = ("held out", self.cfg.seed, i)
                batch["noise"] = Noise(*key, device=self.device, share=(first, total))
                batch["progress"] = 1.0
                _, scalars = self.policy(batch)
                rows += count
                for name, value in scalars.items():
                    sums[name] = sums.get(name, 0) + count * value
        model.train()
        values = [
            torch.as_tensor(x, dtype=torch.float32, device=self.device) for x in sums.values()
        ]
        counted = torch.tensor(float(rows), device=self.device)
        *values, rows = self.accelerator.reduce(torch.stack([*values, counted]), "sum")
        means = {name: value / rows for name, value in zip(sums, values, strict=True)}
        self.log.held_out(self.step, self.epoch, means)

    def _save(self):
        if self.is_main:
            name = f"step_{self.step}" if self.offset else f"epoch_{self.epoch}"
            policy = self.policy
            checkpoint.save(self.folder / name, policy, self.optimizers, self.average, self._meta())
            checkpoint.prune(self.folder, self.train.keep_last, self.step)
            draw_curves(self.folder)
        self.accelerator.wait_for_everyone()

    def _meta(self):
        parts = self.policy.parts
        return {
            "step": self.step,
            "epoch": self.epoch,
            "offset": self.offset,
            "script": self.script,
            **self._conditions(),
            "versions": {"torch": torch.__version__, "accelerate": accelerate.__version__},
            "mixed_precision": self.accelerator.mixed_precision,
            "facts": self.data.facts,
            "columns": self.data.windows.sizes,
            "episode_hashes": {str(n): text for n, text in self.data.windows.hashes.items()},
            "names": self.data.names,
            "dataset": self.data.identity,
            "aliases": parts.aliases,
            "episodes": {"trained on": self.data.episodes, "held out": self.data.val_episodes},
            "components": {name: self.sources[name].text for name in [*parts, *parts.aliases]},
            "config": to_dict(self.cfg),
        }

    def finish(self) -> int:
        """Close the run; the exit code: 130 after Ctrl-C, 143 after SIGTERM, else 0.

        The signal counts in all processes, whichever received it.
        """
        self.close()
        stopped_by = self.stopping or self.signal  # a signal after the last step is known here only
        if self.is_main:
            state = "stopped" if self.step < self.total else "finished"
            print(f"{state} at step {self.step}: {self.folder}")
            recent = self.log.recent()
            if self.step >= self.total and recent:
                for line in self.policy.report(recent):
                    print(f"notice: {line}")
        return 128 + stopped_by if stopped_by else 0

    def close(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.log.close()
        if self.file_lock:
            self.file_lock.close()


def _is_launched():
    """Whether `accelerate launch` or torchrun is the parent of this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def _end_with_launcher():
    """Get SIGTERM when the launcher ends: `accelerate launch` does not pass on what ends it."""
    if not _is_launched() or not sys.platform.startswith("linux"):
        return
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:  # of another user, or gone
        return
    if b"accelerate" in command or b"torch" in command:  # no shell, which may go away: nohup
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _threads_are_chosen():
    """Whether the user set the number of threads, which torch then has already.

    By OMP_NUM_THREADS, or --num_cpu_threads_per_process of `accelerate launch`. The launchers set
    OMP_NUM_THREADS as well where the user did not: only their own environment tells.
    """
    if "OMP_NUM_THREADS" not in os.environ or not _is_launched():
        return "OMP_NUM_THREADS" in os.environ
    launcher = Path(f"/proc/{os.getppid()}")
    try:
        environment = (launcher / "environ").read_bytes().split(b"\0")
        command = (launcher / "cmdline").read_bytes().replace(b"-", b"_")
    except OSError:  # of another user, or gone
        return False
    by_environment = any(entry.startswith(b"OMP_NUM_THREADS=") for entry in environment)
    return by_environment or b"__num_cpu_threads_per_process" in command


def _lock_folder(folder):
    """Open lock file of a run folder, so that two runs never write into one.

    None in other processes than the first, which share its lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if int(os.getenv("RANK", 0)):
            return None
        file = (folder / ".lock").open("a+")
        try:
            # Not flock: loader processes outlive a killed run and would inherit its lock.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            file.seek(0)
            problem = f"another run writes here ({file.read()}); set train.save_dir"
            raise UserError(f"{folder}: {problem}") from e
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {platform.node()}")
        file.flush()
        return file
    except OSError as e:
        raise UserError(f"train.save_dir: {folder} cannot be written: {e.strerror}") from e


def _accelerator(cfg, script):
    made = Accelerator(
        gradient_accumulation_steps=cfg.train.micro_steps,
        project_dir=cfg.train.save_dir,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        ],
    )
    kind = made.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"{kind.value} shards the weights, which per-component files do not support: "
            "use plain DDP"
        )
    launched = int(os.getenv("WORLD_SIZE") or made.num_processes)
    if made.num_processes != launched:
        raise ConfigError(
            f"{launched} processes were launched that do not see each other: no GPU here? On CPU: "
            f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node {launched} {script} ..."
        )
    return made


def _due(count, every):
    return every is not None and count % every == 0


NOT_REPORTED = (  # keys, and changes of one key, that do not change what is learned
    r"train\.(project_name|save|keep|load|tracker|log|min_interval)|model\.component_config_paths"
    r"|data\.(num_workers|cache_max_gb|root|val_samples|batch_size)"
    r"|data\.cache: (none|frames) (none|frames)$"
)


def changes(was: Any, now: Any, path: str = "") -> list[tuple]:
    """(key, old, new) of every key that matters to training and differs between two configs."""
    if isinstance(was, dict) and isinstance(now, dict):
        found = []
        for key in [*was, *(key for key in now if key not in was)]:
            found += changes(was.get(key), now.get(key), f"{path}.{key}" if path else key)
        return found
    if was == now or re.match(NOT_REPORTED, f"{path}: {was} {now}"):
        return []
    return [(path, was, now)]
