"""The protocol of all policies, every key of their losses, configs given to the wrong script."""

import copy
import importlib
import typing
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import POLICIES
from helpers import CAMERAS, ROWS, NoAverage, tiny_batch, tiny_policy

from common.config import ConfigError
from common.data.images import IMAGE
from common.distributions import Gaussian
from common.flow import decoder_velocity
from common.noise import Noise
from common.policy import ActionPolicy, Memory
from common.schema import Sinkhorn

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
T, A = 6, 4
SCRIPTS = ("train_flow_matching", "train_vfp", "train_vfp_moe", "train_cfg_vqvae")


def components(script):
    """Tiny components of a script, with a decoder that can continue a prefix, without dropout."""
    found = copy.deepcopy(POLICIES[script])
    for name, component in found.items():
        component["args"].pop("dropout", None)
        if name.endswith("action_decoder") and script != "train_mi":
            component["args"]["prefix"] = True
    return found


def policy_of(script, loss=None, sampling=None, change=None):
    made = components(script)
    for name, args in (change or {}).items():
        made[name]["args"] |= args
    return tiny_policy(importlib.import_module(script), made, loss, sampling)


def awake(policy):
    """The policy in eval mode with every weight moved, as after some training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.2 * torch.randn_like(p)
    return policy.eval()


# every key of `loss`

STEPS = 4
SINKHORN = {
    "sinkhorn": None,
    "sinkhorn.weight": 0.5,
    "sinkhorn.lam_state": 0.5,
    "sinkhorn.blur": 0.5,
    "sinkhorn.iterations": 3,
    "sinkhorn.solver": "exact",
}
FLOW = {"target": "x1", "draws": 2, "camera_dropout": 0.9, "prefix": 3}
CODES = {
    "commitment": 1.0,
    "prior": 0.3,
    "label_smoothing": 0.3,
    "posterior_ema": 0.05,
    "kmeans_start": False,
    "revive_every": 3,
    "revive_until": 0.1,
    **SINKHORN,
}
OTHER_VALUES = {  # script -> key of its loss -> a legal value that `BASE` and the defaults lack
    "train_flow_matching": FLOW,
    "train_vfp": FLOW | {"kl": 3.0, "kl_warmup": 1.0, "balance": 0.3, "free_nats": 50.0} | SINKHORN,
    "train_vfp_moe": FLOW
    | CODES
    | {"top_k": 1, "sigma": 0.5, "load_balance": 0.5, "router_z": 0.5, "kmeans_start": True},
    "train_cfg_vqvae": FLOW | CODES | {"cond_drop_prob": 0.9, "cond_drop_from": 0.6},
    "train_mi": {"picture": 1.0, "state_beta": 0.5, "action_beta": 1.0, "warmup": 1.0},
}
BASE = {  # settings under which each key can have an effect
    "train_flow_matching": {},
    "train_vfp": {"sinkhorn": {}},
    "train_vfp_moe": {"sinkhorn": {}, "revive_every": 1},
    "train_cfg_vqvae": {"sinkhorn": {}, "revive_every": 1, "cond_drop_prob": 0.5},
    "train_mi": {},
}


def keys_of_loss(script):
    """All keys of a script's `loss:`, those of its Sinkhorn section too."""
    loss = typing.get_type_hints(importlib.import_module(script).Config)["loss"]
    keys = [field.name for field in fields(loss)]
    if "sinkhorn" in keys:
        keys += [f"sinkhorn.{field.name}" for field in fields(Sinkhorn)]
    return keys


def with_key(loss, key, value):
    section, _, inner = key.rpartition(".")
    return loss | ({section: loss[section] | {inner: value}} if section else {key: value})


