"""The order of samples: a function of (seed, epoch) alone, shared out over processes and micro-steps."""

import numpy as np

from common.config import ConfigError
from common.noise import seed_of


class Order:
    """(epoch, offset after the step, rows) of each micro-batch of one process, from a position on and without end.

    Epoch e is a permutation drawn from (seed, e); every `batch_size` rows of it are one optimizer step, an incomplete
    rest is dropped; micro-steps and then processes take equal consecutive shares. With `groups` (state of each row,
    size) it is a permutation of groups of rows with similar states.
    """

    def __init__(
        self, rows, batch_size, micro_steps, rank, world, seed, epoch, offset, groups=None
    ):
        if batch_size % (micro_steps * world):
            raise ConfigError(
                f"data.batch_size {batch_size} must be a multiple of micro_steps x processes = {micro_steps} x {world}"
            )
        if len(rows) < batch_size:
            raise ConfigError(
                f"data.batch_size {batch_size} is more than the {len(rows)} training samples"
            )
        share = batch_size // (micro_steps * world)
        if groups and share % groups[1]:
            raise ConfigError(
                f"data.neighbours {groups[1]}: micro-batches of {share} are not whole groups of it"
            )
        self.rows, self.batch_size, self.micro_steps, self.seed = (
            rows,
            batch_size,
            micro_steps,
            seed,
        )
        self.rank, self.world, self.epoch, self.offset, self.groups = (
            rank,
            world,
            epoch,
            offset,
            groups,
        )

    def __iter__(self):
        epoch, offset, share = (
            self.epoch,
            self.offset,
            self.batch_size // (self.micro_steps * self.world),
        )
        while True:
            random = np.random.default_rng(seed_of("order", self.seed, epoch))
            order = random.permutation(self.rows)
            if self.groups:
                state, size = self.groups
                order = order[similar(state[order], size, random)]
            while offset + self.batch_size <= len(order):
                for micro in range(self.micro_steps):
                    start = offset + (micro * self.world + self.rank) * share
                    yield epoch, offset + self.batch_size, order[start : start + share]
                offset += self.batch_size
            epoch, offset = epoch + 1, 0


def similar(x: np.ndarray, size: int, random) -> np.ndarray:
    """Permutation of the rows of x (N, D) in which each `size` in a row are close to each other.

    Halves of a half of a half along the axis of largest (randomly scaled) spread, then shuffled; each draw differs.
    """
    order = random.permutation(len(x))
    rest, parts, groups = order[: len(x) % size], [order[len(x) % size :]], []
    while parts:
        part = parts.pop()
        if len(part) <= size:
            groups.append(part)
            continue
        axis = np.argmax(np.ptp(x[part], axis=0) * random.uniform(0.5, 1, x.shape[1]))
        part = part[np.argsort(x[part, axis], kind="stable")]
        middle = len(part) // size // 2 * size
        parts += [part[:middle], part[middle:]]
    return np.concatenate([*(groups[i] for i in random.permutation(len(groups))), rest])
