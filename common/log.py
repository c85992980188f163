"""The log of a run: log.jsonl, the tracker, the progress bar, and the time that steps take."""

import errno
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from statistics import fmean
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from tqdm import tqdm

from common.config import to_dict
from common.files import free_space, whole_file

RECENT = 10  # logged steps whose means tell how a run ended


class Log:
    """Writes one line of log.jsonl per logged step or held-out loss, and the same to the tracker.

    Lines are {"step", "epoch", "time", scalars, timing}. time: of day, in seconds since 1970.
    data_s: seconds per step that training waited for data. updt_s: seconds per step for the rest of
    it. stderr shows a progress bar, or, where it is no terminal, a line for each logged step.

    A line that the disk refuses is lost, with one warning: it must not cost the run, and neither
    must a tracker. The checkpoints hold what training needs.
    """

    def __init__(self, accelerator: Accelerator, cfg: Any, step: int, total: int):
        self.accelerator = accelerator
        self.is_main = accelerator.is_main_process
        self.file = cfg.train.save_dir / "log.jsonl"
        self.batch_size = cfg.data.batch_size
        self.total = total
        self.terminal = sys.stderr.isatty()
        self.last_lines = deque(maxlen=RECENT)
        self.is_complete = True
        if self.is_main:
            self._cut_back(step)
        self.bar = tqdm(
            desc=cfg.train.project_name,
            unit="step",
            initial=step,
            total=total,
            disable=not (self.is_main and self.terminal),
            dynamic_ncols=True,
        )
        if cfg.train.tracker:
            self._start_tracker(cfg)

    def _cut_back(self, step):
        """Drop the lines of steps after the checkpoint, which this run writes again."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        complete = [line for line in lines if line.endswith("}")]
        kept = [line for line in complete if json.loads(line)["step"] <= step]
        with whole_file(self.file) as file:
            file.write_text("".join(line + "\n" for line in kept))

    def _start_tracker(self, cfg):
        name = cfg.train.tracker
        problem = None
        self.tracker = name
        try:
            self.accelerator.log_with = filter_trackers(name, self.file.parent)
            # The config goes as text because some trackers take no nested values.
            config = {"config": yaml.safe_dump(to_dict(cfg))}
            self.accelerator.init_trackers(cfg.train.project_name, config)
            if not self.accelerator.trackers:
                problem = "its package is not installed"
        except Exception as e:  # a tracker that cannot be reached must not cost the run
            problem = e
        if problem:
            self._stop_tracker(problem)

    def _stop_tracker(self, problem):
        self.accelerator.trackers = []
        if self.is_main:
            self.bar.write(f"warning: tracker {self.tracker} is off: {problem}")

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
        self.last_lines.append(scalars)
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
            self._append(json.dumps(line) + "\n")
        try:
            self.accelerator.log({**scalars, **timing}, step=step)
        except Exception as e:  # as at its start
            self._stop_tracker(e)
        return scalars

    def _append(self, line):
        """Add a whole line to the file, or nothing."""
        data = line.encode()
        try:
            with self.file.open("ab", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                written = 0
                try:
                    written = file.write(data)
                    if written < len(data):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                finally:
                    if written < len(data):
                        file.truncate(size)
        except OSError as e:
            if self.is_complete:
                problem = f"{e.strerror}{free_space(self.file.parent)}"
                self.bar.write(f"warning: {self.file}: {problem}: lines are lost, training goes on")
            self.is_complete = False

    def recent(self) -> dict[str, float]:
        """Means of the scalars of the last logged training steps, of this process's life."""
        lines = list(self.last_lines)
        names = lines[-1] if lines else {}
        return {name: fmean(line[name] for line in lines if name in line) for name in names}

    def close(self) -> None:
        self.bar.close()
        try:
            self.accelerator.end_training()
        except Exception as e:  # of a tracker, as at its start
            self._stop_tracker(e)
