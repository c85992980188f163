"""A checkpoint that takes observations and gives actions, for control, evaluation and servers.

    robot = Robot.open("~/runs/my_robot", nfe=2)
    robot.reset()                       # at the start of each episode
    action = robot.act(observation)     # once per tick, at data.HZ

Observations are dicts in the dataset's own keys: pictures uint8 (h, w, 3) as the camera gives them,
states in the dataset's units. Several robots share one clock: after `reset(keys)` every value has a
leading axis of robots.
"""

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from common.checkpoint import find_checkpoint, open_policy, read_meta
from common.config import UserError
from common.data.images import IMAGE, resize
from common.data.loader import to_device
from common.noise import RowNoise
from common.policy import ActionPolicy

Observation = dict[str, np.ndarray]
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ObservationError(UserError, ValueError):
    """An observation that the policy cannot have been trained on."""


class Latency(NamedTuple):
    """Seconds that the policy took for a chunk: median and 95th percentile of all plans so far.

    Resizing pictures comes on top. missed counts plans that came later than they were needed.
    """

    median: float
    p95: float
    plans: int
    missed: int


class Plan(NamedTuple):
    """Chunks (B, T, A) of B robots in the dataset's units, the expert of each (None without)."""

    chunks: np.ndarray
    experts: list[int] | None
    seconds: float


