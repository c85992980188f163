"""Integrators against closed forms: straight paths, their order on a linear equation, targets, direction of time."""

import math

import pytest
import torch

from common.flow import euler, heun, velocity

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
    errors = [(solver(lambda x, t: a * x + math.cos(3 * t), x0, n) - exact).abs() for n in (512, 1024)]
    torch.testing.assert_close(errors[0] / errors[1], torch.full_like(x0, 2**order), rtol=0.05, atol=0)


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
def test_both_targets_of_a_perfect_decoder_give_the_data(solver):
    x0, x1 = torch.randn(2, 3, 4, 2, dtype=torch.float64).unbind()
    ends = {"x1": x1, "velocity": x1 - x0}
    for target, end in ends.items():
        result = solver(lambda x, t: velocity(lambda x_t, t: end[:, None], target, x, t), x0, 5)  # noqa: B023
        torch.testing.assert_close(result, x1)
