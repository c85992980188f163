"""The objectives against closed forms, SciPy, torch.distributions and POT."""

from itertools import permutations

import numpy as np
import ot
import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from common.losses import (
    draw_camera_mask,
    gaussian_kl,
    kot,
    masked_mse,
    mean_squares,
    transport_plan,
    warmup,
)
from common.noise import Noise

torch.set_num_threads(1)


def clouds(n=12, shift=0.5):
    """predicted and expert (n, 3, 2), state (n, 4): pairs that an optimal plan partly swaps."""
    noise = Noise("clouds", n)
    expert = noise.normal(n, 3, 2)
    return expert.roll(1, 0) + shift * noise.normal(n, 3, 2), expert, 0.3 * noise.normal(n, 4)


def costs(x, y, s, lam_state=2.0):
    """The cost matrix in float64, entry by entry."""
    x, y, s = (a.detach().double().flatten(1).numpy() for a in (x, y, s))
    cost = [
        [
            ((x[i] - y[j]) ** 2).mean() + lam_state * ((s[i] - s[j]) ** 2).mean()
            for j in range(len(y))
        ]
        for i in range(len(x))
    ]
    return np.array(cost)


def entropic(cost, eps):
    """min over plans of <P, C> + eps KL(P | product), by POT in float64."""
    n = len(cost)
    weights = np.full(n, 1 / n)
    plan = ot.sinkhorn(
        weights, weights, cost, eps, method="sinkhorn_log", numItermax=20_000, stopThr=1e-12
    )
    return (plan * cost).sum() + eps * (plan * np.log(np.maximum(plan, 1e-300) * n * n)).sum(), plan


def test_padding_never_changes_the_loss_and_gets_no_gradient():
    prediction, target = torch.randn(2, 4, 3, 6, 2).unbind()
    prediction.requires_grad_()
    is_pad = torch.arange(6) >= torch.tensor([6, 5, 2, 0])[:, None]
    ignored = is_pad[:, None].expand(-1, 3, -1)
    loss = masked_mse(prediction, target, ignored)
    expected = sum(
        (prediction[i, r, k] - target[i, r, k]).square().sum()
        for i, r, k in np.ndindex(4, 3, 6)
        if not is_pad[i, k]
    )
    torch.testing.assert_close(loss, expected / prediction.numel())
    loss.backward()
    padded = is_pad[:, None, :, None].expand_as(prediction)
    assert (prediction.grad[padded] == 0).all()
    assert (prediction.grad[~padded] != 0).all()
    garbage = torch.where(padded, torch.full_like(target, float("nan")), target)
    assert torch.equal(masked_mse(prediction, garbage, ignored), loss)


def test_what_is_given_gets_no_loss_draw_by_draw():
    prediction, target = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 4, 5)
    ignored = torch.rand(2, 3, 4) < 0.5
    loss = masked_mse(prediction, target, ignored)
    by_hand = 0
    for b, r, t in (~ignored).nonzero().tolist():
        by_hand = by_hand + ((prediction[b, r, t] - target[b, r, t]) ** 2).sum()
    torch.testing.assert_close(loss, by_hand / prediction.numel())
    loss.backward()
    assert not prediction.grad[ignored].any()


def test_micro_batches_add_up_whatever_their_padding():
    prediction, target = torch.randn(2, 8, 2, 6, 3).unbind()
    ignored = torch.rand(8, 2, 6) < 0.4
    parts = [
        masked_mse(*(x[rows] for x in (prediction, target, ignored)))
        for rows in torch.arange(8).split(2)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), masked_mse(prediction, target, ignored))


def gaussians(scale=1.0):
    q, p = [[scale * x for x in torch.randn(2, 5, 3, 4).unbind()] for _ in range(2)]
    return [x.requires_grad_() for x in q], [x.requires_grad_() for x in p]


def divergence(q, p):
    """KL per token (B, n) by torch.distributions."""
    return kl_divergence(
        *(Independent(Normal(mu, (0.5 * logvar).exp()), 1) for mu, logvar in (q, p))
    )


def test_gaussian_kl_is_torchs():
    q, p = gaussians()
    loss, kl = gaussian_kl(q, p, free_nats=0.0)
    torch.testing.assert_close(kl, divergence(q, p).sum(1).mean())
    torch.testing.assert_close(loss, kl)


def test_balance_is_the_share_of_the_gradient():
    q, p = gaussians()
    full = torch.autograd.grad(divergence(q, p).sum(1).mean(), [*q, *p])
    given = torch.autograd.grad(gaussian_kl(q, p, balance=0.7, free_nats=0.0)[0], [*q, *p])
    for a, b, share in zip(given, full, (0.3, 0.3, 0.7, 0.7), strict=True):
        torch.testing.assert_close(a, share * b)


def test_free_nats_make_it_flat_per_token():
    q, p = gaussians(0.01)
    p[0].data[:, 0] += 3  # this token is far off
    loss, kl = gaussian_kl(q, p, free_nats=0.25)
    loss.backward()
    assert (q[0].grad[:, 1:] == 0).all()
    assert (p[1].grad[:, 1:] == 0).all()
    assert (p[0].grad[:, 0] != 0).all()
    torch.testing.assert_close(loss, divergence(q, p)[:, 0].mean() + 2 * 0.25)
    assert kl < loss  # the reported one has no floor


