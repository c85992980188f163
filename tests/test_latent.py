"""Distributions over the latent, the codebook and its upkeep: against closed forms, by counting, by training."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from common import optim
from common.blocks.latent import Codes, Gaussian, LatentFlow, Point, latent_head
from common.blocks.vq import Codebook
from common.losses import Noise, RowNoise, nsvq

torch.set_num_threads(1)
B, N, D, DIM, K = 5, 3, 4, 8, 6


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def features(n=B):
    return torch.randn(n, N, DIM)


HEADS = {"gaussian": Gaussian, "point": Point, "flow": LatentFlow, "codes": Codes}


@pytest.mark.parametrize("head", HEADS)
def test_a_draw_is_a_function_of_features_and_noise(head):
    """So a batch gets what each episode would get alone, and held noise holds the choice."""
    model, h = latent_head(head, DIM, N, D, K), features()
    keys = [("episode", i) for i in range(B)]
    drawn = model(h).sample(RowNoise(keys))
    assert isinstance(model(h), HEADS[head])
    assert drawn.shape == ((B, N) if head == "codes" else (B, N, D))
    torch.testing.assert_close(model(h[2:3]).sample(RowNoise(keys[2:3])), drawn[2:3])
    if head != "point":
        assert not torch.equal(model(h).sample(RowNoise([("other", i) for i in range(B)])), drawn)


@pytest.mark.parametrize(("head", "given"), [("gaussian", {"num_codes": 4}), ("codes", {"latent_dim": 4}), ("vq", {})])
def test_a_head_says_what_it_lacks(head, given):
    with pytest.raises(ValueError, match=r"expected one of|needs (latent_dim|num_codes)"):
        latent_head(head, DIM, N, **{"latent_dim": None, "num_codes": None, **given})


def test_codes_are_drawn_with_the_probabilities_that_their_loss_means():
    """Three slots of two codes: all eight outcomes, counted against the product of conditional probabilities."""
    model, n = latent_head("codes", DIM, N, None, 2), 40_000
    with torch.no_grad():
        model.embed.mul_(60)  # strong dependence on the slots before
    h = features(1)
    outcomes = torch.cartesian_prod(*[torch.arange(2)] * N)
    nll = torch.stack([N * model(h).loss(outcome[None], None) for outcome in outcomes])
    expected = (-nll).exp().detach()
    torch.testing.assert_close(expected.sum(), torch.tensor(1.0))
    drawn = model(h.expand(n, -1, -1)).sample(Noise(0))
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
    """The logits drift a little from look to look: with the same noise few choices change, with new noise many do."""
    model, h = latent_head("codes", DIM, 1, None, K), torch.randn(500, 1, DIM)
    moved = h + 0.02 * torch.randn_like(h)
    first = model(h).sample(Noise("episode"))
    assert (model(moved).sample(Noise("episode")) == first).float().mean() > 0.95
    assert (model(moved).sample(Noise("next")) == first).float().mean() < 0.6


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
    # d|z_e - c| moves z_e and its code in opposite directions; beside that, z_e gets the gradient as it comes.
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
    assert torch.equal(book.eval()(z_e, Noise(0)).z, code.zq)
    assert torch.equal(book.lookup(brute), code.zq)
    assert torch.equal(book.lookup(z_e), code.zq)


def test_unused_codes_move_to_where_they_are_needed_and_are_forgotten_by_the_optimizer():
    book = Codebook(4, 2)
    book.codes.data = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0], [50.0, 50.0]])
    adam = torch.optim.AdamW(book.parameters(), lr=0.0)
    z_e = torch.randn(64, 1, 2)
    for step in range(1, 101):
        book(z_e, Noise(step)).z.sum().backward()
        adam.step()
        book.after_step(step, revive=False, optimizers=[adam])
    assert book.perplexity() == pytest.approx(1)
    moments = adam.state[book.codes]
    moments["exp_avg"] += 1
    book(z_e, Noise(0))
    book.after_step(101, revive=True, optimizers=[adam])
    assert book.codes[0].tolist() == [0, 0]
    distance = torch.cdist(book.codes[1:].detach(), z_e[:, 0]).amin(1)
    assert (distance < 0.1).all()
    assert moments["exp_avg"][0].any()
    assert not moments["exp_avg"][1:].any()
    assert not moments["exp_avg_sq"][1:].any()
    before = book.codes.detach().clone()
    book(z_e, Noise(0))
    book.after_step(102, revive=True, optimizers=[adam])
    assert torch.equal(book.codes, before)  # they get time to be found
    assert book.seen == []


def test_perplexity_counts_codes_in_use():
    book = Codebook(4, 1)
    book.codes.data = torch.tensor([[0.0], [1.0], [2.0], [30.0]])
    for step in range(1000):
        book(torch.tensor([0.0, 1.0, 2.0, 2.0])[:, None, None], Noise(step))
        book.after_step(step, revive=False, optimizers=[])
    assert book.perplexity() == pytest.approx(2**1.5, rel=1e-3)


def test_forget_puts_a_schedule_free_row_where_the_parameter_is():
    from schedulefree import RAdamScheduleFree

    parameter = nn.Parameter(torch.randn(3, 2))
    optimizer = RAdamScheduleFree([parameter], lr=0.1)
    optimizer.train()
    for _ in range(20):
        parameter.square().sum().backward()
        optimizer.step()
    parameter.data[1] = 7
    optim.forget([optimizer], parameter, torch.tensor([1]))
    state = optimizer.state[parameter]
    assert state["z"][1].tolist() == [7, 7]
    assert not state["exp_avg_sq"][1].any()
    assert state["exp_avg_sq"][[0, 2]].all()
    assert not np.isclose(state["z"][0].numpy(), 7).any()
