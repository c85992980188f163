"""Mixtures of experts: dispatch against dense computation, losses by hand, the routing policy."""

import importlib.util
import inspect
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import configured, on_meta
from safetensors.torch import load_file
from torch import nn

import evaluate
import train_vfp_moe
from common import checkpoint, metrics, optim
from common.blocks.mlp import MLPActionDecoder
from common.blocks.moe import (
    ExpertLinear,
    ExpertMLP,
    Gate,
    MoEActionDecoder,
    MoEMLPActionDecoder,
    Routing,
    choose_experts,
)
from common.blocks.transformer import ActionDecoder
from common.config import ConfigError, UserError
from common.data.loader import to_device
from common.flow import detached, euler
from common.losses import load_balance, masked_mse, mixture_mse, router_z
from common.noise import Noise

torch.set_num_threads(1)
ROOT = Path(train_vfp_moe.__file__).parent
B, R, T, A, D, E = 5, 2, 6, 3, 4, 4
CHOSEN = torch.tensor([[0, 1], [1, 0], [2, 1], [0, 2], [1, 2]])  # nobody chose the last


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def decoder(kind):
    if kind == "mlp":
        made, memory = MoEMLPActionDecoder(16, 2, E, 8, A, T, latent_size=D), torch.randn(B, 1, 8)
    else:
        made = MoEActionDecoder(16, 2, 32, 2, E, A, D, prefix=True)
        memory = torch.randn(B, 7, 16)
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    return made.eval(), memory


KINDS = pytest.mark.parametrize("kind", ["transformer", "mlp"])


def inputs():
    return torch.randn(B, R, T, A), torch.rand(B, R), torch.randn(B, 1, D)


def answer(made, x, t, memory, z, experts):
    """(B, k R, T, A): each chosen expert's prediction."""
    return made(x, t, made.context(memory=memory, z=z, experts=experts))


def dense(made, x, t, memory, z):
    """Each expert's prediction for the whole batch, alone: (B, E, R, T, A)."""
    return torch.stack([answer(made, x, t, memory, z, torch.full((B, 1), e)) for e in range(E)], 1)


@KINDS
def test_dispatch_is_the_dense_computation_masked_by_the_routing(kind):
    made, memory = decoder(kind)
    x, t, z = inputs()
    mask = nn.functional.one_hot(CHOSEN, E).to(x.dtype)
    upstream = torch.randn(B, 2, R, T, A)
    found, gradients = [], []
    for routed in (True, False):
        if routed:
            y = answer(made, x, t, memory, z, CHOSEN).unflatten(1, (2, R))
        else:
            y = torch.einsum("bke, bertx -> bkrtx", mask, dense(made, x, t, memory, z))
        made.zero_grad()
        y.backward(upstream)
        found.append(y.detach())
        gradients.append(
            {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
        )
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, atol=1e-4, rtol=1e-3)


@KINDS
def test_all_experts_of_all_samples_is_dense(kind):
    made, memory = decoder(kind)
    x, t, z = inputs()
    everyone = torch.stack([torch.randperm(E) for _ in range(B)])
    y = answer(made, x, t, memory, z, everyone).unflatten(1, (E, R))
    expected = dense(made, x, t, memory, z)[torch.arange(B)[:, None], everyone]
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)


@KINDS
def test_an_expert_that_nobody_chose_has_a_gradient_of_zero(kind):
    made, memory = decoder(kind)
    x, t, z = inputs()
    answer(made, x, t, memory, z, CHOSEN).square().mean().backward()
    missing = [
        name for name, p in made.named_parameters() if p.grad is None and "prefix" not in name
    ]
    assert missing == []
    stacked = [
        p.grad for m in made.modules() if isinstance(m, ExpertLinear) for p in m.parameters()
    ]
    unused, used = [grad[3] for grad in stacked], [grad[0] for grad in stacked]
    assert not any(grad.any() for grad in unused)
    assert all(grad.any() for grad in used)


