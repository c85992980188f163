"""Integrators against closed forms: straight paths, order, targets, direction of time; which actions robots get."""

import math

import numpy as np
import pytest
import torch

from common.flow import Execution, euler, generate, heun, velocity

torch.set_num_threads(1)


@pytest.mark.parametrize("solver", [euler, heun])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_straight_paths_are_exact(solver, steps):
    x0, x1 = torch.randn(2, 4, 5, 2, dtype=torch.float64).unbind()
    torch.testing.assert_close(solver(lambda x, t: x1 - x0, x0, steps), x1)


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
def test_order(solver, order):
    """dx/dt = a x + cos(3 t) has a closed form; halving the step divides the error by 2 ** order."""
    a, x0 = -1.3, torch.tensor([0.7, -2.0], dtype=torch.float64)

    def particular(t):
        return (3 * math.sin(3 * t) - a * math.cos(3 * t)) / (9 + a * a)

    exact = (x0 - particular(0)) * math.exp(a) + particular(1)
    errors = [
        (solver(lambda x, t: a * x + math.cos(3 * t), x0, n) - exact).abs() for n in (512, 1024)
    ]
    torch.testing.assert_close(
        errors[0] / errors[1], torch.full_like(x0, 2**order), rtol=0.05, atol=0
    )


@pytest.mark.parametrize(("solver", "evaluations"), [(euler, 10), (heun, 19)])
def test_time_runs_from_noise_to_data(solver, evaluations):
    times = []
    solver(lambda x, t: times.append(t) or x, torch.zeros(1), 10)
    assert times[0] == 0
    assert max(times) == 0.9  # nothing is asked at t = 1, where (x1 - x) / (1 - t) is 0 / 0
    assert times == sorted(times)
    assert len(times) == evaluations


class Decode:
    """Stands for a bound decoder: a prediction that depends on x and t; notes the shapes it is called with."""

    def __init__(self):
        self.shapes = set()

    def __call__(self, x_t, t):
        self.shapes.add((tuple(x_t.shape), tuple(t.shape)))
        return torch.tanh(x_t) + t[..., None, None]


def test_x1_prediction_moves_the_remaining_share_of_the_way():
    x, n, decode = torch.randn(3, 4, 2, dtype=torch.float64), 8, Decode()
    ours = euler(lambda x, t: velocity(decode, "x1", x, t), x, n)
    for i in range(n):
        x = x + (torch.tanh(x) + i / n - x) / (n - i)
    torch.testing.assert_close(ours, x)
    assert decode.shapes == {((3, 1, 4, 2), (3, 1))}


def test_velocity_prediction_is_used_as_it_is():
    x = torch.randn(3, 4, 2)
    torch.testing.assert_close(velocity(Decode(), "velocity", x, 0.25), torch.tanh(x) + 0.25)


@pytest.mark.parametrize("solver", [euler, heun])
@pytest.mark.parametrize("target", ["velocity", "x1"])
def test_a_prefix_is_held_fixed_at_every_evaluation(solver, target):
    """The decoder sees the given actions, clean and marked, each time it is asked; the rest is moved by it alone."""
    seen = []

    def decode(x_t, t, fixed):
        seen.append((x_t[:, 0].clone(), fixed))
        return x_t[:, :, :2].mean(2, keepdim=True) + x_t.sin()

    x0, prefix = torch.randn(3, 5, 2), 10 * torch.randn(3, 2, 2)
    chunk = generate(decode, target, x0, 4, solver, prefix)
    assert torch.equal(chunk[:, :2], prefix)
    for x, fixed in seen:
        assert torch.equal(x[:, :2], prefix)
        assert fixed.tolist() == [[[True, True, False, False, False]]] * 3
    other = generate(decode, target, x0, 4, solver, prefix + 1)
    assert not torch.allclose(other[:, 2:], chunk[:, 2:])
    assert torch.equal(seen[0][0][:, 2:], x0[:, 2:])


def test_without_a_prefix_the_decoder_is_not_told_of_one():
    x0 = torch.randn(3, 5, 2)
    chunk = generate(lambda x_t, t: x_t + 1, "velocity", x0, 2)
    torch.testing.assert_close(chunk, (x0 * 1.5 + 0.5) * 1.5 + 0.5)


@pytest.mark.parametrize("solver", [euler, heun])
def test_both_targets_of_a_perfect_decoder_give_the_data(solver):
    x0, x1 = torch.randn(2, 3, 4, 2, dtype=torch.float64).unbind()
    ends = {"x1": x1, "velocity": x1 - x0}
    for target, end in ends.items():
        result = solver(lambda x, t: velocity(lambda x_t, t: end[:, None], target, x, t), x0, 5)  # noqa: B023
        torch.testing.assert_close(result, x1)


