"""Schedules against torch and a formula, parameter groups, averages against written-out ones."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common import optim
from common.parts import Parts
from common.schema import Model, Optim

torch.set_num_threads(1)


def config(overrides=None, **settings):
    settings = {"peak_lr": 1e-2, "weight_decay": 0.1, "warmup_steps": 3} | settings
    model = Model(component_config_paths={}, component_optims=overrides or {})
    return SimpleNamespace(train=SimpleNamespace(optim=Optim(**settings)), model=model)


class Net(nn.Module):
    """A bit of everything that has parameters."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 4, 3), nn.LayerNorm(4), nn.Linear(4, 2)
        self.embedding, self.token = nn.Embedding(5, 4), nn.Parameter(torch.randn(2, 4))

    def forward(self, image):
        x = self.norm(self.conv(image).mean((2, 3)))
        return self.linear(x + self.embedding.weight.mean(0) + self.token.mean(0))


def parts():
    torch.manual_seed(0)
    return Parts({"backbone": Net(), "decoder": Net(), "old": Net()}, frozen=["old"])


def train(policy, optimizers, steps, average=None, between=lambda: None):
    """Some optimizer steps on data that depend on the step alone."""
    for step in range(steps):
        image = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(step))
        loss = sum(
            (policy[name](image) - image.mean((2, 3))[:, :2]).square().mean()
            for name in policy.trainable()
        )
        loss.backward()
        optim.set_learning_rate(optimizers, step, steps)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if average:
            average.update(step + 1)
        between()


@pytest.mark.parametrize("total", [10, 37, 1000])
def test_onecycle_is_torchs(total):
    group = {"peak_lr": 3e-4, "schedule": "adamw_onecycle"}
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=3e-4,
        total_steps=total,
        pct_start=0.3,
        div_factor=25,
        final_div_factor=1e4,
        cycle_momentum=False,
    )
    for step in range(total):
        assert optim.learning_rate(group, step, total) == pytest.approx(
            schedule.get_last_lr()[0], rel=1e-9, abs=1e-16
        )
        optimizer.step()
        if step < total - 1:
            schedule.step()
    assert optim.learning_rate(group, total + 5, total) == pytest.approx(3e-4 / 25e4)


@pytest.mark.parametrize(("warmup", "total"), [(0, 50), (1, 50), (10, 200), (50, 50), (80, 50)])
def test_warmup_cosine_is_the_formula(warmup, total):
    start, peak, end = 1e-6, 1e-4, 2e-6
    group = {
        "start_lr": start,
        "peak_lr": peak,
        "end_lr": end,
        "warmup_steps": warmup,
        "schedule": "adamw_warmup_cosine_decay",
    }
    rates = [optim.learning_rate(group, step, total) for step in range(total)]
    for k, rate in enumerate(rates):
        if k < warmup:
            expected = start + (peak - start) * k / (warmup - 1) if warmup > 1 else start
        else:
            expected = end + (peak - end) / 2 * (
                1 + math.cos(math.pi * (k - warmup) / (total - warmup - 1))
            )
        assert rate == pytest.approx(expected)
    assert optim.learning_rate(group, warmup + 2 * total, total) == pytest.approx(end)
    if 1 < warmup < total - 1:
        assert (rates[0], max(rates), rates[-1]) == pytest.approx((start, peak, end))
        assert rates[:warmup] == sorted(rates[:warmup])
        assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
        biggest = max(peak / (warmup - 1), math.pi / 2 * peak / (total - warmup - 1))
        assert max(abs(a - b) for a, b in pairwise(rates)) <= biggest


def test_schedule_free_is_constant():
    group = {"peak_lr": 2e-3, "schedule": "schedule_free_radam"}
    assert {optim.learning_rate(group, step, 100) for step in range(120)} == {2e-3}