@KINDS
@torch.no_grad()
def test_latent_and_experts_are_in_the_context_or_added_to_it(kind):
    made, memory = decoder(kind)
    x, t, z = inputs()
    expected = answer(made, x, t, memory, z, CHOSEN)
    observed = made.context(memory)
    assert observed.routing is None
    for context in (observed, detached(observed)):
        later = made.with_latent(context, z=z, experts=CHOSEN)
        assert torch.equal(made(x, t, later), expected)
    assert torch.equal(made(x, t, detached(made.context(memory, z, CHOSEN))), expected)
    if kind != "mlp":
        mask = torch.rand(B, R, T) < 0.3
        both = made(x, t, made.context(memory, z, CHOSEN), prefix_mask=mask)
        for k in range(2):
            alone = made(x, t, made.context(memory, z, CHOSEN[:, k : k + 1]), prefix_mask=mask)
            torch.testing.assert_close(both.unflatten(1, (2, R))[:, k], alone, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(both, expected)


@KINDS
def test_detached_gives_the_memory_no_gradient(kind):
    made, memory = decoder(kind)
    x, t, z = inputs()
    memory, z = memory.requires_grad_(), z.requires_grad_()
    context = made.with_latent(detached(made.context(memory)), z=z, experts=CHOSEN[:, :1])
    made(x, t, context).square().sum().backward()
    assert memory.grad is None
    assert z.grad.any()


def test_routing_sorts_rows_by_expert_and_puts_them_back():
    routing = Routing.of(CHOSEN, E)
    flat = CHOSEN.flatten()
    assert flat[routing.order].tolist() == sorted(flat.tolist())
    assert torch.equal(flat[routing.order][routing.back], flat)
    assert torch.equal(routing.chosen.argmax(1), flat[routing.order])
    x = torch.randn(B, 2, 7, 3)
    doubled = routing.apply(lambda rows, chosen: rows * chosen.argmax(1)[:, None, None], x)
    torch.testing.assert_close(doubled, x * CHOSEN[..., None, None])


def test_one_expert_is_the_single_decoder():
    x, t, z = inputs()
    for single, made, memory in (
        (
            ActionDecoder(16, 2, 32, 2, A, D),
            MoEActionDecoder(16, 2, 32, 2, 1, A, D),
            torch.randn(B, 7, 16),
        ),
        (
            MLPActionDecoder(16, 2, 8, A, T, D),
            MoEMLPActionDecoder(16, 2, 1, 8, A, T, D),
            torch.randn(B, 1, 8),
        ),
    ):
        for p in single.parameters():
            nn.init.normal_(p, std=0.3)
        plain = single.state_dict()
        own = made.decoder.state_dict()
        renamed = {}
        for name in own:
            before = (
                name.replace("ff.layers.0", "ff.0")
                .replace("ff.layers.1", "ff.2")
                .replace("out.layers.0", "out")
            )
            if before not in plain:  # the MLP's layers begin with an activation
                before = name.replace(".layers.0.", ".1.").replace(".layers.1.", ".3.")
            value = plain[before]
            expert = name.endswith("weight") and own[name].ndim == 3
            renamed[name] = (
                value.T[None]
                if expert
                else value[None]
                if own[name].ndim == value.ndim + 1
                else value
            )
        made.decoder.load_state_dict(renamed)
        single.eval(), made.eval()
        one = torch.zeros(B, 1, dtype=torch.long)
        torch.testing.assert_close(
            answer(made, x, t, memory, z, one),
            single(x, t, single.context(memory, z)),
            atol=1e-5,
            rtol=1e-4,
        )


def test_widths_that_grouped_products_cannot_take():
    with pytest.raises(ValueError, match="multiples of 8, found 12"):
        ExpertLinear(2, 12, 8)
    for size in (1, 3, 8, 13):  # heads may have any
        mlp = ExpertMLP(3, (8, size))
        x, experts = torch.randn(4, 2, 5, 8), torch.randint(3, (4, 2))
        y = mlp(x, Routing.of(experts, 3))
        weight, bias = mlp.layers[0].weight[experts], mlp.layers[0].bias[experts]
        torch.testing.assert_close(y, x @ weight + bias[:, :, None], atol=1e-5, rtol=1e-4)


def test_autocast_computes_in_its_precision():
    mlp, experts = ExpertMLP(3, (8, 16, 8), nn.functional.gelu), torch.randint(3, (4, 1))
    x = torch.randn(4, 1, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = mlp(x, Routing.of(experts, 3))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), mlp(x, Routing.of(experts, 3)), atol=0.05, rtol=0.05)


