"""The order of training samples: a function of (seed, epoch), shared out over processes."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np

from common.config import ConfigError
from common.noise import seed_of


def check_batch_size(batch_size: int, micro_steps: int, world: int, neighbours: int = 1) -> None:
    """Raises ConfigError, with the nearest sizes that fit, unless a step divides into equal shares.

    A share is one micro-batch of one process, in whole groups of `neighbours`. Needs no dataset.
    """
    shares = micro_steps * world
    unit = shares * neighbours
    if batch_size % unit == 0:
        return
    below = batch_size // unit * unit
    fitting = " or ".join(str(size) for size in (below, below + unit) if size)
    if batch_size % shares:
        problem = (
            f"data.batch_size {batch_size} must be a multiple of micro_steps x processes "
            f"= {micro_steps} x {world}"
        )
        if neighbours > 1:
            problem += f", in whole groups of data.neighbours = {neighbours}"
    else:
        problem = (
            f"data.neighbours {neighbours}: micro-batches of {batch_size // shares} "
            f"(data.batch_size {batch_size} by {micro_steps} x {world}) are not whole groups of it"
        )
    raise ConfigError(f"{problem}: set data.batch_size to {fitting}")


def _largest(rows, unit):
    return f": set it to {rows // unit * unit} or less" if rows >= unit else ""


@dataclass
class Order:
    """Yields (epoch, offset after the step, rows) for each micro-batch of one process, without end.

    Epoch e is a permutation of `rows` drawn from (seed, e). Every `batch_size` rows of it are one
    optimizer step; an incomplete rest is dropped. Micro-steps, and within them processes, take
    equal consecutive shares of a step. Iteration begins at row `offset` of `epoch`. Raises
    ConfigError if the sizes do not fit.
    """

    rows: np.ndarray
    batch_size: int
    micro_steps: int
    rank: int
    world: int
    seed: int
    epoch: int
    offset: int
    # State (rows of the dataset, D) and group size: groups of similar rows are permuted.
    groups: tuple[np.ndarray, int] | None = None

    def __post_init__(self):
        neighbours = self.groups[1] if self.groups else 1
        check_batch_size(self.batch_size, self.micro_steps, self.world, neighbours)
        self.share = self.batch_size // (self.micro_steps * self.world)
        if len(self.rows) < self.batch_size:
            raise ConfigError(
                f"data.batch_size {self.batch_size} is more than the {len(self.rows)} training "
                f"samples{_largest(len(self.rows), self.micro_steps * self.world * neighbours)}"
            )

    def __iter__(self) -> Iterator[tuple[int, int, np.ndarray]]:
        offset = self.offset
        for epoch in count(self.epoch):
            rows = self.permutation(epoch)
            for step in range(offset, len(rows) - self.batch_size + 1, self.batch_size):
                for micro in range(self.micro_steps):
                    start = step + (micro * self.world + self.rank) * self.share
                    yield epoch, step + self.batch_size, rows[start : start + self.share]
            offset = 0

    def permutation(self, epoch: int) -> np.ndarray:
        """All rows in the order of one epoch."""
        rng = np.random.default_rng(seed_of("order", self.seed, epoch))
        rows = rng.permutation(self.rows)
        if self.groups:
            state, size = self.groups
            rows = rows[group_similar(state[rows], size, rng)]
        return rows


def group_similar(x: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Permutation of the rows of x (N, D) in which each `size` consecutive rows are similar.

    Rows are halved again and again along the axis of largest (randomly scaled) spread; the groups
    are then shuffled. Each draw differs.
    """
    order = rng.permutation(len(x))
    rest, whole = np.split(order, [len(x) % size])
    parts = [whole]
    groups = []
    while parts:
        part = parts.pop()
        if len(part) <= size:
            groups.append(part)
            continue
        axis = np.argmax(np.ptp(x[part], axis=0) * rng.uniform(0.5, 1, x.shape[1]))
        part = part[np.argsort(x[part, axis], kind="stable")]
        middle = len(part) // size // 2 * size
        parts += [part[:middle], part[middle:]]
    shuffled = [groups[i] for i in rng.permutation(len(groups))]
    return np.concatenate([*shuffled, rest])
