"""Distributions over the latent, codebook: against closed forms, by counting, by training."""

import math

import numpy as np
import pytest
import torch
from helpers import NoAverage
from torch import nn

from common import optim
from common.blocks.vq import Codebook
from common.distributions import Codes, Gaussian, LatentFlow, Point, check_fit, latent_head
from common.losses import nsvq
from common.noise import Noise, RowNoise

torch.set_num_threads(1)
B, N, D, DIM, K = 5, 3, 4, 8, 6


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def features(n=B):
    return torch.randn(n, N, DIM)


CODES = torch.randn(K, D, generator=torch.Generator().manual_seed(1))
HEADS = {"gaussian": Gaussian, "point": Point, "flow": LatentFlow, "codes": Codes}


@pytest.mark.parametrize("head", HEADS)
def test_a_draw_is_a_function_of_features_and_noise(head):
    """So a batch gets what each episode would get alone, and held noise holds the choice."""
    model, h = latent_head(head, DIM, N, D, K), features()
    keys = [("episode", i) for i in range(B)]
    codes = [CODES] if head == "codes" else []
    drawn = model(h).sample(RowNoise(keys), *codes)
    assert isinstance(model(h), HEADS[head])
    assert drawn.shape == (B, N, D)
    assert model(h).size == ((N, K) if head == "codes" else (N, D))
    torch.testing.assert_close(model(h[2:3]).sample(RowNoise(keys[2:3]), *codes), drawn[2:3])
    if head != "point":
        assert not torch.equal(
            model(h).sample(RowNoise([("other", i) for i in range(B)]), *codes), drawn
        )


@pytest.mark.parametrize(
    ("head", "given"), [("gaussian", {"num_codes": 4}), ("codes", {"latent_dim": 4}), ("vq", {})]
)
def test_a_head_says_what_it_lacks(head, given):
    with pytest.raises(ValueError, match=r"expected one of|needs (latent_dim|num_codes)"):
        latent_head(head, DIM, N, **{"latent_dim": None, "num_codes": None, **given})


def test_codes_are_drawn_with_the_probabilities_that_their_loss_means():
    """Three slots of two codes: all eight outcomes counted against products of conditionals."""
    model, n = latent_head("codes", DIM, N, None, 2), 40_000
    with torch.no_grad():
        model.embed.mul_(60)  # strong dependence on the slots before
    h, codes = features(1), torch.tensor([[0.0], [1.0]])
    outcomes = torch.cartesian_prod(*[torch.arange(2)] * N)
    nll = torch.stack([N * model(h).loss(outcome[None]) for outcome in outcomes])
    expected = (-nll).exp().detach()
    torch.testing.assert_close(expected.sum(), torch.tensor(1.0))
    with torch.no_grad():
        drawn = model(h.expand(n, -1, -1)).sample(Noise(0), codes)[..., 0].long()
    counts = torch.bincount((drawn * torch.tensor([4, 2, 1])).sum(1), minlength=8) / n
    assert expected.max() - expected.min() > 0.05
    assert (counts - expected).abs().max() < 4 * 0.5 / math.sqrt(n)


def test_a_slot_sees_only_the_codes_before_it():
    model, h, indices = latent_head("codes", DIM, N, None, K), features(), torch.randint(K, (B, N))
    for slot in range(N):
        other = indices.clone()
        other[:, slot] = (other[:, slot] + 1) % K
        change = (model.logits(h, other) - model.logits(h, indices)).abs().amax((0, 2))
        assert (change > 1e-6).tolist() == [later > slot for later in range(N)]


def test_held_noise_holds_the_code_while_it_is_likely():
    """Logits drift from look to look: held noise changes few choices, new noise many."""
    model, h = latent_head("codes", DIM, 1, None, K), torch.randn(500, 1, DIM)
    moved = h + 0.02 * torch.randn_like(h)
    with torch.no_grad():
        first, same, other = (
            model(x).sample(Noise(key), CODES)
            for x, key in ((h, "episode"), (moved, "episode"), (moved, "next"))
        )
    assert (same == first).all(-1).float().mean() > 0.95
    assert (other == first).all(-1).float().mean() < 0.6