def test_experts_start_as_linear_layers_do_and_decay_as_they_do():
    torch.manual_seed(0)
    layer = ExpertLinear(4, 64, 4096)
    assert layer.weight.std().item() == pytest.approx(
        nn.Linear(64, 4096).weight.std().item(), rel=0.02
    )
    assert layer.weight.abs().max() <= 1 / 8


def test_mixture_mse_by_hand():
    prediction, target = torch.randn(B, 2 * R, T, A), torch.randn(B, R, T, A)
    weights, ignored = torch.rand(B, 2), torch.rand(B, R, T) < 0.3
    weights = weights / weights.sum(1, keepdim=True)
    total = 0.0
    soft = 0.0
    for b in range(B):
        for r in range(R):
            errors = []
            for k in range(2):
                square = (prediction[b, k * R + r] - target[b, r]) ** 2
                errors.append(square[~ignored[b, r]].sum() / (T * A))
            total += (weights[b, 0] * errors[0] + weights[b, 1] * errors[1]) / (B * R)
            likelihood = sum(
                w * math.exp(-e / (2 * 0.3**2)) for w, e in zip(weights[b], errors, strict=True)
            )
            soft += -2 * 0.3**2 * math.log(likelihood) / (B * R)
    torch.testing.assert_close(mixture_mse(prediction, target, ignored, weights), total)
    assert mixture_mse(prediction, target, ignored, weights, 0.3).item() == pytest.approx(
        soft, rel=1e-4
    )
    one = prediction[:, :R]
    expected = masked_mse(one, target, ignored)
    for sigma in (None, 0.5):
        torch.testing.assert_close(
            mixture_mse(one, target, ignored, torch.ones(1, 1), sigma), expected
        )


def test_a_sharp_mixture_gives_the_sample_to_the_expert_that_explains_it():
    prediction, target = torch.randn(B, 2, T, A), torch.randn(B, 1, T, A)
    weights = torch.full((B, 2), 0.5, requires_grad=True)
    ignored = torch.zeros(B, 1, T, dtype=torch.bool)
    mixture_mse(prediction, target, ignored, weights, 0.05).backward()
    error = (prediction - target).square().mean((-2, -1))
    assert torch.equal(weights.grad.argmin(1), error.argmin(1))  # most is to be gained there


def test_load_balance_and_router_z_by_hand():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8], [0.5, 0.4, 0.1]])
    loss, shares = load_balance(p)
    assert shares.tolist() == [0.75, 0.0, 0.25]
    assert loss.item() == pytest.approx(3 * (0.75 * 1.9 / 4 + 0.25 * 1.1 / 4))
    assert load_balance(torch.eye(3))[0].item() == pytest.approx(1.0)
    assert load_balance(torch.tensor([[1.0, 0, 0]] * 3))[0].item() == pytest.approx(3.0)
    logits = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    expected = (math.log(2) ** 2 + math.log(math.e + math.e**3) ** 2) / 2
    assert router_z(logits).item() == pytest.approx(expected, rel=1e-5)


def test_information_by_hand():
    assert metrics.information(np.eye(4)) == pytest.approx(1.0)
    assert metrics.information(np.ones((6, 3))) == pytest.approx(0.0, abs=1e-12)
    assert metrics.information([[5, 0], [5, 0]]) == pytest.approx(0.0)
    assert metrics.information(np.zeros((3, 2))) is None
    table = np.array([[3, 1], [0, 4], [2, 2]]) / 12
    brute = sum(
        table[i, j] * math.log(table[i, j] / (table[i].sum() * table[:, j].sum()))
        for i in range(3)
        for j in range(2)
        if table[i, j]
    )
    assert metrics.information(table * 12) == pytest.approx(brute / math.log(2))