def trained(script, loss):
    """The losses and scalars of some training steps, and all of the policy's state after them."""
    policy = policy_of(script, loss).train()
    batch = tiny_batch()
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    if "vqvae_codebook" in policy.parts:
        policy.codebook.usage[:2] = 0.0  # idle codes
    computed = []
    for step in range(STEPS):
        noise = Noise("step", step)
        value, scalars = policy(batch | {"noise": noise, "progress": step / STEPS})
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        job = SimpleNamespace(
            step=step + 1,
            total=STEPS,
            cfg=SimpleNamespace(seed=0),
            device=torch.device("cpu"),
            optimizers=[optimizer],
            average=NoAverage,
            is_main=False,
        )
        policy.after_step(job)
        computed.append({"value": value.detach(), **scalars})
    return computed, policy.state_dict()


@pytest.fixture(scope="module")
def base():
    """Script -> what it computes with BASE."""
    return {script: trained(script, loss) for script, loss in BASE.items()}


def equal(a, b):
    """Whether two nests of tensors are the same to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return all(equal(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b)


@pytest.mark.parametrize("script", BASE)
def test_no_key_of_a_loss_is_left_out_below(script):
    assert sorted(OTHER_VALUES[script]) == sorted(keys_of_loss(script))


@pytest.mark.parametrize("script", BASE)
def test_training_repeats_bit_for_bit(base, script):
    assert equal(trained(script, BASE[script]), base[script])


@pytest.mark.parametrize(
    ("script", "key"), [(script, key) for script in BASE for key in OTHER_VALUES[script]]
)
def test_every_key_of_a_loss_changes_the_training(base, script, key):
    loss = with_key(BASE[script], key, OTHER_VALUES[script][key])
    assert not equal(trained(script, loss), base[script])


def test_a_key_that_a_prior_of_another_kind_ignores_is_an_error():
    batch = tiny_batch()
    for head in ("flow", "point"):
        policy = policy_of("train_vfp", {"balance": 0.5}, change={"vae_prior": {"head": head}})
        with pytest.raises(ConfigError, match=r"loss.balance: shares the KL .* set it to null"):
            policy.check(batch)
        policy_of("train_vfp", change={"vae_prior": {"head": head}}).check(batch)
    policy_of("train_vfp", {"balance": 0.5}).check(batch)
    point = {"vqvae_prior": {"head": "point", "latent_dim": 4}}
    for script in ("train_vfp_moe", "train_cfg_vqvae"):
        policy = policy_of(script, {"label_smoothing": 0.1}, change=point)
        with pytest.raises(ConfigError, match=r"loss.label_smoothing: 0.1 .* set it to 0"):
            policy.check(batch)
        policy_of(script, {"label_smoothing": 0.0}, change=point).check(batch)


def test_components_that_do_not_fit_each_other():
    batch = tiny_batch()
    wide = {"vqvae_posterior": {"latent_dim": 5}}
    for script in ("train_vfp_moe", "train_cfg_vqvae"):
        with pytest.raises(ConfigError, match="vqvae_posterior has latent_dim: 5"):
            policy_of(script, change=wide).check(batch)
    with pytest.raises(ConfigError, match="vae_prior draws 2 tokens of 5 numbers"):
        policy_of("train_vfp", change={"vae_prior": {"latent_dim": 5}}).check(batch)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_prefix_as_long_as_the_chunk_is_an_error(script):
    policy_of(script, {"prefix": T - 1})
    with pytest.raises(ConfigError, match=f"loss.prefix: {T} given actions may leave nothing"):
        policy_of(script, {"prefix": T})


# the protocol


@pytest.fixture(params=SCRIPTS)
def script(request):
    return request.param


@torch.no_grad()
def test_shapes_of_the_protocol(script):
    policy, batch = awake(policy_of(script)), tiny_batch()
    assert isinstance(policy, ActionPolicy)
    observation = {key: x for key, x in batch.items() if key.startswith("observation.")}
    memory = policy.encode(observation)
    assert isinstance(memory, Memory)
    assert memory.tokens.shape == (ROWS, 3 * 2 * 2 + 3 + 3, 16)
    assert memory.latent_inputs["cond_proprio"].shape == (ROWS, 3, 5)
    z = policy.latent(memory, Noise(0))
    x1 = policy.stats.normalize("action", batch["action"])
    posterior = policy.posterior_latent(memory, x1, Noise(0))
    if policy.has_latent:
        shape = (ROWS, 1 if script == "train_vfp_moe" else 2, 4)
        assert z.shape == posterior.shape == shape
        assert torch.equal(policy.latent(memory, Noise(0)), z)
    else:
        assert z is None
        assert posterior is None
    expert = policy.chosen_expert(z)
    if policy.experts == 1:
        assert expert is None
    else:
        assert expert.shape == (ROWS,)
        assert policy.experts == 3
    x = torch.randn(ROWS, T, A)
    velocity = policy.velocity(x, 0.3, policy.context(memory, z))
    assert velocity.shape == (ROWS, T, A)
    chunk = policy.sample(memory, x, 2, z)
    assert chunk.shape == (ROWS, T, A)
    assert chunk.dtype == torch.float32
    torch.manual_seed(0)
    drawn = policy.sample(memory, x, 2)
    assert drawn.shape == (ROWS, T, A)
    if policy.has_latent:
        assert not torch.equal(drawn, policy.sample(memory, x, 2))  # another z of the prior


@torch.no_grad()
def test_rows_do_not_depend_on_each_other(script):
    policy, batch = awake(policy_of(script)), tiny_batch()
    x0 = torch.randn(ROWS, T, A)
    memory = policy.encode(batch)
    z = policy.latent(memory, Noise(0))
    chunk = policy.sample(memory, x0, 2, z)
    one = {key: x[5:6] for key, x in batch.items()}
    alone = policy.sample(policy.encode(one), x0[5:6], 2, None if z is None else z[5:6])
    torch.testing.assert_close(alone, chunk[5:6], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_hidden_camera_does_not_reach_the_memory(script):
    policy, batch = awake(policy_of(script)), tiny_batch()
    mask = torch.zeros(ROWS, 3, dtype=torch.bool)
    mask[2, 1] = True
    other = batch | {IMAGE + CAMERAS[1]: torch.rand(ROWS, 3, 32, 32)}
    change = policy.encode(other, mask).tokens - policy.encode(batch, mask).tokens
    assert (change.abs().amax((1, 2)) > 1e-5).tolist() == [row != 2 for row in range(ROWS)]


@pytest.mark.parametrize("target", ["velocity", "x1"])
@torch.no_grad()
def test_sampling_is_the_euler_loop_over_the_velocity(script, target):
    policy, batch = awake(policy_of(script, {"target": target})), tiny_batch()
    memory = policy.encode(batch)
    z = policy.latent(memory, Noise(0))
    x = x0 = torch.randn(ROWS, T, A)
    context = policy.context(memory, z)
    for t in (0.0, 0.25, 0.5, 0.75):
        x = x + policy.velocity(x, t, context) / 4
    found = policy.sample(memory, x0, 4, z)
    torch.testing.assert_close(found, policy.stats.denormalize("action", x), atol=1e-6, rtol=0)
    assert (x - x0).abs().max() > 0.1


@pytest.mark.parametrize("target", ["velocity", "x1"])
@torch.no_grad()
def test_the_velocity_is_the_decoder_s_by_its_target(script, target):
    """Of the decoder's prediction p: p itself, or (p - x) / (1 - t)."""
    policy, batch = awake(policy_of(script, {"target": target})), tiny_batch()
    memory = policy.encode(batch)
    z = policy.latent(memory, Noise(0))
    x = torch.randn(ROWS, T, A)
    decoder = policy.parts[policy.decoder]
    inputs = {"memory": memory.tokens, "z": z}
    if policy.experts > 1:
        inputs["experts"] = policy.chosen_expert(z)[:, None]
    t = torch.full((ROWS, 1), 0.25)
    predicted = decoder(x_t=x[:, None], t=t, context=decoder.context(**inputs))[:, 0]
    expected = predicted if target == "velocity" else (predicted - x) / 0.75
    found = policy.velocity(x, 0.25, policy.context(memory, z))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("given", [0, 1, 3])