def test_only_weights_of_linear_and_convolution_layers_decay():
    policy = parts()
    (optimizer,) = optim.build(policy, config())
    names = {id(p): name for name, p in policy.named_parameters()}
    decay = {
        names[id(p)]: group["weight_decay"]
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert {name for name, rate in decay.items() if rate == 0.1} == {
        f"{part}.{layer}.weight" for part in ("backbone", "decoder") for layer in ("conv", "linear")
    }
    assert set(decay.values()) == {0.0, 0.1}
    assert set(decay) == {
        name for name, p in policy.named_parameters() if not name.startswith("old")
    }
    assert [(g["component"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("backbone", 0.1), ("backbone", 0.0), ("decoder", 0.1), ("decoder", 0.0)
    ]  # fmt: skip


def test_components_override_settings_and_types():
    overrides = {"decoder": {"peak_lr": 5e-3, "betas": [0.8, 0.9], "type": "schedule_free_radam"}}
    policy = parts()
    adam, free = optim.build(policy, config(overrides, eps=1e-7))
    assert type(adam).__name__ == "AdamW"
    assert adam.param_groups[0]["fused"]
    assert type(free).__name__ == "RAdamScheduleFree"
    assert {g["component"] for g in adam.param_groups} == {"backbone"}
    assert {g["component"] for g in free.param_groups} == {"decoder"}
    assert (free.param_groups[0]["betas"], free.param_groups[0]["eps"]) == ((0.8, 0.9), 1e-7)
    assert adam.param_groups[0]["betas"] != (0.8, 0.9)
    assert optim.set_learning_rate([adam, free], 0, 100) == 5e-3
    assert [group["lr"] for group in free.param_groups] == [5e-3, 5e-3]
    assert [group["lr"] for group in adam.param_groups] == [Optim().start_lr] * 2
    (same_type,) = optim.build(parts(), config({"decoder": {"peak_lr": 5e-3}}, warmup_steps=0))
    optim.set_learning_rate([same_type], 0, 100)
    assert [group["lr"] for group in same_type.param_groups] == [1e-2, 1e-2, 5e-3, 5e-3]


def test_ema_is_the_loop_written_out():
    policy = parts()
    optimizers = optim.build(policy, config())
    average = optim.AveragedWeights(policy, optimizers, 0.9)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    by_hand, n = {name: p.detach().clone().double() for name, p in trained.items()}, 0

    def follow():
        nonlocal n
        n += 1
        decay = min(0.9, (1 + n) / (10 + n))
        for name, p in trained.items():
            by_hand[name] = decay * by_hand[name] + (1 - decay) * p.detach().double()

    train(policy, optimizers, 100, average, follow)  # 0.9 is reached at n = 80
    weights = average.weights()
    assert weights.keys() == trained.keys()
    for name, p in by_hand.items():
        torch.testing.assert_close(weights[name].double(), p, atol=1e-6, rtol=1e-5)
        assert not torch.equal(weights[name], trained[name])


@pytest.mark.parametrize("kind", ["adamw_warmup_cosine_decay", "schedule_free_radam"])
def test_applied_puts_the_average_in_place_and_everything_back(kind):
    policy = parts()
    optimizers = optim.build(policy, config(type=kind))
    average = optim.AveragedWeights(policy, optimizers, 0.9)
    train(policy, optimizers, 12, average)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    places = {name: p.data_ptr() for name, p in policy.named_parameters()}
    expected = average.weights()

    def validate():
        with average.applied():
            for name, p in policy.named_parameters():
                assert torch.equal(p, expected.get(name, before[name]))
                assert torch.equal(p, before[name]) == (name not in expected)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        validate()
    for name, p in policy.named_parameters():
        assert torch.equal(p, before[name])
        assert p.data_ptr() == places[name]


def test_without_ema_the_weights_are_the_trained_ones():
    policy = parts()
    average = optim.AveragedWeights(policy, optim.build(policy, config()), None)
    average.update(1)
    assert average.weights() == {}
    with average.applied():
        pass


def test_schedule_free_average_is_schedulefrees_own_and_disturbs_nothing():
    def run(watched):
        policy = parts()
        optimizers = optim.build(policy, config(type="schedule_free_radam", betas=[0.9, 0.99]))
        average = optim.AveragedWeights(policy, optimizers, 0.999)
        assert all(
            torch.equal(w, dict(policy.named_parameters())[name])
            for name, w in average.weights().items()
        )

        def look():
            with average.applied():
                average.weights()

        train(policy, optimizers, 20, average, look if watched else lambda: None)
        return policy, optimizers[0], average.weights()

    (policy, optimizer, averaged), (untouched, _, _) = run(True), run(False)
    raw = {name: p.detach().clone() for name, p in policy.named_parameters()}
    for name, p in untouched.named_parameters():
        assert torch.equal(p, raw[name])
    optimizer.eval()
    for name, p in policy.named_parameters():
        assert torch.equal(p, averaged.get(name, raw[name]))
        assert (name in averaged) == (not name.startswith("old"))
        assert torch.equal(p, raw[name]) == (name not in averaged)


def test_mixed_types_average_each_in_its_way():
    policy = parts()
    optimizers = optim.build(policy, config({"decoder": {"type": "schedule_free_radam"}}))
    average = optim.AveragedWeights(policy, optimizers, 0.9)
    train(policy, optimizers, 20, average)
    assert {name.split(".")[0] for name in average.ema} == {"backbone"}
    weights = average.weights()
    assert {name.split(".")[0] for name in weights} == {"backbone", "decoder"}
    optimizers[1].eval()
    assert torch.equal(weights["decoder.linear.weight"], policy["decoder"].linear.weight)