def run_robots(execute, delay=0, ensemble=None, horizon=8, ticks=23, robots=3):
    """(actions (ticks, robots, 2), chunks by tick, prefixes by tick) of an Execution fed with random chunks."""
    rng, rows = np.random.default_rng(0), list(range(robots))
    execution, carried, chunks, prefixes = Execution(robots, execute, ensemble, delay), [], {}, {}
    for tick in range(ticks):
        if execution.due():
            prefixes[tick] = execution.prefix(rows)
            chunks[tick] = rng.normal(size=(robots, horizon, 2)).astype(np.float32)
            execution.add(rows, chunks[tick])
        carried.append(execution.next(rows))
    return np.array(carried), chunks, prefixes


def test_chunks_one_after_the_other():
    carried, chunks, _ = run_robots(execute=3)
    assert list(chunks) == [0, 3, 6, 9, 12, 15, 18, 21]
    for tick, actions in enumerate(carried):
        np.testing.assert_array_equal(actions, chunks[tick // 3 * 3][:, tick % 3])


@pytest.mark.parametrize(("execute", "delay"), [(3, 2), (3, 5), (4, 4), (1, 7), (2, 5)])
def test_late_chunks_act_where_they_were_meant_to(execute, delay):
    """Chunk k acts at ticks k + delay to k + delay + execute - 1; until the second one acts, the first goes on."""
    carried, chunks, _ = run_robots(execute, delay)
    for tick, actions in enumerate(carried):
        start = max((tick - delay) // execute * execute, 0)
        np.testing.assert_array_equal(actions, chunks[start][:, tick - start])


@pytest.mark.parametrize("execute", [1, 3])
@pytest.mark.parametrize("m", [0.0, 0.01, 0.7])
def test_ensembling_as_in_act(execute, m):
    """The table of Zhao et al.: row k holds the chunk of tick k at columns k to k + T - 1; a column is averaged."""
    carried, chunks, _ = run_robots(execute, ensemble=m)
    for robot in range(3):
        table = np.full((23, 23 + 8, 2), np.nan)
        for tick, chunk in chunks.items():
            table[tick, tick : tick + 8] = chunk[robot]
        for tick in range(23):
            present = table[: tick + 1, tick]
            present = present[~np.isnan(present[:, 0])]
            weights = np.exp(-m * np.arange(len(present)))
            np.testing.assert_allclose(
                carried[tick, robot], weights @ present / weights.sum(), rtol=1e-5, atol=1e-6
            )


def test_ensembling_leaves_out_chunks_that_are_not_there_yet():
    carried, chunks, _ = run_robots(execute=2, delay=3, ensemble=0.4)
    for tick in range(23):
        there = [k for k in chunks if k + (3 if k else 0) <= tick < k + 8]
        weights = np.exp(-0.4 * np.arange(len(there)))
        mean = sum(
            w * chunks[k][:, tick - k] for w, k in zip(weights / weights.sum(), there, strict=True)
        )
        np.testing.assert_allclose(carried[tick], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ensemble", [None, 0.2])
@pytest.mark.parametrize(("execute", "delay"), [(5, 1), (4, 4), (2, 5), (1, 7)])
def test_prefix_is_what_is_carried_out_next(execute, delay, ensemble):
    carried, _, prefixes = run_robots(execute, delay, ensemble)
    assert prefixes.pop(0) is None
    for tick, prefix in prefixes.items():
        following = carried[tick : tick + delay]
        assert prefix.shape == (3, delay, 2)
        np.testing.assert_array_equal(prefix[:, : len(following)], following.swapaxes(0, 1))
    assert all(prefix is None for prefix in run_robots(execute, 0, ensemble)[2].values())


@pytest.mark.parametrize("ensemble", [None, 0.2])
def test_robots_that_stop_change_nothing_for_the_others(ensemble):
    rng = np.random.default_rng(1)
    chunks = rng.normal(size=(6, 4, 5, 1)).astype(np.float32)
    together, alone = Execution(4, 2, ensemble, 1), Execution(1, 2, ensemble, 1)
    for tick in range(12):
        rows = [0, 1, 2, 3] if tick < 5 else [2]
        if together.due():
            together.add(rows, chunks[tick // 2, rows])
            alone.add([0], chunks[tick // 2, [2]])
        np.testing.assert_array_equal(together.next(rows)[rows.index(2)], alone.next([0])[0])


def test_a_chunk_lasts_until_the_next_one_acts():
    execution = Execution(1, 4, delay=2)
    with pytest.raises(ValueError, match="chunks of 5 for execute 4 and delay 2"):
        execution.add([0], np.zeros((1, 5, 2)))
    execution.add([0], np.zeros((1, 6, 2)))