@pytest.mark.parametrize("target", ["velocity", "x1"])
@torch.no_grad()
def test_a_prefix_is_kept_and_the_rest_continues_it(script, target, given):
    policy, batch = awake(policy_of(script, {"target": target, "prefix": 3})), tiny_batch()
    memory = policy.encode(batch)
    z = policy.latent(memory, Noise(0))
    x0 = torch.randn(ROWS, T, A)
    prefix = batch["action"][:, :given]
    chunk = policy.sample(memory, x0, 4, z, prefix=prefix)
    torch.testing.assert_close(chunk[:, :given], prefix)
    mask = torch.arange(T) < given
    context = policy.context(memory, z)
    x = torch.cat([policy.stats.normalize("action", prefix), x0[:, given:]], 1)
    for k in range(4):
        velocity = policy.velocity(x, k / 4, context, mask)
        assert not velocity[:, :given].any()
        x = x + velocity / 4
    torch.testing.assert_close(chunk, policy.stats.denormalize("action", x), atol=1e-6, rtol=0)
    moved = policy.sample(memory, x0, 4, z, prefix=prefix + 1)
    assert torch.equal(moved[:, given:], chunk[:, given:]) == (given == 0)


class Straight(ActionPolicy):
    """A policy whose decoder knows the data: for closed forms of sampling."""

    def __init__(self, x1, target):
        torch.nn.Module.__init__(self)
        stats = policy_of("train_flow_matching").stats
        self.stats = stats
        self.x1 = stats.normalize("action", x1)
        self.weights = SimpleNamespace(target=target)
        self.asked = []

    def context(self, memory, z):
        return None

    def velocity(self, x, t, context, prefix_mask=None):
        def decode(x_t, t, context, prefix_mask):
            self.asked.append(prefix_mask)
            remaining = (self.x1[:, None] - x_t) / (1 - t[..., None, None])
            return self.x1[:, None] if self.weights.target == "x1" else remaining

        return decoder_velocity(decode, context, x, t, self.weights.target, prefix_mask)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("target", ["velocity", "x1"])