def test_drawn_codes_are_codes_and_their_gradient_is_that_of_the_softmax():
    model, h, codes = (
        latent_head("codes", DIM, N, None, K),
        features(),
        CODES.clone().requires_grad_(),
    )
    with torch.no_grad():
        plain = model(h).sample(Noise(0), codes)
    assert (torch.cdist(plain, CODES).amin(-1) == 0).all()
    drawn, weight = model(h).sample(Noise(0), codes), torch.randn(B, N, D)
    torch.testing.assert_close(drawn.detach(), plain)
    (drawn * weight).sum().backward()
    given, model.out.weight.grad = model.out.weight.grad, None
    indices = torch.cdist(plain, CODES).argmin(-1)
    gumbel = -(-Noise(0).uniform(B, N, K).log()).log()
    (((model.logits(h, indices) + gumbel).softmax(-1) @ CODES) * weight).sum().backward()
    torch.testing.assert_close(given, model.out.weight.grad)
    assert codes.grad is None


def test_what_does_not_fit_is_named():
    point, gaussian = (
        Point(torch.zeros(B, N, D)),
        Gaussian(torch.zeros(B, N, D), torch.zeros(B, N, D)),
    )
    wide, h = Point(torch.zeros(B, N, D + 1)), features()
    drawn = {k: latent_head("codes", DIM, N, None, k)(h) for k in (K, K + 1)}
    check_fit("vae", gaussian, gaussian)
    check_fit("vae", gaussian, point)
    check_fit("vae", gaussian, latent_head("flow", DIM, N, D, None)(h))
    check_fit("vqvae", point, drawn[K], CODES)
    check_fit("vqvae", point, point, CODES)
    for mistake, wrong in {
        (point, gaussian): "kind_posterior has head: point; without a codebook it must be gaussian",
        (gaussian, drawn[K]): "kind_prior has head: codes; without a codebook",
        (gaussian, wide): "kind_prior draws 3 tokens of 5 numbers; kind_posterior need 3 of 4",
        (
            gaussian,
            drawn[K],
            CODES,
        ): "kind_posterior has head: gaussian; with a codebook it must be point",
        (point, gaussian, CODES): "kind_prior has head: gaussian; with a codebook",
        (point, drawn[K + 1], CODES): r"kind_prior draws 3 tokens of 7 codes; .* need 3 of 6",
        (
            wide,
            drawn[K],
            CODES,
        ): "posterior has latent_dim: 5, kind_codebook has latent_dim: 4",
    }.items():
        with pytest.raises(ValueError, match=wrong):
            check_fit("kind", *mistake)


def test_a_latent_flow_learns_two_modes_that_depend_on_the_features():
    """z is h + or - 2: half of the draws on either side of each h, as no Gaussian could."""
    model = latent_head("flow", 1, 1, 1, None)
    model.hidden = nn.Sequential(nn.Linear(34, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
    model.out = nn.Linear(64, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(600):
        noise = Noise(step)
        h = noise.normal(256, 1, 1)
        z = h + 4 * (noise.uniform(256, 1, 1) < 0.5) - 2
        optimizer.zero_grad()
        model(h).loss(z, noise).backward()
        optimizer.step()
    h = torch.full((4000, 1, 1), 0.5)
    with torch.no_grad():
        offset = model(h).sample(Noise("draw"), steps=20) - h
    assert abs((offset > 0).float().mean() - 0.5) < 0.06
    assert abs(offset.abs().mean() - 2) < 0.1
    assert offset.abs().std() < 0.35


def test_nsvq_replaces_the_error_by_noise_of_its_length():
    z_e, codes = torch.randn(B, N, D, requires_grad=True), torch.randn(K, D, requires_grad=True)
    indices = torch.randint(K, (B, N))
    z = nsvq(z_e, codes[indices], torch.randn(B, N, D))
    torch.testing.assert_close((z - z_e).norm(dim=-1), (z_e - codes[indices]).norm(dim=-1))
    weight = torch.randn(B, N, D)
    (z * weight).sum().backward()
    unused = sorted(set(range(K)) - set(indices.unique().tolist()))
    assert not codes.grad[unused].any()
    assert codes.grad.any()
    # d|z_e - c| moves z_e and its code in opposite directions; beside that, z_e gets the gradient
    # as it comes.
    from_length = z_e.grad - weight
    gathered = torch.zeros(K, D).index_add(0, indices.flatten(), from_length.flatten(0, 1))
    torch.testing.assert_close(gathered, -codes.grad)


def test_the_codebook_takes_the_nearest_code():
    book, z_e = Codebook(K, D), torch.randn(B, N, D)
    brute = ((z_e[:, :, None] - book.codes) ** 2).sum(-1).argmin(-1)
    code = book(z_e, Noise(0))
    assert torch.equal(code.indices, brute)
    assert torch.equal(code.zq, book.codes[brute])
    assert not torch.allclose(code.z, code.zq)
    assert torch.equal(book(z_e).z, code.zq)
    assert torch.equal(Point(z_e).sample(None, book.codes), code.zq)


def test_unused_codes_move_to_where_they_are_needed_and_are_forgotten():
    book = Codebook(4, 2)
    book.codes.data = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0], [50.0, 50.0]])
    adam = torch.optim.AdamW(book.parameters(), lr=0.0)
    average = optim.AveragedWeights(book, [adam], 0.9)
    z_e = torch.randn(64, 1, 2)
    for step in range(1, 250):
        book(z_e, Noise(step)).z.sum().backward()
        adam.step()
        book.after_step(None)
    torch.testing.assert_close(book.usage[1:], torch.full((3,), 0.99**249 / 4))
    torch.testing.assert_close(book.usage.sum(), torch.tensor(1.0))
    moments = adam.state[book.codes]
    moments["exp_avg"] += 1
    book(z_e, Noise(0))
    moved = book.after_step(Noise("revive"))
    assert moved.tolist() == [1, 2, 3]
    optim.reset_rows([adam], average, book.codes, moved)
    assert book.codes[0].tolist() == [0, 0]
    distance = torch.cdist(book.codes[1:].detach(), z_e[:, 0]).amin(1)
    assert (distance < 0.1).all()
    assert moments["exp_avg"][0].any()
    assert not moments["exp_avg"][1:].any()
    assert not moments["exp_avg_sq"][1:].any()
    assert torch.equal(average.weights()["codes"], book.codes)
    before = book.codes.detach().clone()
    book(z_e, Noise(0))
    assert book.after_step(Noise("revive")) is None
    assert torch.equal(book.codes, before)  # they get time to be found
    assert book.seen == []


