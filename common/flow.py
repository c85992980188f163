"""From noise to an action chunk: integrating the flow, and executing the chunks it gives."""

from functools import partial

import numpy as np
import torch
from torch import Tensor


def velocity(decode, target: str, x: Tensor, t: float, fixed: Tensor | None = None) -> Tensor:
    """What a decoder bound to its observations says of chunks x (B, T, A) at time t, as a velocity.

    target: what it was trained to predict, `velocity` or the data `x1` (then the velocity is (x1 - x) / (1 - t)).
    fixed (T,): true for actions that are given: they do not move.
    """
    known = {} if fixed is None else {"fixed": fixed.expand(len(x), 1, -1)}
    predicted = decode(x_t=x[:, None], t=x.new_full((len(x), 1), t), **known)[:, 0]
    predicted = predicted if target == "velocity" else (predicted - x) / (1 - t)
    return predicted if fixed is None else predicted.masked_fill(fixed[:, None], 0)


def guided(decode, w: float):
    """A decoder bound to [z; null] -> what it says of chunks x, null + w (z - null), in one call.

    Ho & Salimans 2022 (arXiv:2207.12598) eq. 6, whose w is ours less one. As the velocity is affine in x1, this holds
    of either target.
    """

    def both(x_t, t, **known):
        known = {name: torch.cat([value, value]) for name, value in known.items()}
        conditional, null = decode(x_t=torch.cat([x_t, x_t]), t=torch.cat([t, t]), **known).chunk(2)
        return null + w * (conditional - null)

    return both


def weighted(decode, weights: Tensor):
    """A decoder bound to k experts of each observation -> the mean of what they say, under weights (B, k)."""

    def mean(x_t, t, **known):
        said = decode(x_t=x_t, t=t, **known).unflatten(1, (weights.shape[1], -1))
        return torch.einsum("bk, bkrta -> brta", weights.to(said.dtype), said)

    return mean


def euler(velocity, x0: Tensor, steps: int) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from t = 0 to 1 in equal steps; `steps` evaluations (NFE)."""
    x = x0
    for k in range(steps):
        x = x + velocity(x, k / steps) / steps
    return x


def heun(velocity, x0: Tensor, steps: int) -> Tensor:
    """As `euler`, second order: two evaluations a step, but one in the last, where a field built from x1 is 0/0."""
    x = x0
    for k in range(steps):
        v = velocity(x, k / steps)
        guess = x + v / steps
        x = guess if k == steps - 1 else x + (v + velocity(guess, (k + 1) / steps)) / (2 * steps)
    return x


def generate(
    decode, target: str, x0: Tensor, steps: int, solver=euler, prefix: Tensor | None = None
) -> Tensor:
    """Noise x0 (B, T, A) -> x1. With `prefix` (B, d, A) the first d actions are these, and the rest continues them."""
    fixed = None
    if prefix is not None:
        fixed = torch.arange(x0.shape[1], device=x0.device) < prefix.shape[1]
        x0 = torch.cat([prefix, x0[:, prefix.shape[1] :]], 1)
    return solver(partial(velocity, decode, target, fixed=fixed), x0, steps)


class Execution:
    """Which action each of n robots carries out: chunks, replanned every `execute` ticks, on time or late.

    Action j of a chunk planned at tick k is meant for tick k + j. With a delay d a chunk acts from k + d on and its
    first d actions are left out; but the first of an episode acts at once, as the robot waits for it. Of several chunks
    the newest acts; with `ensemble` m, the mean of all that act at this tick, with weights exp(-m i) and i = 0 the
    oldest: Zhao et al. 2023 (arXiv:2304.13705) algorithm 2, there without delay. A chunk needs execute + delay actions.
    """

    def __init__(self, n: int, execute: int, ensemble: float | None = None, delay: int = 0):
        self.n, self.execute, self.ensemble, self.delay = n, execute, ensemble, delay
        self.tick, self.chunks = (
            0,
            {},
        )  # tick at which it was planned -> (n, T, A); NaN for robots that have stopped

    def due(self) -> bool:
        """Whether the policy is to look at this tick."""
        return self.tick % self.execute == 0

    def prefix(self, rows) -> np.ndarray | None:
        """(B, delay, A): what the robots `rows` do from this tick until its chunk acts; None before the first."""
        if not self.delay or not self.chunks:
            return None
        return np.stack([self._at(self.tick + j, rows) for j in range(self.delay)], 1)

    def add(self, rows, chunks: np.ndarray):
        """Chunks (B, T, A) planned for the robots `rows` from what they see at this tick."""
        if chunks.shape[1] < self.execute + self.delay:
            raise ValueError(
                f"chunks of {chunks.shape[1]} for execute {self.execute} and delay {self.delay}"
            )
        self.chunks[self.tick] = np.full((self.n, *chunks.shape[1:]), np.nan, chunks.dtype)
        self.chunks[self.tick][rows] = chunks

    def next(self, rows) -> np.ndarray:
        """Actions (B, A) of this tick; the clock advances."""
        actions = self._at(self.tick, rows)
        self.tick += 1
        self.chunks = {
            start: chunk
            for start, chunk in self.chunks.items()
            if start + chunk.shape[1] > self.tick
        }
        return actions

    def _at(self, tick, rows):
        acting = [
            chunk[rows, tick - start]
            for start, chunk in self.chunks.items()
            if start + (self.delay if start else 0) <= tick < start + chunk.shape[1]
        ]
        if self.ensemble is None:
            return acting[-1]
        weights = np.exp(-self.ensemble * np.arange(len(acting)))
        # Added one by one: the order, and with it the last bit, must not depend on how many robots there are.
        mean = sum(
            weight * action for weight, action in zip(weights / weights.sum(), acting, strict=True)
        )
        return mean.astype(acting[0].dtype)