def test_experts_of_episodes():
    some = [
        evaluate.Episode(True, "a", experts=[0, 0]),
        evaluate.Episode(True, "a", experts=[0, 1]),
        evaluate.Episode(True, "b", experts=[1]),
        evaluate.Episode(False, "b", experts=[2]),
        evaluate.Episode(True, None, experts=[2]),
    ]
    found = metrics.experts(some, ("a", "b"), 3)
    assert found["experts"] == {"a": [1.5, 0.5, 0.0], "b": [0.0, 1.0, 0.0]}
    assert found["least_load"] == 0.0
    assert found["expert_information"] == pytest.approx(
        metrics.information([[1.5, 0.5, 0], [0, 1, 0]])
    )


@pytest.fixture
def trained(experiment):
    """(policy, batch) after two steps, every weight of it moved."""
    exp = experiment("train_vfp_moe")
    exp.main("train.total_steps=2", "data.augment=null")
    policy, data = exp.job.policy, exp.job.data
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.3 * torch.randn_like(p)
    return policy.eval(), to_device(data.windows[data.train_rows[:8]], torch.device("cpu"))


@torch.no_grad()
def test_the_table_is_the_gate_and_only_the_chosen_expert_runs(trained, monkeypatch):
    policy, batch = trained
    memory, x0 = policy.encode(batch), torch.randn(8, 6, 4)
    z = policy.latent(memory, Noise(1))
    logits, calls, rows = policy.parts["gate"](z), [], []
    gate, linear = Gate.forward, ExpertLinear.forward
    monkeypatch.setattr(Gate, "forward", lambda self, zq: calls.append(len(zq)) or gate(self, zq))
    monkeypatch.setattr(
        ExpertLinear, "forward", lambda self, x, c: rows.append(c.sum(0)) or linear(self, x, c)
    )
    found = policy.sample(memory, x0, 3, z)
    assert torch.equal(policy.sample(memory, x0, 3, z), found)
    assert calls == [len(policy.codebook.codes)]  # once for all codes, and never again
    experts, weights = choose_experts(policy.gate_logits(z), 2)
    assert torch.equal(experts, logits.topk(2).indices)
    torch.testing.assert_close(weights, logits.topk(2).values.softmax(-1))
    best = logits.argmax(-1)
    assert torch.equal(policy.chosen_expert(z), best)
    chosen = torch.bincount(best, minlength=3).float()
    assert all(torch.equal(counts, chosen) for counts in rows)
    decoder = policy.parts["moe_action_decoder"]
    context = decoder.context(memory=memory.tokens, z=z, experts=best[:, None])

    def velocity(x, t):
        return decoder(x_t=x[:, None], t=x.new_full((8, 1), t), context=context)[:, 0]

    expected = policy.stats.denormalize("action", euler(velocity, x0, 3))
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_two_experts_at_inference_are_weighted_by_the_gate(trained):
    policy, batch = trained
    memory, x = policy.encode(batch), torch.randn(8, 6, 4)
    z = policy.latent(memory, Noise(1))
    logits, decoder = policy.parts["gate"](z), policy.parts["moe_action_decoder"]
    best = logits.topk(2).indices
    weights = logits.gather(1, best).softmax(-1)
    policy.sampling.experts = 2
    found = policy.sample(memory, x, 3, z)
    for k in range(3):
        t = torch.full((8, 1), k / 3)
        first, second = (
            answer(decoder, x[:, None], t, memory.tokens, z, best[:, [i]])[:, 0] for i in (0, 1)
        )
        x = x + (weights[:, 0, None, None] * first + weights[:, 1, None, None] * second) / 3
    torch.testing.assert_close(found, policy.stats.denormalize("action", x), atol=1e-4, rtol=1e-4)


