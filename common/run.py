"""What surrounds the training loop: processes, run folder, signals, log, held-out loss, saving and resuming."""

import fcntl
import json
import math
import os
import platform
import re
import signal
import sys
import time
import traceback
from pathlib import Path

import accelerate
import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.tracking import filter_trackers
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from common import checkpoint
from common.build import completed, import_plugins
from common.config import ConfigError, UserError, Yaml, to_dict
from common.data.features import cached_components
from common.data.loader import Data, to_device
from common.data.normalizer import Normalizer
from common.noise import Noise, seed_of
from common.parts import Parts, build_parts
from common.plots import draw_curves


def cli(main):
    """Run a script's main and exit: 0, 2 with one message for a user's mistake, 130 after Ctrl-C."""
    try:
        code = main()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


class Run:
    """One training run in its folder: where it stands (step, epoch, offset) and what happens around each step."""

    def __init__(self, cfg, options, script):
        self.cfg, self.train, self.options = cfg, cfg.train, options
        path = Path(script).resolve()
        self.script = path.name if path.parent == checkpoint.ROOT else str(path)
        self.folder = cfg.train.save_dir
        if not options.dry_run:
            self._claim_folder()
        self.accelerator = Accelerator(
            gradient_accumulation_steps=cfg.train.micro_steps,
            project_dir=self.folder,
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
            ],
        )
        kind = self.accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise ConfigError(
                f"{kind.value} shards the weights, which per-component files do not support: use plain DDP"
            )
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        launched = int(os.environ.get("WORLD_SIZE", self.world))
        if self.world != launched:
            raise ConfigError(
                f"{launched} processes were launched that do not see each other: no GPU here? On CPU: "
                f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node {launched} {path.name} ..."
            )
        self.device = self.accelerator.device
        if self.device.type == "cpu":
            # The launcher leaves one thread per process; results repeat bit for bit for the same number.
            torch.set_num_threads(
                max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
            )
        import_plugins(cfg.plugins)
        with self.accelerator.local_main_process_first():
            self.data = Data(cfg.data)
        self._batches()  # a batch_size that does not fit is an error now, not after the models are built
        self.steps_per_epoch = len(self.data.train_rows) // cfg.data.batch_size
        self.total = min(cfg.train.epoch * self.steps_per_epoch, cfg.train.total_steps or math.inf)
        self.step = self.epoch = self.offset = 0
        self.signal, self.stopping = None, False
        self.scalars = {}

    def _claim_folder(self):
        """Lock the run folder, so that two runs never write into one; processes of one run share the lock."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if int(os.environ.get("RANK", 0)) == 0:
                self.lock = (self.folder / ".lock").open("a+")
                # Unlike flock's, this lock is not inherited by loader processes, which outlive a killed run.
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.lock.truncate(0)
                self.lock.write(f"pid {os.getpid()} on {platform.node()}")
                self.lock.flush()
        except BlockingIOError as e:
            self.lock.seek(0)
            raise UserError(
                f"{self.folder}: another run writes here ({self.lock.read()}); set train.save_dir"
            ) from e
        except OSError as e:
            raise UserError(f"train.save_dir: {self.folder} cannot be written: {e.strerror}") from e

    def components(self) -> tuple[Parts, Normalizer]:
        """The listed components as train.yaml wants them initialised, and the statistics of this dataset."""
        torch.manual_seed(self.cfg.seed)
        self.sources = {
            name: Yaml.read(path) for name, path in self.cfg.model.component_config_paths.items()
        }
        start = self.train.load_dir
        if start and not (start / "meta.json").is_file():
            start = checkpoint.newest(start)
            if start is None:
                raise ConfigError(f"train.load_dir: {self.train.load_dir} holds no checkpoint")
        parts = build_parts(
            self.cfg.model, self.sources, self.data.facts, self.cfg.data.cameras, start
        )
        self.sources |= {name: completed(self.sources[name], part) for name, part in parts.items()}
        if self.options.dry_run:
            print(parts.table(self.cfg))
        features = self.cfg.data.cache == "features"
        if features:
            cached_components(parts, self.cfg.data.cameras)  # nothing to cache is an error now
        if self.cfg.data.cache != "none":  # last: decoding takes minutes
            self.data.cache_frames(dry_run=self.options.dry_run and not features)
        return parts, Normalizer(self.cfg.data.normalize, self.data.stats)

    def try_out(self, policy):
        """Two samples through everything, so that what does not fit, or is not used, is an error now."""
        policy.to(self.device).eval()
        batch = to_device(self.data.windows[self.data.train_rows[:2]], self.device)
        batch |= {"noise": Noise("try out", device=self.device), "progress": 1.0}
        try:
            loss, _ = policy(batch)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as e:
            owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(e.__traceback__)]
            at = [
                name
                for owner in owners
                for name, part in policy.parts.items()
                if owner in [*part.modules()]
            ]
            where = (
                f"component '{at[-1]}' ({self.cfg.model.component_config_paths[at[-1]]})"
                if at
                else self.script
            )
            problem = (
                f"no component {e} is listed"
                if isinstance(e, KeyError)
                else f"{type(e).__name__}: {e}"
            )
            shapes = ", ".join(
                f"{key} {tuple(x.shape)}" for key, x in batch.items() if isinstance(x, torch.Tensor)
            )
            raise ConfigError(f"{where}: {problem}\n    the first batch is {shapes}") from e
        used = parameters_of(loss)
        for name in policy.parts.trainable():
            idle = [
                key
                for key, p in policy.parts[name].named_parameters()
                if p.requires_grad and p not in used
            ]
            if len(idle) == sum(p.requires_grad for p in policy.parts[name].parameters()):
                raise ConfigError(
                    f"component '{name}' is listed, but {self.script} does not use it: leave it out"
                )
            if idle and self.world > 1:
                raise ConfigError(
                    f"component '{name}': {', '.join(idle[:5])} would be idle, which processes cannot share"
                )

    def resume(self, policy, optimizers, average):
        """Take up the newest checkpoint of the run folder, if there is one, and get ready to be stopped."""
        self.policy, self.optimizers, self.average = policy, optimizers, average
        found = [None]
        if self.main:
            checkpoint.repair(self.folder)
            found = [checkpoint.newest(self.folder)]
        folder = broadcast_object_list(found)[0]
        if folder:
            meta = checkpoint.load(folder, policy, optimizers, average)
            if meta["script"] != self.script:
                raise UserError(
                    f"{folder}: of {meta['script']}, not of {self.script}: set another train.save_dir"
                )
            for key, was, now in changes(meta["config"], to_dict(self.cfg)) if self.main else ():
                print(f"warning: {key} was {was}, now {now}")
            self.step, self.epoch, self.offset = meta["step"], meta["epoch"], meta["offset"]
            if (
                meta.get("episodes", {}).get("trained on", self.data.episodes) != self.data.episodes
                and self.main
            ):
                print(
                    "warning: other training episodes than so far (data.episodes, val_episodes, scores, keep_top)"
                )
            for what, now in self._circumstances().items():
                if meta[what] != now and self.main:
                    print(
                        f"warning: {what} was {meta[what]}, now {now}: training goes on, not bit for bit"
                    )
        if (
            self.cfg.data.cache == "features" and self.step < self.total
        ):  # now that the frozen weights are final
            self.data.cache_features(policy.parts, self.sources, self.accelerator)
        if self.main:
            print(
                f"resuming {folder} at step {self.step} of {self.total}"
                if folder
                else f"new run in {self.folder}"
            )
            (self.folder / "config.yaml").write_text(
                yaml.safe_dump(to_dict(self.cfg), sort_keys=False)
            )
            self._cut_log()
        if self.train.tracker:
            try:
                self.accelerator.log_with = filter_trackers(self.train.tracker, self.folder)
                shown = {
                    "config": yaml.safe_dump(to_dict(self.cfg))
                }  # as text: some take no nested values
                self.accelerator.init_trackers(self.train.project_name, shown)
                problem = "" if self.accelerator.trackers else "its package is not installed"
            except Exception as e:  # a tracker that cannot be reached must not cost the run
                problem, self.accelerator.trackers = e, []
            if problem and self.main:
                print(f"warning: tracker {self.train.tracker} is off: {problem}")
        self.handlers = {s: signal.signal(s, self._stop) for s in (signal.SIGTERM, signal.SIGINT)}
        shown = {
            "initial": self.step,
            "total": self.total,
            "disable": not self.main,
            "dynamic_ncols": True,
        }
        self.bar = tqdm(desc=self.train.project_name, unit="step", **shown)

    def _stop(self, number, frame):
        """Finish the step, save, exit; a second Ctrl-C stops at once."""
        self.signal = number
        signal.signal(number, self.handlers[number])

    def _circumstances(self):
        of_data = {"batch_size": self.cfg.data.batch_size, "samples": len(self.data.train_rows)}
        return {"processes": self.world, "threads": torch.get_num_threads(), **of_data}

    def batches(self):
        """Micro-batches until the run is done or told to stop, each with the noise of its step."""
        if self.step >= self.total:
            return
        batches = self._batches(self.epoch, self.offset)
        micro, self.waited, self.since = 0, 0.0, time.perf_counter()
        self.logged, asked = self.step, self.since
        for batch in batches:
            self.waited += time.perf_counter() - asked
            batch = to_device(batch, self.device, self.cfg.data.augment)
            self.position = batch.pop("position")
            key = (self.cfg.seed, self.step, micro)
            batch["noise"] = Noise(
                "objective", *key, rank=self.rank, world=self.world, device=self.device
            )
            batch["progress"] = self.step / self.total
            torch.manual_seed(seed_of("dropout", *key, self.rank))
            yield batch
            micro = 0 if self.accelerator.sync_gradients else micro + 1
            if self.step >= self.total or self.stopping:
                return
            asked = time.perf_counter()

    def _batches(self, epoch=0, offset=0):
        pin, seed = self.device.type == "cuda", self.cfg.seed
        return self.data.batches(
            seed, self.train.micro_steps, self.rank, self.world, pin, epoch, offset
        )

    def note(self, **scalars):
        """Add scalars of this step to what is logged, averaged over its micro-steps; no host read."""
        for name, value in scalars.items():
            self.scalars[name] = self.scalars.get(name, 0) + value / self.train.micro_steps

    def clip(self):
        """Clip each component's gradients; stop all processes, weights untouched, where anything is not finite.

        Holds the only host read of a step: is everything finite, and was any process told to stop.
        """
        self.accelerator.unscale_gradients()
        norms = {}
        for name in self.policy.parts.trainable():
            norms[f"norm/{name}"] = torch.nn.utils.clip_grad_norm_(
                self.policy.parts[name].parameters(), self.train.clip
            )
        self.scalars |= norms
        # With float16 the scaler itself meets overflowing gradients, by skipping the step.
        watched = [
            self.scalars["loss"],
            *(norms.values() if self.accelerator.scaler is None else ()),
        ]
        broken = (~torch.stack([value.float() for value in watched]).isfinite()).any().float()
        flags = torch.stack([broken, torch.full_like(broken, self.signal is not None)])
        broken, stopping = self.accelerator.reduce(flags, "sum").tolist()
        if broken:
            bad = [name for name, value in self.scalars.items() if not math.isfinite(value)]
            self.close()
            raise SystemExit(
                f"step {self.step + 1}: not finite: {', '.join(bad) or 'on another process'}. The weights were left as "
                f"they are; checkpoints in {self.folder} are from before. Lower peak_lr, or look at the data."
            )
        self.stopping = bool(stopping)

    def end_step(self, model):
        """After an optimizer step: position, bar and log, held-out loss at the end of an epoch, checkpoint when due."""
        epoch, offset = self.position
        ended = offset + self.cfg.data.batch_size > len(self.data.train_rows)
        self.epoch, self.offset = (epoch + 1, 0) if ended else (epoch, offset)
        self.bar.update()
        last = self.step >= self.total or self.stopping
        if self.step % self.train.log_every == 0 or last:
            self._log_step()
        self.scalars = {}
        if ended and len(self.data.val_rows) and self.epoch % self.train.val_every == 0:
            self._validate(model)
        due = self.train.save_every_steps and self.step % self.train.save_every_steps == 0
        if last or due or (ended and self.epoch % self.train.save_every == 0):
            self._save()

    def _log_step(self):
        now = time.perf_counter()
        steps, self.logged = self.step - self.logged, self.step
        timing = {"data_s": self.waited / steps, "updt_s": (now - self.since - self.waited) / steps}
        timing["samples_per_s"] = self.cfg.data.batch_size * steps / (now - self.since)
        self.since, self.waited = now, 0.0
        scalars = self._log(self.scalars, **timing)
        shown = {"loss": f"{scalars['loss']:.4f}", "samples/s": f"{timing['samples_per_s']:.0f}"}
        self.bar.set_postfix(shown | {key: f"{timing[key]:.3f}" for key in ("data_s", "updt_s")})

    def _log(self, scalars, **extra):
        """Mean over processes of device scalars, to log.jsonl and the tracker."""
        values = torch.stack(
            [torch.as_tensor(v, dtype=torch.float32, device=self.device) for v in scalars.values()]
        )
        values = self.accelerator.reduce(values, "mean").tolist()
        scalars = dict(zip(scalars, values, strict=True))
        if self.main:
            with (self.folder / "log.jsonl").open("a") as f:
                f.write(
                    json.dumps({"step": self.step, "epoch": self.epoch, **scalars, **extra}) + "\n"
                )
        self.accelerator.log({**scalars, **extra}, step=self.step)
        return scalars

    def _cut_log(self):
        """Lines of steps after the checkpoint are written again by this run: drop them."""
        file = self.folder / "log.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        kept = [
            line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.step
        ]
        file.with_suffix(".tmp").write_text("".join(line + "\n" for line in kept))
        file.with_suffix(".tmp").replace(file)

    @torch.no_grad()
    def _validate(self, model):
        """Loss on held-out episodes with the weights to run and the same noise every time."""
        sums, count, size = {}, 0, self.cfg.data.batch_size // (self.world * self.train.micro_steps)
        model.eval()
        with self.average.applied():
            for i, batch in enumerate(self.data.held_out(self.rank, self.world, self.device, size)):
                key = ("held out", self.cfg.seed, i)
                batch["noise"] = Noise(*key, rank=self.rank, world=self.world, device=self.device)
                batch["progress"] = 1.0
                _, scalars = self.policy(batch)
                n = len(batch["action"])
                sums = {name: sums.get(name, 0) + n * value for name, value in scalars.items()}
                count += n
        model.train()
        if count:
            scalars = self._log({f"val/{name}": value / count for name, value in sums.items()})
            if self.main:
                self.bar.write(
                    f"epoch {self.epoch}, step {self.step}: held-out loss {scalars['val/loss']:.4f}"
                )

    def _save(self):
        name = f"step_{self.step}" if self.offset else f"epoch_{self.epoch}"
        if self.main:
            meta = {
                "step": self.step,
                "epoch": self.epoch,
                "offset": self.offset,
                "script": self.script,
            }
            meta |= self._circumstances()
            meta["versions"] = {"torch": torch.__version__, "accelerate": accelerate.__version__}
            meta |= {"facts": self.data.facts, "aliases": self.policy.parts.aliases}
            meta["episodes"] = {
                "trained on": self.data.episodes,
                "held out": self.data.val_episodes,
            }
            meta["components"] = {
                name: self.sources[name].text
                for name in [*self.policy.parts, *self.policy.parts.aliases]
            }
            meta["config"] = to_dict(self.cfg)
            checkpoint.save(self.folder / name, self.policy, self.optimizers, self.average, meta)
            checkpoint.prune(self.folder, self.train.keep_last, self.step)
            draw_curves(self.folder)
        self.accelerator.wait_for_everyone()

    def finish(self) -> int:
        """Close the run; the exit code: 130 after Ctrl-C, else 0."""
        self.close()
        if self.main:
            print(
                f"{'stopped' if self.step < self.total else 'finished'} at step {self.step}: {self.folder}"
            )
        return 130 if self.signal == signal.SIGINT else 0

    def close(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.bar.close()
        self.accelerator.end_training()
        if hasattr(self, "lock"):
            self.lock.close()

    @torch.no_grad()
    def dry_run(self, policy) -> int:
        """Print one batch, the loss of two samples of it, one chunk, the config. The run folder stays as it is."""
        batch = to_device(next(iter(self._batches())), self.device, self.cfg.data.augment)
        batch.pop("position")
        for key, value in batch.items():
            print(f"batch  {key:<32}{tuple(value.shape)!s:<24}{value.dtype}")
        two = {
            key: value[:2] for key, value in batch.items()
        }  # a whole batch takes minutes on a CPU
        two |= {
            "noise": Noise("objective", self.cfg.seed, 0, 0, device=self.device),
            "progress": 1.0,
        }
        _, scalars = policy.train()(two)
        print("loss  ", ", ".join(f"{name} {value:.4f}" for name, value in scalars.items()))
        policy.eval()
        if self.cfg.data.cache == "features":
            self.data.cache_features(policy.parts, self.sources, self.accelerator, dry_run=True)
        sampled = ""
        if hasattr(policy, "sample"):  # train_mi.py's draws no chunks
            one = {key: value[:1] for key, value in batch.items()}
            chunk = policy.sample(policy.encode(one), torch.zeros_like(one["action"]), steps=2)
            sampled = f"sample {tuple(chunk.shape)}; "
        print(f"{sampled}{self.total} steps of {self.steps_per_epoch} per epoch")
        print(yaml.safe_dump(to_dict(self.cfg), sort_keys=False))
        return 0


HARMLESS = (  # keys whose change is not told, and changes of one
    r"train\.(project_name|save|keep|load|tracker|log)|model\.component_config_paths"
    r"|data\.(num_workers|cache_max_gb|root|val_samples|batch_size|cache: (none|frames) (none|frames)$)"
)


def parameters_of(loss):
    """The leaves that a loss has gradients for, found in its graph: backward() would take the memory of all of them."""
    found, nodes, todo = set(), set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            found |= {node.variable} if hasattr(node, "variable") else set()
            todo += [following for following, _ in node.next_functions]
    return found


def changes(was, now, path=""):
    """(key, old, new) of every key that matters to training and differs between two configs."""
    if not (isinstance(was, dict) and isinstance(now, dict)):
        return (
            [(path, was, now)]
            if was != now and not re.match(HARMLESS, f"{path}: {was} {now}")
            else []
        )
    keys = [*was, *(key for key in now if key not in was)]
    return [
        one
        for key in keys
        for one in changes(was.get(key), now.get(key), f"{path}.{key}" if path else key)
    ]
