"""The log of a run: log.jsonl, the tracker, the progress bar, and the time that steps take."""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from tqdm import tqdm

from common.config import to_dict


class Log:
    """Writes one line of log.jsonl per logged step or held-out loss, and the same to the tracker.

    Lines are {"step", "epoch", "time", scalars, timing}. time: of day, in seconds since 1970.
    data_s: seconds per step that training waited for data. updt_s: seconds per step for the rest of
    it. stderr shows a progress bar, or, where it is no terminal, a line for each logged step.
    """

    def __init__(self, accelerator: Accelerator, cfg: Any, step: int, total: int):
        self.accelerator = accelerator
        self.is_main = accelerator.is_main_process
        self.file = cfg.train.save_dir / "log.jsonl"
        self.batch_size = cfg.data.batch_size
        self.total = total
        self.terminal = sys.stderr.isatty()
        if self.is_main:
            self._cut_back(step)
        if cfg.train.tracker:
            self._start_tracker(cfg)
        self.bar = tqdm(
            desc=cfg.train.project_name,
            unit="step",
            initial=step,
            total=total,
            disable=not (self.is_main and self.terminal),
            dynamic_ncols=True,
        )

    def _cut_back(self, step):
        """Drop the lines of steps after the checkpoint, which this run writes again."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        complete = [line for line in lines if line.endswith("}")]
        kept = [line for line in complete if json.loads(line)["step"] <= step]
        file = self.file.with_suffix(".tmp")
        file.write_text("".join(line + "\n" for line in kept))
        file.replace(self.file)

    def _start_tracker(self, cfg):
        name = cfg.train.tracker
        problem = None
        try:
            self.accelerator.log_with = filter_trackers(name, self.file.parent)
            # The config goes as text because some trackers take no nested values.
            config = {"config": yaml.safe_dump(to_dict(cfg))}
            self.accelerator.init_trackers(cfg.train.project_name, config)
            if not self.accelerator.trackers:
                problem = "its package is not installed"
        except Exception as e:  # a tracker that cannot be reached must not cost the run
            problem = e
            self.accelerator.trackers = []
        if problem and self.is_main:
            print(f"warning: tracker {name} is off: {problem}")

    def timed(self, batches: Iterable[dict], step: int) -> Iterator[dict]:
        """The same batches; the time spent on waiting for them is measured."""
        self.first_step = step
        self.logged_step = step
        self.started_at = time.perf_counter()
        self.logged_at = self.started_at
        self.waited = 0.0
        asked = self.logged_at
        for batch in batches:
            self.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def training(self, step: int, epoch: int, scalars: dict) -> None:
        """Log the scalars of a training step and the time per step since the last such line."""
        now = time.perf_counter()
        seconds = now - self.logged_at
        steps = step - self.logged_step
        timing = {
            "data_s": self.waited / steps,
            "updt_s": (seconds - self.waited) / steps,
            "samples_per_s": self.batch_size * steps / seconds,
        }
        self.logged_step = step
        self.logged_at = now
        self.waited = 0.0
        scalars = self.write(step, epoch, scalars, **timing)
        shown = {
            "loss": f"{scalars['loss']:.4f}",
            "samples/s": f"{timing['samples_per_s']:.0f}",
            "data_s": f"{timing['data_s']:.3f}",
            "updt_s": f"{timing['updt_s']:.3f}",
        }
        if self.terminal:
            self.bar.set_postfix(shown)
        elif self.is_main:
            rate = (now - self.started_at) / (step - self.first_step)
            shown["ETA"] = tqdm.format_interval(rate * (self.total - step))
            line = ", ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {step}/{self.total}: {line}", file=sys.stderr, flush=True)

    def held_out(self, step: int, epoch: int, scalars: dict) -> None:
        """Log the scalars of the held-out episodes under val/."""
        scalars = self.write(step, epoch, {f"val/{name}": x for name, x in scalars.items()})
        if self.is_main:
            self.bar.write(f"epoch {epoch}, step {step}: held-out loss {scalars['val/loss']:.4f}")

    def write(self, step: int, epoch: int, scalars: dict, **timing) -> dict[str, float]:
        """Means over processes of device scalars, logged with the timing of this process."""
        device = self.accelerator.device
        values = [torch.as_tensor(x, dtype=torch.float32, device=device) for x in scalars.values()]
        means = self.accelerator.reduce(torch.stack(values), "mean").tolist()
        scalars = dict(zip(scalars, means, strict=True))
        if self.is_main:
            clock = {"time": round(time.time(), 3)}
            line = {"step": step, "epoch": epoch, **clock, **scalars, **timing}
            with self.file.open("a") as f:
                f.write(json.dumps(line) + "\n")
        self.accelerator.log({**scalars, **timing}, step=step)
        return scalars

    def close(self) -> None:
        self.bar.close()
        self.accelerator.end_training()
