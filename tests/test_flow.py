"""Flow matching against closed forms: noisy chunks, straight paths, order, targets, direction."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from common.flow import (
    decoder_velocity,
    euler,
    guided,
    linear_path,
    noisy_chunks,
    one_step,
    random_prefix,
    sample_time,
)
from common.noise import Noise

torch.set_num_threads(1)


def test_linear_path_has_its_ends_and_its_slope():
    x0, x1 = torch.randn(2, 4, 3, 5, 2, dtype=torch.float64).unbind()
    t, h = torch.rand(4, 3, dtype=torch.float64) * 0.9, 1e-6
    assert torch.equal(linear_path(x0, x1, torch.zeros(4, 3))[0], x0)
    assert torch.equal(linear_path(x0, x1, torch.ones(4, 3))[0], x1)
    slope = (linear_path(x0, x1, t + h)[0] - linear_path(x0, x1, t)[0]) / h
    torch.testing.assert_close(slope, linear_path(x0, x1, t)[1], atol=1e-8, rtol=0)


def test_times_follow_beta_1_15():
    t = sample_time(Noise("times").uniform(50_000))
    assert scipy.stats.kstest(t.numpy(), scipy.stats.beta(1, 1.5).cdf).pvalue > 0.05
    assert sample_time(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.999, 0.0])


def test_prefixes_of_every_length_up_to_the_longest_are_equally_frequent():
    mask = random_prefix(torch.rand(20_000, 3), 6, 4)
    assert mask.shape == (20_000, 3, 6)
    assert (mask[..., 1:] <= mask[..., :-1]).all()  # the first ones, without a hole
    counts = torch.bincount(mask.sum(-1).flatten(), minlength=7) / 60_000
    assert (counts[:5] - 0.2).abs().max() < 0.01
    assert counts[5:].tolist() == [0, 0]


@pytest.mark.parametrize("target", ["velocity", "x1"])
@pytest.mark.parametrize("longest", [0, 3])
def test_noisy_chunks_lie_on_the_path_and_their_given_actions_are_clean(target, longest):
    x1 = torch.randn(7, 5, 2)
    is_pad = torch.arange(5) >= torch.tensor([5, 5, 5, 4, 3, 2, 1])[:, None]
    chunks = noisy_chunks(x1, is_pad, Noise(0), 3, target, longest)
    assert chunks.x0.shape == chunks.x1.shape == chunks.x_t.shape == chunks.target.shape
    assert chunks.x_t.shape == (7, 3, 5, 2)
    assert chunks.t.shape == (7, 3)
    assert torch.equal(chunks.x1, x1[:, None].expand(-1, 3, -1, -1))
    assert torch.equal(chunks.target, chunks.x1 if target == "x1" else chunks.x1 - chunks.x0)
    on_path, _ = linear_path(chunks.x0, chunks.x1, chunks.t)
    padded = is_pad[:, None].expand(-1, 3, -1)
    if not longest:
        assert chunks.prefix_mask is None
        assert torch.equal(chunks.x_t, on_path)
        assert torch.equal(chunks.ignored, padded)
        return
    given = chunks.prefix_mask
    assert given.any()
    assert not given[..., longest:].any()
    assert torch.equal(chunks.x_t[given], chunks.x1[given])
    assert torch.equal(chunks.x_t[~given], on_path[~given])
    assert torch.equal(chunks.ignored, given | padded)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_straight_paths_are_exact(steps):
    x0, x1 = torch.randn(2, 4, 5, 2, dtype=torch.float64).unbind()
    torch.testing.assert_close(euler(lambda x, t: x1 - x0, x0, steps), x1)


def test_order():
    """dx/dt = a x + cos(3 t) has a closed form; half the step has half the error."""
    a, x0 = -1.3, torch.tensor([0.7, -2.0], dtype=torch.float64)

    def particular(t):
        return (3 * math.sin(3 * t) - a * math.cos(3 * t)) / (9 + a * a)

    exact = (x0 - particular(0)) * math.exp(a) + particular(1)
    errors = [
        (euler(lambda x, t: a * x + math.cos(3 * t), x0, n) - exact).abs() for n in (512, 1024)
    ]
    torch.testing.assert_close(errors[0] / errors[1], torch.full_like(x0, 2), rtol=0.05, atol=0)


def test_time_runs_from_noise_to_data():
    times = []
    euler(lambda x, t: times.append(t) or x, torch.zeros(1), 10)
    # Nothing is asked at t = 1, where (x1 - x) / (1 - t) is 0 / 0.
    np.testing.assert_allclose(times, np.arange(10) / 10)


class Decode:
    """Stands for a decoder: predicts from x, t and context; keeps what it was given."""

    def __init__(self):
        self.shapes = set()
        self.masks = []

    def __call__(self, x_t, t, context, prefix_mask=None):
        self.shapes.add((tuple(x_t.shape), tuple(t.shape)))
        self.masks.append(prefix_mask)
        return torch.tanh(x_t) + t[..., None, None] + context


def test_x1_prediction_moves_the_remaining_share_of_the_way():
    x, n, decode = torch.randn(3, 4, 2, dtype=torch.float64), 8, Decode()
    ours = euler(lambda x, t: decoder_velocity(decode, 0.5, x, t, "x1"), x, n)
    for i in range(n):
        x = x + (torch.tanh(x) + i / n + 0.5 - x) / (n - i)
    torch.testing.assert_close(ours, x)
    assert decode.shapes == {((3, 1, 4, 2), (3, 1))}
    assert decode.masks == [None] * n


def test_velocity_prediction_is_used_as_it_is():
    x = torch.randn(3, 4, 2)
    found = decoder_velocity(Decode(), 0.5, x, 0.25, "velocity")
    torch.testing.assert_close(found, torch.tanh(x) + 0.75)


@pytest.mark.parametrize("target", ["velocity", "x1"])
def test_given_actions_are_marked_and_do_not_move(target):
    x, decode = torch.randn(3, 5, 2), Decode()
    given = torch.arange(5) < 2
    found = decoder_velocity(decode, 0.5, x, 0.25, target, given)
    free = decoder_velocity(decode, 0.5, x, 0.25, target)
    assert not found[:, :2].any()
    assert torch.equal(found[:, 2:], free[:, 2:])
    assert decode.masks[0].tolist() == [[[True, True, False, False, False]]] * 3


def test_both_targets_of_a_perfect_decoder_give_the_data():
    x0, x1 = torch.randn(2, 3, 4, 2, dtype=torch.float64).unbind()
    for target, end in {"x1": x1, "velocity": x1 - x0}.items():

        def decode(x_t, t, context, prefix_mask=None, end=end):
            return end[:, None]

        def velocity(x, t, decode=decode, target=target):
            return decoder_velocity(decode, None, x, t, target)

        torch.testing.assert_close(euler(velocity, x0, 5), x1)
        torch.testing.assert_close(one_step(decode, None, x0[:, None], target)[:, 0], x1)


def test_guidance_asks_for_both_branches_in_one_call():
    """Conditional rows come first: null + w (conditional - null)."""
    conditional, null, sizes = torch.randn(3, 4, 2), torch.randn(3, 4, 2), []

    def velocity(x, t, prefix_mask=None):
        sizes.append(len(x))
        return torch.cat([conditional, null]) * t + x

    x = torch.randn(3, 4, 2)
    for w in (0.0, 0.5, 1.0, 3.0):
        expected = 0.3 * (null + w * (conditional - null)) + x
        torch.testing.assert_close(guided(velocity, w)(x, 0.3), expected)
    assert sizes == [6] * 4
