"""Random numbers: the same for any number of processes, for one episode and for a batch of them."""

import numpy as np
import torch

from common.noise import Noise, RowNoise, hashed_uniform, seed_of

torch.set_num_threads(1)


def test_processes_draw_their_rows_of_what_one_draws():
    def draws(rank, world):
        noise = Noise("objective", 0, 7, 1, rank=rank, world=world)
        rows = 12 // world
        return noise.normal(rows, 3), noise.uniform(rows), noise.normal(rows, 2, 2)

    for whole, *parts in zip(draws(0, 1), *(draws(rank, 4) for rank in range(4)), strict=True):
        assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(Noise("a", 1).normal(4), Noise("a", 2).normal(4))


def test_rows_of_noise_are_what_each_gets_alone():
    keys = [(0, episode, 3) for episode in (5, 2, 9)]
    together, alone = RowNoise(keys), [Noise(*key) for key in keys]
    for _ in range(2):
        for kind in ("normal", "uniform"):
            batched = getattr(together, kind)(3, 4, 2)
            assert torch.equal(batched, torch.cat([getattr(row, kind)(1, 4, 2) for row in alone]))
    assert batched[0].ne(batched[1]).any()


def test_without_a_key_noise_follows_torchs_seed():
    def draw():
        torch.manual_seed(3)
        return Noise().normal(5), Noise().normal(5)

    first, again = draw(), draw()
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], first[1])
    assert seed_of("order", 0, 1) == 0x76BFAF9BC05C54CB  # every process and Python version agrees


def test_hashed_numbers_are_uniform_and_depend_on_seed_index_and_column():
    rows = np.arange(5_000)
    numbers = hashed_uniform(3, rows, 4)
    assert numbers.shape == (5_000, 4)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    np.testing.assert_allclose(numbers.mean(0), 0.5, atol=0.02)
    assert abs(np.corrcoef(numbers.T)[np.triu_indices(4, 1)]).max() < 0.05
    assert len(np.unique(numbers)) > 0.99 * numbers.size  # of 24 bits: few are equal by chance
    np.testing.assert_array_equal(hashed_uniform(3, rows[7:9], 4), numbers[7:9])
    assert not (hashed_uniform(4, rows, 4) == numbers).any(1).all()