def test_codes_move_in_proportion_to_the_squared_error():
    """99 z_e near their code, and three at distances 1, 2 and 3 from it: drawn as 1 : 4 : 9."""
    z_e, hits = (
        torch.cat([torch.zeros(99, 1), torch.tensor([[1.0], [2.0], [-3.0]])])[:, None],
        [0, 0, 0],
    )
    for seed in range(300):
        book = Codebook(3, 1)
        book.codes.data = torch.tensor([[0.0], [1000.0], [2000.0]])
        book.usage[:] = torch.tensor([1.0, 0.0, 0.0])
        book(z_e, Noise(0))
        book.after_step(Noise(seed))
        for code in book.codes[1:, 0].tolist():
            hits[[1, 2, -3].index(round(code))] += 1
    for count, share in zip(hits, (1 / 14, 4 / 14, 9 / 14), strict=True):
        assert abs(count / 600 - share) < 0.07


def test_a_frozen_codebook_stays_where_it_is():
    book = Codebook(4, 2).requires_grad_(False)
    book.usage[:] = torch.tensor([1.0, 0, 0, 0])
    before, z_e = book.codes.clone(), torch.randn(8, 1, 2, requires_grad=True)
    book(z_e, Noise(0)).z.sum().backward()
    assert book.after_step(Noise(0)) is None
    assert torch.equal(book.codes, before)
    assert z_e.grad.any()


def test_perplexity_counts_codes_in_use():
    book = Codebook(4, 1)
    book.codes.data = torch.tensor([[0.0], [1.0], [2.0], [30.0]])
    for step in range(1500):
        book(torch.tensor([0.0, 1.0, 2.0, 2.0])[:, None, None], Noise(step))
        book.after_step(None)
    assert book.usage_scalars()["perplexity"] == pytest.approx(2**1.5, rel=1e-3)


def test_forget_puts_a_schedule_free_row_where_the_parameter_is():
    from schedulefree import RAdamScheduleFree

    parameter = nn.Parameter(torch.randn(3, 2))
    optimizer = RAdamScheduleFree([parameter], lr=0.1)
    optimizer.train()
    for _ in range(20):
        parameter.square().sum().backward()
        optimizer.step()
    parameter.data[1] = 7
    optim.reset_rows([optimizer], NoAverage, parameter, torch.tensor([1]))
    state = optimizer.state[parameter]
    assert state["z"][1].tolist() == [7, 7]
    assert not state["exp_avg_sq"][1].any()
    assert state["exp_avg_sq"][[0, 2]].all()
    assert not np.isclose(state["z"][0].numpy(), 7).any()