class Robot:
    """One robot, or several in one clock, driven by a policy.

    nfe: evaluations of the decoder per chunk; replan_steps: ticks from one observation that is
    planned from to the next; delay: ticks from an observation until its chunk acts, while the
    running one goes on (planned in a thread; on a policy that was trained with loss.prefix >= delay
    the new chunk continues the running one); ensemble: average all chunks that cover a tick, with
    weights exp(-ensemble i), i = 0 the oldest; hold: seconds for which the latent keeps its noise,
    so that it changes with the observation only; precision: of the training run (no, bf16, fp16);
    threaded: plan late chunks in a thread, as a real robot needs it; without, results never depend
    on timing; columns: numbers that each state key had in training, where they are known.

    check_units: refuse a first observation of an episode whose state lies more than five standard
    deviations outside of its range in training. Later ones are counted in `outside`, with one
    warning: a policy that fails does lead there.
    """

    def __init__(
        self,
        policy: ActionPolicy,
        cfg: Any,
        nfe: int = 2,
        replan_steps: int = 8,
        delay: int = 0,
        ensemble: float | None = None,
        hold: float = 2.0,
        precision: str = "no",
        threaded: bool = True,
        check_units: bool = True,
        columns: dict[str, int] | None = None,
    ):
        whole = {"nfe": (nfe, 1), "replan_steps": (replan_steps, 1), "delay": (delay, 0)}
        for name, (value, low) in whole.items():
            if not isinstance(value, Integral) or value < low:
                raise UserError(f"{name}: expected a whole number from {low} on, found {value}")
        for name, amount in (("ensemble", ensemble), ("hold", hold)):
            if amount is not None and not 0 <= amount <= 1e6:
                raise UserError(f"{name}: expected a number from 0 to 1e6, found {amount}")
        if replan_steps + delay > cfg.data.action_horizon:
            late = f" + delay {delay}" if delay else ""
            raise UserError(
                f"replan_steps {replan_steps}{late}: more than the {cfg.data.action_horizon} steps "
                "of a chunk"
            )
        if threaded and replan_steps < delay:
            raise UserError(
                f"replan_steps {replan_steps}: less than delay {delay}, and a thread plans one "
                "chunk after the other"
            )
        self.policy = policy
        self.data = cfg.data
        self.nfe = nfe
        self.replan_steps = replan_steps
        self.delay = delay
        self.ensemble = ensemble
        self.precision = precision
        self.hold_ticks = max(round(hold * cfg.data.HZ), 1)
        self.continues = 0 < delay <= policy.weights.prefix
        if delay and not self.continues:
            print(
                f"notice: chunks come {delay} ticks late and do not continue the running one: the "
                f"policy was trained with loss.prefix: {policy.weights.prefix}"
            )
        self.check_units = check_units
        self.columns = columns or {}
        self.range = [policy.stats.state_min.cpu().numpy(), policy.stats.state_max.cpu().numpy()]
        # One that hardly moved in training counts as one that moved by 1 % of its size.
        size = np.maximum(np.abs(self.range).max(0), 1)
        self.margin = 5 * np.maximum(policy.stats.state_std.cpu().numpy(), 0.01 * size)
        self.outside = 0
        self.device = next(policy.parameters()).device
        self.threads = ThreadPoolExecutor(1) if threaded and delay else None
        self.pending: Future[Plan] | None = None
        self.seconds: list[float] = []
        self.missed = 0
        self.episode = 0
        self.reset()

    @classmethod
    def open(
        cls,
        checkpoint: Path | str,
        nfe: int = 2,
        replan_steps: int = 8,
        delay: int = 0,
        ensemble: float | None = None,
        hold: float = 2.0,
        device: str | torch.device | None = None,
        weights: dict[str, Path] | None = None,
        script: Path | str | None = None,
        plugins: Sequence[str] = (),
        check_units: bool = True,
    ) -> "Robot":
        """The policy of a run folder (its newest checkpoint), or of one checkpoint.

        device: a GPU if there is one; weights: frozen component -> where its file is now; script,
        plugins: code of the checkpoint that is not the project's, which is run. Raises UserError
        where the checkpoint is damaged, gone, draws no actions, or needs code that is not named.
        """
        policy, cfg, meta = open_action_policy(checkpoint, weights, device, script, plugins)
        return cls(
            policy,
            cfg,
            nfe,
            replan_steps,
            delay,
            ensemble,
            hold,
            meta.get("mixed_precision", "no"),
            check_units=check_units,
            columns=meta.get("columns"),
        )

    def reset(self, keys: Sequence[tuple] | None = None) -> None:
        """Begin an episode. keys: one for each of several robots, which its noise depends on."""
        if self.pending is not None:
            wait([self.pending])  # what comes of it is of no use any more
        self.pending = None
        self.pending_rows: list[int] = []
        self.single = keys is None
        self.keys = [("robot", self.episode)] if keys is None else list(keys)
        self.episode += 1
        self.states = [deque(maxlen=self.data.obs_proprio_history) for _ in self.keys]
        self.pictures = [
            {name: deque(maxlen=self.data.obs_images_history) for name in self.data.cameras}
            for _ in self.keys
        ]
        self.execution = Execution(len(self.keys), self.replan_steps, self.ensemble, self.delay)
        self.experts: list[int] | None = None
        self.replanned = False

    @property
    def needs_pictures(self) -> bool:
        """Whether the next observation must have pictures: others are not looked at."""
        if not self.data.cameras:
            return False
        until_plan = -self.execution.tick % self.replan_steps
        return self.threads is not None or until_plan < self.data.obs_images_history

    def act(self, observation: Observation, active: Sequence[int] | None = None) -> np.ndarray:
        """Observation of this tick -> action (A,) in the dataset's units; of several robots (B, A).

        active: numbers of the robots that the rows belong to, where some have stopped. Afterwards
        `replanned` tells whether new chunks were taken over at this tick, and `experts` which
        expert decoded each of them. Raises ObservationError before anything moves.
        """
        rows = list(range(len(self.keys))) if active is None else list(active)
        self._remember(observation, rows)
        self.replanned = False
        self._collect()
        if self.pending is None and self.execution.due():
            self._replan(rows)
        actions = self.execution.next(rows)
        if not np.isfinite(actions).all():
            late = [
                row for row, action in zip(rows, actions, strict=True) if np.isnan(action).any()
            ]
            raise UserError(f"robots {late} have no chunk: they were not active at the last plan")
        return actions[0] if self.single else actions

    def plan(self, rows: Sequence[int], prefix: np.ndarray | None = None) -> Plan:
        """Chunks of these robots from what they have observed, continuing prefix (B, d, A)."""
        return self._chunks(self._batch(rows), self._row_keys(rows), prefix)

    def latency(self) -> Latency:
        """Of all plans since the robot was opened."""
        if not self.seconds:
            return Latency(0.0, 0.0, 0, 0)
        median, p95 = np.quantile(self.seconds, [0.5, 0.95]).tolist()
        return Latency(median, p95, len(self.seconds), self.missed)

    def _replan(self, rows: list[int]) -> None:
        prefix = self.execution.running(rows, self.delay) if self.continues else None
        tick = self.execution.tick
        if self.threads is None or tick == 0:  # before the first chunk the robot waits
            plan = self.plan(rows, prefix)
            self._add(rows, plan, tick)
            too_late = plan.seconds > max(self.delay, 1) / self.data.HZ
            self.missed += too_late and tick > 0
            return
        work = partial(self._chunks, self._batch(rows), self._row_keys(rows), prefix)
        self.pending = self.threads.submit(work)
        self.pending_rows = rows
        self.pending_tick = tick
        self.pending_late = False

    def _collect(self) -> None:
        """Take over a chunk that was planned in the thread, at the tick from which it acts."""
        if self.pending is None or self.execution.tick < self.pending_tick + self.delay:
            return
        if not self.pending.done():
            self.missed += not self.pending_late
            self.pending_late = True
            if self.execution.covers(self.execution.tick):
                return  # the running chunk goes on until the late one is there
        pending = self.pending
        self.pending = None  # a plan that failed is raised once
        self._add(self.pending_rows, pending.result(), self.pending_tick)

    def _add(self, rows: list[int], plan: Plan, tick: int) -> None:
        self.seconds.append(plan.seconds)
        self.replanned = True
        self.experts = plan.experts
        self.execution.add(rows, plan.chunks, tick)

    def _row_keys(self, rows: Sequence[int]) -> list[tuple]:
        return [(*self.keys[row], self.execution.tick) for row in rows]

    def _batch(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        states = np.array([self.states[row] for row in rows])
        batch = {"observation.state": torch.from_numpy(states)}
        for name in self.data.cameras:
            pictures = torch.from_numpy(np.array([self.pictures[row][name] for row in rows]))
            batch[IMAGE + name] = pictures[:, 0] if pictures.shape[1] == 1 else pictures
        return batch

    def _chunks(
        self, batch: dict[str, torch.Tensor], keys: list[tuple], prefix: np.ndarray | None
    ) -> Plan:
        began = time.perf_counter()
        with torch.inference_mode(), autocast(self.precision, self.device):
            memory = self.policy.encode(to_device(batch, self.device))
            held = [("latent", *key, tick // self.hold_ticks) for *key, tick in keys]
            z = self.policy.latent(memory, RowNoise(held, self.device))
            size = len(self.policy.stats.action_mean)
            noise = RowNoise(keys, self.device)
            x0 = noise.normal(len(keys), self.data.action_horizon, size)
            given = None if prefix is None else torch.from_numpy(prefix).to(x0)
            chunks = self.policy.sample(memory, x0, self.nfe, z, prefix=given)
            experts = self.policy.chosen_expert(z)
        chunks = chunks.float().cpu().numpy()
        if not np.isfinite(chunks).all():
            raise UserError("the policy's actions are not finite: take another checkpoint")
        chosen = None if experts is None else experts.tolist()
        return Plan(chunks, chosen, time.perf_counter() - began)

    def _remember(self, observation: Observation, rows: list[int]) -> None:
        """Add an observation to the histories; the first one of an episode fills them."""
        given = observation
        if self.single:
            given = {key: np.asarray(value)[None] for key, value in observation.items()}
        states = self._read_states(given, rows)
        pictures = self._read_pictures(given, len(rows)) if self.needs_pictures else {}
        for i, row in enumerate(rows):
            history = self.states[row]
            history.extend([states[i]] * (1 if history else self.data.obs_proprio_history))
            for name, images in pictures.items():
                frames = self.pictures[row][name]
                image = resize(images[i], tuple(self.data.image_size)).transpose(2, 0, 1)
                frames.extend([image] * (1 if frames else self.data.obs_images_history))

    def _read_states(self, observation: Observation, rows: list[int]) -> np.ndarray:
        count = len(rows)
        columns = []
        for key in self.data.state_keys:
            value = self._value(observation, key, count)
            if value.dtype.kind not in "fiub":
                raise ObservationError(f"{key}: expected numbers, found {value.dtype}")
            if value.ndim > 2:
                raise ObservationError(f"{key}: expected a vector, found shape {value.shape[1:]}")
            columns.append(value.reshape(count, -1))
            size = columns[-1].shape[1]
            if size != self.columns.get(key, size):
                raise ObservationError(
                    f"{key}: {size} numbers a robot, the policy was trained on {self.columns[key]}"
                )
        states = np.concatenate(columns, 1, dtype=np.float32, casting="unsafe")
        expected = len(self.policy.stats.state_mean)
        if states.shape[1] != expected:
            raise ObservationError(
                f"{' + '.join(self.data.state_keys)}: {states.shape[1]} numbers a robot, "
                f"the policy was trained on {expected}"
            )
        if not np.isfinite(states).all():
            row, column = np.argwhere(~np.isfinite(states))[0]
            where = f"number {column}" + ("" if self.single else f" of robot {rows[row]}")
            raise ObservationError(
                f"{' + '.join(self.data.state_keys)}: {where} is {states[row, column]}"
            )
        self._check_range(states, rows, [values.shape[1] for values in columns])
        return states

    def _check_range(self, states: np.ndarray, rows: list[int], sizes: list[int]) -> None:
        """states (B, S) of robots `rows`; sizes: numbers of each state key."""
        low, high = self.range
        far = (states < low - self.margin) | (states > high + self.margin)
        if not far.any():
            return
        starts = np.array([not self.states[row] for row in rows])
        refused = far & starts[:, None] & self.check_units
        row, column = np.argwhere(refused if refused.any() else far)[0]
        keys = zip(self.data.state_keys, sizes, strict=True)
        places = [f"{key}[{i}]" for key, size in keys for i in range(size)]
        robot = "" if self.single else f" of robot {rows[row]}"
        found = (
            f"{places[column]}{robot} is {states[row, column]:.4g}, in training it was "
            f"{low[column]:.4g} to {high[column]:.4g}"
        )
        if refused.any():
            raise ObservationError(
                f"{found}: other units than in training? check_units=False takes it as it is "
                "(evaluate.py: --other_units)"
            )
        if not self.outside:
            print(
                f"warning: {found}: far from all demonstrations (told once, counted in `outside`)"
            )
        self.outside += int(far.any(1).sum())

    def _read_pictures(self, observation: Observation, count: int) -> dict[str, np.ndarray]:
        pictures = {}
        for name, key in self.data.cameras.items():
            value = self._value(observation, key, count)
            if value.dtype != np.uint8:
                raise ObservationError(
                    f"{key}: expected uint8 pictures as the camera gives them, found {value.dtype}"
                )
            if value.ndim != 4 or value.shape[3] != 3 or not value.size:
                hint = "; move the channels to the end" if value.shape[1:2] == (3,) else ""
                raise ObservationError(
                    f"{key}: expected (h, w, 3) pictures, found {value.shape[1:]}{hint}"
                )
            pictures[name] = value
        return pictures

    def _value(self, observation: Observation, key: str, count: int) -> np.ndarray:
        if key not in observation:
            raise ObservationError(
                f"the observation lacks {key!r}; it has {', '.join(observation) or 'nothing'}"
            )
        value = np.asarray(observation[key])
        if value.shape[:1] != (count,):
            raise ObservationError(
                f"{key}: expected a row for each of {count} robots, found shape {value.shape}"
            )
        return value


def open_action_policy(
    checkpoint: Path | str,
    weights: dict[str, Path] | None = None,
    device: str | torch.device | None = None,
    script: Path | str | None = None,
    plugins: Sequence[str] = (),
) -> tuple[ActionPolicy, Any, dict[str, Any]]:
    """Policy, config and meta.json of a run folder's newest checkpoint, or of a checkpoint.

    device: a GPU if there is one; the others as in open_policy(). Raises UserError for a run of
    train_mi.py, too.
    """
    folder = find_checkpoint(checkpoint)
    policy, cfg = open_policy(folder, weights, Path(script) if script else None, plugins)
    if not isinstance(policy, ActionPolicy):
        raise UserError(
            f"{checkpoint}: scores demonstrations, and draws no actions: "
            f"python train_mi.py --score {folder}"
        )
    policy.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return policy, cfg, read_meta(folder)


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The precision that a policy was trained in: no, bf16 or fp16."""
    if precision in PRECISIONS:
        return torch.autocast(device.type, dtype=PRECISIONS[precision])
    return nullcontext()


class Execution:
    """Which action each of n robots carries out: chunks, replanned every so many ticks, maybe late.

    Action j of a chunk planned at tick k is meant for tick k + j. With a delay d a chunk acts from
    tick k + d on, and its first d actions are left out; but the first chunk of an episode acts at
    once. Of several chunks the newest acts; with `ensemble` m, the mean of all that act at this
    tick, with weights exp(-m i) and i = 0 the oldest: Zhao et al. 2023 (arXiv:2304.13705) algorithm
    2, there without delay. A chunk needs replan_steps + delay actions.
    """

    def __init__(self, n: int, replan_steps: int, ensemble: float | None = None, delay: int = 0):
        self.n = n
        self.replan_steps = replan_steps
        self.ensemble = ensemble
        self.delay = delay
        self.tick = 0
        # Tick of planning -> chunks (n, T, A), oldest first; NaN for robots that have stopped.
        self.chunks: dict[int, np.ndarray] = {}

    def due(self) -> bool:
        """Whether the observation of this tick is to be planned from."""
        if not self.chunks:
            return True
        return self.tick - max(self.chunks) >= self.replan_steps

    def covers(self, tick: int) -> bool:
        """Whether a chunk has an action for this tick."""
        return any(self._acts(start, tick) for start in self.chunks)

    def running(self, rows: Sequence[int], count: int) -> np.ndarray | None:
        """(B, count, A): the robots' actions from this tick on; None before the first chunk."""
        if not self.chunks:
            return None
        return np.stack([self._at(self.tick + j, rows) for j in range(count)], 1)

    def add(self, rows: Sequence[int], chunks: np.ndarray, tick: int) -> None:
        """Chunks (B, T, A) planned for these robots from what they observed at this tick."""
        if chunks.shape[1] < self.replan_steps + self.delay:
            raise ValueError(
                f"chunks of {chunks.shape[1]} for replan_steps {self.replan_steps} "
                f"and delay {self.delay}"
            )
        everyone = np.full((self.n, *chunks.shape[1:]), np.nan, chunks.dtype)
        everyone[rows] = chunks
        self.chunks[tick] = everyone

    def next(self, rows: Sequence[int]) -> np.ndarray:
        """Actions (B, A) of this tick; the clock advances."""
        actions = self._at(self.tick, rows)
        self.tick += 1
        self.chunks = {
            start: chunk
            for start, chunk in self.chunks.items()
            if start + chunk.shape[1] > self.tick
        }
        return actions

    def _acts(self, start: int, tick: int) -> bool:
        first = start + (self.delay if start else 0)
        return first <= tick < start + self.chunks[start].shape[1]

    def _at(self, tick: int, rows: Sequence[int]) -> np.ndarray:
        acting = [
            chunk[rows, tick - start]
            for start, chunk in self.chunks.items()
            if self._acts(start, tick)
        ]
        if self.ensemble is None:
            return acting[-1]
        weights = np.exp(-self.ensemble * np.arange(len(acting)))
        weights = weights / weights.sum()
        # Added one by one: the order, and with it the last bit, must not depend on how many act.
        terms = [weight * action for weight, action in zip(weights, acting, strict=True)]
        mean = sum(terms, start=np.zeros(1))
        return mean.astype(acting[0].dtype)