@torch.no_grad()
def test_sampling_ends_at_the_data_of_a_perfect_decoder(target, steps):
    x1 = tiny_batch()["action"]
    policy, x0 = Straight(x1, target), torch.randn(ROWS, T, A)
    torch.testing.assert_close(policy.sample(None, x0, steps), x1)
    assert policy.asked == [None] * steps
    prefix = x1[:, :2] + 0.5
    policy.asked.clear()
    chunk = policy.sample(None, x0, steps, prefix=prefix)
    torch.testing.assert_close(chunk, torch.cat([prefix, x1[:, 2:]], 1))
    assert len(policy.asked) == steps
    assert all(mask.shape == (ROWS, 1, T) for mask in policy.asked)


@torch.no_grad()
def test_the_loss_in_eval_mode_hides_and_drops_nothing(script):
    loss = {"camera_dropout": 1.0}
    if script == "train_cfg_vqvae":
        loss["cond_drop_prob"] = 1.0
    policies = [policy_of(script, weights) for weights in (loss, {"camera_dropout": 0.0})]
    batch = tiny_batch() | {"progress": 1.0}
    losses = [awake(p)(batch | {"noise": Noise(0)})[1] for p in policies]
    assert equal(*losses)
    in_training = [p.train()(batch | {"noise": Noise(0)})[1] for p in policies]
    assert not equal(*in_training)


# guidance and experts


@torch.no_grad()
def test_guidance_weighs_conditional_and_null():
    """A single Euler step is x0 + null + w (conditional - null): a line in w."""
    policy, batch = awake(policy_of("train_cfg_vqvae")), tiny_batch()
    memory, x0 = policy.encode(batch), 0.1 * torch.randn(ROWS, T, A)
    z = policy.latent(memory, Noise(0))
    ends = {}
    for w in (0.0, 0.5, 1.0, 2.0):
        policy.sampling.guidance = w
        ends[w] = policy.stats.normalize("action", policy.sample(memory, x0, 1, z))
    null = policy.codebook.null.expand_as(z)
    null_velocity = policy.velocity(x0, 0.0, policy.context(memory, null))
    velocity = policy.velocity(x0, 0.0, policy.context(memory, z))
    close = {"atol": 1e-4, "rtol": 1e-4}
    for w, end in ends.items():
        expected = x0 + null_velocity + w * (velocity - null_velocity)
        torch.testing.assert_close(end, expected, **close)
    assert (ends[2.0] - ends[1.0]).abs().max() > 1e-2