def test_the_terms_of_the_loss_and_what_moves_the_gate(trained):
    policy, batch = trained
    loss, scalars = policy(batch | {"noise": Noise(0), "progress": 0.5})
    expected = scalars["flow"] + 0.25 * scalars["commitment"] + scalars["prior"]
    torch.testing.assert_close(
        loss.detach(), expected + 0.01 * scalars["balance"] + 0.001 * scalars["router_z"]
    )
    assert sum(scalars[f"load/{i}"] for i in range(3)) == pytest.approx(1.0)
    policy.weights.load_balance = policy.weights.router_z = policy.weights.commitment = 0.0
    policy.train()(batch | {"noise": Noise(0), "progress": 0.5})[0].backward()
    assert any(
        p.grad.any() for p in policy.parts["gate"].parameters()
    )  # by what the experts' errors weigh
    assert policy.codebook.codes.grad.any()


def test_kot_moves_the_best_expert_of_prior_samples(experiment):
    exp = experiment("train_vfp_moe")
    assert (
        exp.main(
            "train.total_steps=2", "loss.sinkhorn={weight: 0.1}", "loss.top_k=3", "loss.sigma=0.5"
        )
        == 0
    )
    assert all(math.isfinite(x) for x in exp.log("kot").values())


def test_a_slow_posterior_is_what_the_prior_learns(experiment, monkeypatch):
    exp, own = experiment("train_vfp_moe"), []
    after = train_vfp_moe.Policy.after_step

    def watched(policy, job):
        own.append([p.detach().clone() for p in policy.parts["vqvae_posterior"].parameters()])
        after(policy, job)

    monkeypatch.setattr(train_vfp_moe.Policy, "after_step", watched)
    exp.main("train.total_steps=3", "loss.posterior_ema=0.25")
    policy = exp.job.policy
    expected = [p for name, p in exp.start.items() if name.startswith("parts.vqvae_posterior.")]
    for decay, now in zip((2 / 11, 3 / 12, 0.25), own, strict=True):
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, now, strict=True)]
    torch.testing.assert_close([p.detach() for p in policy.slow_posterior.parameters()], expected)
    name, p = next(policy.slow_posterior.named_parameters())
    saved = load_file(checkpoint.newest(exp.save_dir) / "resume/other.safetensors")
    assert torch.equal(saved[f"slow_posterior.{name}"], p)
    batch = to_device(exp.job.data.windows[exp.job.data.train_rows[:8]], torch.device("cpu"))
    with torch.no_grad():
        for p in policy.slow_posterior.parameters():
            p.normal_()
        _, scalars = policy.eval()(batch | {"noise": Noise(0), "progress": 0.5})
        memory, x1 = policy.encode(batch), policy.stats.normalize("action", batch["action"])
        codes = policy.codebook(
            policy.slow_posterior(**memory.latent_inputs, action=x1).tokens
        ).indices
        torch.testing.assert_close(
            scalars["prior"], policy.parts["vqvae_prior"](**memory.latent_inputs).loss(codes)
        )


def test_expert_weights_decay_and_their_biases_do_not(experiment):
    exp = experiment("train_vfp_moe")
    exp.main("train.total_steps=1", "train.optim={peak_lr: 1e-3, weight_decay: 0.1}")
    (optimizer,) = optim.build(exp.job.policy.parts, exp.job.cfg)
    decayed = {
        id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]
    }
    for module in exp.job.policy.modules():
        if isinstance(module, ExpertLinear):
            assert id(module.weight) in decayed
            assert id(module.bias) not in decayed
    assert id(exp.job.policy.codebook.codes) not in decayed


def test_gate_and_decoder_must_agree(experiment):
    exp = experiment("train_vfp_moe")
    gate = exp.folder / "gate.yaml"
    gate.write_text(gate.read_text().replace("experts: 3", "experts: 5"))
    with pytest.raises(
        ConfigError,
        match=r"gate has experts: 5, moe_action_decoder has experts: 3; make them equal",
    ):
        exp.main("train.total_steps=1")
    del exp.config["model"]["component_config_paths"]["gate"]
    exp.write()
    with pytest.raises(ConfigError, match="this policy needs gate; listed: backbone"):
        exp.main("train.total_steps=1")