def test_transport_plan_is_pots():
    cost = torch.tensor(costs(*clouds()))
    eps = 0.2 * cost.median()
    plan = transport_plan(cost, eps.float(), iterations=500)
    assert not plan.requires_grad
    np.testing.assert_allclose(plan, entropic(cost.numpy(), eps.item())[1], atol=2e-6)
    np.testing.assert_allclose(plan.sum(0), 1 / 12, atol=1e-6)
    np.testing.assert_allclose(plan.sum(1), 1 / 12, atol=1e-7)
    batch = transport_plan(torch.stack([cost, cost.T, cost]), eps.float(), iterations=500)
    torch.testing.assert_close(batch[1].T, plan, atol=2e-6, rtol=0)
    wide = transport_plan(cost[:7], eps.float(), iterations=500)
    np.testing.assert_allclose(wide.sum(0), 1 / 12, atol=1e-6)
    np.testing.assert_allclose(wide.sum(1), 1 / 7, atol=1e-6)


def test_mean_squares_is_the_cost_written_out():
    x, y, s = clouds()
    ours = mean_squares(x.flatten(1), y.flatten(1)) + 2.0 * mean_squares(s, s)
    np.testing.assert_allclose(ours, costs(x, y, s), atol=1e-5)


def test_kot_value_and_gradient_are_those_of_the_entropic_problem():
    x, y, s = clouds()
    x.requires_grad_()
    loss, scalars = kot(x, y, s, lam_state=1.5, blur=0.2, iterations=500)
    eps = 0.2 * torch.tensor(costs(x, y, s, 1.5)).median().item()

    def value(moved):
        across, own, other = (costs(a, b, s, 1.5) for a, b in ((moved, y), (moved, moved), (y, y)))
        return entropic(across, eps)[0] - 0.5 * (entropic(own, eps)[0] + entropic(other, eps)[0])

    assert loss.item() == pytest.approx(value(x), abs=1e-5)
    assert scalars["kot_identity"].item() == pytest.approx(
        entropic(costs(x, y, s, 1.5), eps)[1].trace(), abs=1e-5
    )
    loss.backward()
    for index in ((0, 0, 0), (3, 2, 1), (11, 1, 0)):
        h = torch.zeros_like(x, dtype=torch.float64)
        h[index] = 1e-4
        slope = (value(x.detach().double() + h) - value(x.detach().double() - h)) / 2e-4
        assert x.grad[index].item() == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_kot_of_equal_sets_is_zero_and_flat():
    _, y, s = clouds()
    x = y.clone().requires_grad_()
    loss, _ = kot(x, y, s, iterations=1000)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert x.grad.abs().max() < 1e-5
    assert kot(y + 0.5, y, s)[0] > 1e-2


def test_exact_solver_is_brute_force_and_the_limit_of_a_small_blur():
    x, y, s = clouds(5, shift=0.2)
    x.requires_grad_()
    cost = costs(x, y, s, 0.1)
    best = min(permutations(range(5)), key=lambda order: cost[range(5), order].sum())
    assert best != tuple(range(5))
    loss, scalars = kot(x, y, s, lam_state=0.1, solver="exact")
    assert loss.item() == pytest.approx(cost[range(5), best].mean(), rel=1e-5)
    assert scalars["kot_identity"].item() == pytest.approx(
        sum(i == j for i, j in enumerate(best)) / 5
    )
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(gradient, 2 * (x - y[list(best)]).detach() / (5 * 6))
    assert kot(x, y, s, 0.1, 1e-3, 500)[0].item() == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("solver", ["sinkhorn", "exact"])
def test_kot_and_kl_run_in_float32_under_autocast(solver):
    x, y, s = clouds()
    q, p = gaussians()
    with torch.autocast("cpu", torch.bfloat16):
        inside, kl = kot(x, y, s, solver=solver)[0], gaussian_kl(q, p)[0]
    assert inside.dtype == kl.dtype == torch.float32
    assert torch.equal(inside, kot(x, y, s, solver=solver)[0])
    low = [[x.bfloat16() for x in gaussian] for gaussian in (q, p)]
    assert torch.equal(
        gaussian_kl(*low)[0], gaussian_kl(*([x.float() for x in gaussian] for gaussian in low))[0]
    )
    low = kot(x.bfloat16(), y.bfloat16(), s.bfloat16(), solver=solver)[0]
    assert torch.equal(low, kot(*(a.bfloat16().float() for a in (x, y, s)), solver=solver)[0])


@pytest.mark.parametrize("cameras", [2, 3])
def test_a_camera_is_dropped_as_often_as_asked_and_never_two(cameras):
    n = 40_000
    dropped = draw_camera_mask(Noise("drop"), n, cameras, 0.15)
    assert dropped.sum(1).max() == 1
    share = dropped.float().mean(0).numpy()
    np.testing.assert_allclose(share, 0.15 / cameras, atol=5 * (0.15 / cameras / n) ** 0.5)


def test_no_camera_is_dropped_where_it_is_the_only_one_or_none_is_asked():
    assert draw_camera_mask(Noise("drop"), 500, 1, 0.9).tolist() == [[False]] * 500
    assert not draw_camera_mask(Noise("drop"), 500, 3, 0.0).any()
    assert draw_camera_mask(Noise("drop"), 500, 0, 0.5).shape == (500, 0)


def test_the_warmup_rises_over_its_share_of_the_run():
    assert [warmup(progress, 0.5) for progress in (0, 0.25, 0.5, 1)] == [0, 0.5, 1, 1]
    assert warmup(0.0, 0.0) == 1