@torch.no_grad()
def test_a_prefix_is_kept_under_guidance():
    policy, batch = awake(policy_of("train_cfg_vqvae", {"prefix": 2})), tiny_batch()
    policy.sampling.guidance = 2.0
    memory, prefix = policy.encode(batch), batch["action"][:, :2]
    chunk = policy.sample(memory, torch.randn(ROWS, T, A), 3, prefix=prefix)
    torch.testing.assert_close(chunk[:, :2], prefix)


@torch.no_grad()
def test_two_experts_are_weighted_by_the_gate():
    policy, batch = awake(policy_of("train_vfp_moe")), tiny_batch()
    memory, x = policy.encode(batch), torch.randn(ROWS, T, A)
    z = policy.latent(memory, Noise(0))
    best, experts = policy.parts["gate"](z).topk(2)
    weights = best.softmax(-1)
    decoder = policy.parts["moe_action_decoder"]
    t = torch.full((ROWS, 1), 0.5)
    expected = torch.zeros_like(x)
    for k in range(2):
        context = decoder.context(memory=memory.tokens, z=z, experts=experts[:, k : k + 1])
        velocity = decoder(x_t=x[:, None], t=t, context=context)[:, 0]
        expected += weights[:, k, None, None] * velocity
    policy.sampling.experts = 2
    found = policy.velocity(x, 0.5, policy.context(memory, z))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(policy.chosen_expert(z), experts[:, 0])
    policy.sampling.experts = 1
    assert not torch.allclose(policy.velocity(x, 0.5, policy.context(memory, z)), found)


@torch.no_grad()
def test_the_posterior_s_latent_comes_from_the_chunk():
    for script in SCRIPTS[1:]:
        policy, batch = awake(policy_of(script)), tiny_batch()
        memory = policy.encode(batch)
        x1 = policy.stats.normalize("action", batch["action"])
        name = "vae_posterior" if script == "train_vfp" else "vqvae_posterior"
        posterior = policy.parts[name](**memory.latent_inputs, action=x1)
        found = policy.posterior_latent(memory, x1, Noise(0))
        if isinstance(posterior, Gaussian):
            assert torch.equal(found, posterior.sample(Noise(0)))
        else:
            nearest = torch.cdist(posterior.tokens, policy.codebook.codes).argmin(-1)
            assert torch.equal(found, policy.codebook.codes[nearest])


# configs of another script

OWNERS = {
    "cfg_vqvae_flow_matching": "train_cfg_vqvae",
    "mutual_information_estimator": "train_mi",
    "naive_flow_matching_policy": "train_flow_matching",
    "variational_flow_matching_policy": "train_vfp_moe",
    "vfp_single_expert": "train_vfp",
}
SHIPPED = {
    path: OWNERS[path.parts[-3]]
    for path in sorted((ROOT / "configs").glob("*/avoid/train*.yaml"))
    if path.name != "train_research.yaml"  # of benchmarks/research_objective.py
}


@pytest.mark.parametrize("script", [*SCRIPTS, "train_mi"])
def test_a_config_of_another_script_names_it(script):
    main = importlib.import_module(script).main
    others = [path for path, owner in SHIPPED.items() if owner != script]
    assert len(others) >= 4
    for path in others:
        with pytest.raises(ConfigError) as caught:
            main(["--config", str(path)])
        message = str(caught.value)
        assert message.endswith(f": this is a config of {SHIPPED[path]}.py")
        assert message.startswith(str(path))
        assert "\n" not in message