def test_more_experts_than_there_are_is_an_error(experiment):
    exp = experiment("train_vfp_moe")
    for key in ("loss.top_k", "sampling.experts"):
        with pytest.raises(ConfigError, match=f"{key}: 4 experts asked for, there are 3"):
            exp.main("train.total_steps=1", f"{key}=4")
    exp.main("train.total_steps=1")
    with pytest.raises(UserError, match="experts: 4 experts asked for, there are 3"):
        evaluate.main(["--checkpoint", str(exp.save_dir), "--experts", "4"])


def test_evaluation_of_a_mixture_tells_which_expert_drives_which_mode(tmp_path):
    """avoid for a few steps, through the command line."""
    config = ROOT / "configs/variational_flow_matching_policy/avoid/train.yaml"
    run = tmp_path / "run"
    train_vfp_moe.main(["--config", str(config), f"train.save_dir={run}", "train.total_steps=200"])
    argv = [
        "--checkpoint",
        str(run),
        "--env",
        "avoid",
        "--replan_steps",
        "25",
        "--episodes",
        "40",
        "--nfe",
        "10",
    ]
    assert evaluate.main([*argv, "--out", str(tmp_path / "results"), "--videos", "0"]) == 0
    (row,) = json.loads((tmp_path / "results/results.json").read_text())["results"]
    assert {len(shares) for shares in row["experts"].values()} == {4}
    assert sum(map(sum, row["experts"].values())) == pytest.approx(sum(row["modes"].values()))
    assert (tmp_path / "results/experts.png").stat().st_size > 5000


def test_only_a_mixture_has_experts_to_choose(experiment, tmp_path):
    for script, sampling in (("train_vfp", {}), ("train_vfp_moe", {"experts": 1})):
        exp = experiment(script, script)
        exp.main("train.total_steps=1")
        argv = ["--checkpoint", str(exp.save_dir), "--nfe", "1", "--out", str(tmp_path / script)]
        evaluate.main(argv)
        results = json.loads((tmp_path / script / "results.json").read_text())
        assert results["sampling"] == sampling
        if not sampling:
            with pytest.raises(UserError, match=r"--experts: .* holds a policy without it"):
                evaluate.main([*argv, "--experts", "2"])


def test_the_negative_control_trains_and_is_evaluated(tmp_path):
    script = ROOT / "benchmarks/research_objective.py"
    spec = importlib.util.spec_from_file_location("research_objective", script)
    control = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(control)
    assert inspect.getsource(control.main) == inspect.getsource(train_vfp_moe.main)
    config = ROOT / "configs/variational_flow_matching_policy/avoid/train_research.yaml"
    run = tmp_path / "run"
    control.main(
        [
            "--config",
            str(config),
            f"train.save_dir={run}",
            "train.total_steps=2",
            "train.log_every=1",
        ]
    )
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(
        line["loss"] == pytest.approx(line["flow"] + line["prior"], rel=1e-5)
        for line in lines
        if "flow" in line
    )
    argv = [
        "--checkpoint",
        str(run),
        "--env",
        "avoid",
        "--episodes",
        "4",
        "--nfe",
        "1",
        "--videos",
        "0",
        "--script",
        str(script),
    ]
    assert evaluate.main([*argv, "--out", str(tmp_path / "results")]) == 0
    assert "experts" in json.loads((tmp_path / "results/results.json").read_text())["results"][0]


def test_exp1_at_full_size_without_allocating_anything():
    folder = ROOT / "configs/variational_flow_matching_policy"
    for name in ("exp1", "exp2"):
        cfg = configured(name, train_vfp_moe, folder)
        policy, memory, z, velocity = on_meta(cfg, train_vfp_moe)
        assert memory.shape[2] == 768
        assert (z.shape, velocity.shape) == ((2, 1, 64), (2, 40, 24))
        named = {Path(path).stem for path in cfg.model.component_config_paths.values()}
        assert {path.stem for path in (folder / "exp1").iterdir()} >= named
        assert policy.parts.frozen == {"da3"}
