"""Random numbers keyed by (seed, step, row): the same for any number of processes and resumes."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


class Noise:
    """Random tensors of one micro-step, drawn for the whole batch; each process takes its rows.

    So one process and N processes train the same run, and a resumed run needs no saved generator.
    Without a key the numbers follow torch's global generator. share: first row of this process and
    rows of the whole batch, where processes do not have equally many.
    """

    def __init__(
        self,
        *key,
        rank: int = 0,
        world: int = 1,
        device: str | torch.device = "cpu",
        share: tuple[int, int] | None = None,
    ):
        self.rank = rank
        self.world = world
        self.share = share
        key = key or (torch.randint(2**62, ()).item(),)
        self.generator = torch.Generator(device)
        self.generator.manual_seed(seed_of(*key))

    def normal(self, *shape: int) -> Tensor:
        return self._rows(torch.randn, shape)

    def uniform(self, *shape: int) -> Tensor:
        return self._rows(torch.rand, shape)

    def _rows(self, draw: Callable[..., Tensor], shape: Sequence[int]) -> Tensor:
        rows = shape[0]
        first, total = self.share or (self.rank * rows, self.world * rows)
        drawn = draw(
            total,
            *shape[1:],
            generator=self.generator,
            device=self.generator.device,
        )
        return drawn[first : first + rows]


class RowNoise:
    """Noise whose row i depends on keys[i] alone: a batch of episodes draws what each would."""

    def __init__(self, keys: Sequence[tuple], device: str | torch.device = "cpu"):
        self.rows = [Noise(*key, device=device) for key in keys]

    def normal(self, *shape: int) -> Tensor:
        return torch.cat([row.normal(1, *shape[1:]) for row in self.rows])

    def uniform(self, *shape: int) -> Tensor:
        return torch.cat([row.uniform(1, *shape[1:]) for row in self.rows])


def seed_of(*key) -> int:
    """A 63-bit seed from any printable key, the same in every process and Python version."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def hashed_uniform(seed: int, index: np.ndarray, count: int) -> np.ndarray:
    """(len(index), count) numbers in [0, 1), functions of (seed, index, column): splitmix64."""
    row = index.astype(np.uint64)[:, None]
    column = np.arange(1, count + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        position = row * np.uint64(count) + column
        x = np.uint64(seed) + position * np.uint64(0x9E3779B97F4A7C15)
        x ^= x >> np.uint64(30)
        x *= np.uint64(0xBF58476D1CE4E5B9)
        x ^= x >> np.uint64(27)
        x *= np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    bits = x >> np.uint64(40)
    return bits.astype(np.float32) / np.float32(1 << 24)
