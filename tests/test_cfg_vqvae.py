"""cfg_vqvae_flow_matching: guidance, null tokens, the prior, codebook, slow posterior."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers import NoAverage, configured, on_meta

import evaluate
import train_cfg_vqvae
from common import optim
from common.blocks.mlp import MLPActionDecoder
from common.blocks.transformer import ActionDecoder
from common.blocks.vq import Codebook
from common.config import ConfigError
from common.data.loader import to_device
from common.distributions import Codes, latent_head
from common.flow import decoder_velocity, euler, guided
from common.noise import Noise

torch.set_num_threads(1)
B, T, A, D = 3, 5, 2, 4
OTHERS = ("backbone", "info_encoder", "vqvae_posterior", "vqvae_codebook", "action_decoder")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["transformer", "mlp"])
def decoder(request):
    """A decoder whose every weight matters, and a memory for it."""
    if request.param == "mlp":
        made, memory = MLPActionDecoder(16, 2, 8, A, T, latent_size=2 * D), torch.randn(B, 1, 8)
    else:
        made, memory = ActionDecoder(16, 2, 32, 2, A, latent_dim=D), torch.randn(B, 7, 16)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return made.eval(), memory


def test_several_latents_share_one_memory(decoder):
    made, memory = decoder
    z, x, t = torch.randn(2 * B, 2, D), torch.randn(2 * B, 1, T, A), torch.rand(2 * B, 1)
    both = made(x, t, made.context(memory, z))
    for part in (slice(B), slice(B, None)):
        alone = made(x[part], t[part], made.context(memory, z[part]))
        torch.testing.assert_close(both[part], alone)


@pytest.mark.parametrize("target", ["velocity", "x1"])
@torch.no_grad()
def test_guidance_is_a_line_through_two_velocities(decoder, target):
    made, memory = decoder
    z, null, x, t = torch.randn(B, 2, D), torch.randn(B, 2, D), torch.randn(B, T, A), 0.3

    def velocity(latents):
        context = made.context(memory, latents)

        def of(x, t, prefix_mask=None):
            return decoder_velocity(made, context, x, t, target, prefix_mask)

        return of

    conditional, unconditional = velocity(z)(x, t), velocity(null)(x, t)
    both = velocity(torch.cat([z, null]))
    for w in (0.0, 0.5, 1.0, 3.0):
        expected = unconditional + w * (conditional - unconditional)
        torch.testing.assert_close(guided(both, w)(x, t), expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def trained(experiment):
    """(policy, batch): after a few steps, every weight of it moved, and what it was trained on."""
    exp = experiment("train_cfg_vqvae")
    exp.main("train.total_steps=2", "data.augment=null")
    policy, data = exp.job.policy, exp.job.data
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.1 * torch.randn_like(p)
    batch = to_device(data.windows[data.train_rows[:8]], torch.device("cpu"))
    return policy.eval(), batch


def sample(policy, memory, x0, steps, z, w=None):
    if w is not None:
        policy.sampling.guidance = w
    return policy.sample(memory, x0, steps, z)


@torch.no_grad()
def test_w_of_one_is_the_conditional_and_costs_no_null_branch(trained):
    policy, batch = trained
    memory, x0, sizes = policy.encode(batch), torch.randn(8, 6, 4), []
    z = policy.latent(memory, Noise(1))
    decoder, target = policy.parts["action_decoder"], policy.weights.target
    context = decoder.context(memory=memory.tokens, z=z)
    x1 = euler(lambda x, t: decoder_velocity(decoder, context, x, t, target), x0, 4)
    plain = policy.stats.denormalize("action", x1)
    forward = ActionDecoder.forward

    def counted(self, x_t, *rest, **named):
        sizes.append(len(x_t))
        return forward(self, x_t, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActionDecoder, "forward", counted)
        assert torch.equal(sample(policy, memory, x0, 4, z), plain)  # the default
        assert torch.equal(sample(policy, memory, x0, 4, z, w=1.0), plain)
        assert sizes == [8] * 8
        guided = sample(policy, memory, x0, 4, z, w=2.0)
        assert sizes[8:] == [16] * 4
        unconditional = sample(policy, memory, x0, 4, z, w=0.0)
        assert sizes[12:] == [8] * 4
    assert not torch.allclose(guided, plain)
    assert torch.equal(policy.sample(memory, x0, 4, torch.randn_like(z)), unconditional)
    assert not torch.allclose(unconditional, plain)


@torch.no_grad()
def test_guided_sampling_is_the_guided_flow(trained):
    """Against two separate calls per step, integrated here."""
    policy, batch = trained
    memory, x = policy.encode(batch), torch.randn(8, 6, 4)
    z, decoder, w = policy.latent(memory, Noise(1)), policy.parts["action_decoder"], 1.7
    found = sample(policy, memory, x, 3, z, w)
    null = policy.codebook.null.expand_as(z)
    contexts = [decoder.context(memory=memory.tokens, z=latent) for latent in (z, null)]
    for k in range(3):
        t = torch.full((8, 1), k / 3)
        conditional, unconditional = (
            decoder(x_t=x[:, None], t=t, context=context)[:, 0] for context in contexts
        )
        x = x + (unconditional + w * (conditional - unconditional)) / 3
    torch.testing.assert_close(found, policy.stats.denormalize("action", x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("probability", "progress", "share"), [(0.3, 0.5, 0.3), (0.3, 0.01, 0.0), (1.0, 0.02, 1.0)]
)
def test_codes_are_dropped_with_their_probability(
    trained, monkeypatch, probability, progress, share
):
    policy, batch = trained
    policy.weights.cond_drop_prob = probability
    policy.weights.camera_dropout = 0.0
    given = []
    with_latent = ActionDecoder.with_latent
    monkeypatch.setattr(
        ActionDecoder,
        "with_latent",
        lambda self, context, z: given.append(z) or with_latent(self, context, z),
    )
    for step in range(100):
        policy.train()(batch | {"noise": Noise(step), "progress": progress})
    is_null = (torch.cat(given) == policy.codebook.null).flatten(1)
    dropped = is_null.all(1)
    assert not is_null.any(1)[~dropped].any()  # all tokens of a sample, or none
    assert abs(dropped.float().mean().item() - share) < (0.05 if 0 < share < 1 else 1e-6)
    policy.eval()(batch | {"noise": Noise(0), "progress": progress})
    assert not (given[-1] == policy.codebook.null).any()


def test_only_the_posterior_decoder_and_codes_get_the_flow_s_gradient_and_the_prior_its_own(
    trained,
):
    policy, batch = trained
    policy.weights.prior = 0.0
    for module in policy.train().modules():
        module.p = 0.0  # of dropout
    policy(batch | {"noise": Noise(0), "progress": 0.0})[0].backward()
    assert not any(p.grad.any() for p in policy.parts["vqvae_prior"].parameters())
    assert policy.parts["vqvae_codebook"].block.codes.grad.any()
    others = {name: [p.grad.clone() for p in policy.parts[name].parameters()] for name in OTHERS}
    assert all(any(grad.any() for grad in grads) for grads in others.values())
    policy.zero_grad()
    policy.weights.prior = 5.0
    policy(batch | {"noise": Noise(0), "progress": 0.0})[0].backward()
    assert any(p.grad.any() for p in policy.parts["vqvae_prior"].parameters())
    for name, grads in others.items():
        for p, grad in zip(policy.parts[name].parameters(), grads, strict=True):
            assert torch.equal(p.grad, grad)
    assert not any(p.requires_grad for p in policy.slow_posterior.parameters())


def test_the_slow_posterior_follows_and_its_codes_are_what_the_prior_learns(
    experiment, monkeypatch
):
    exp = experiment("train_cfg_vqvae")
    slow, own, seen = [], [], []
    after = train_cfg_vqvae.Policy.after_step

    def watched(policy, job):
        own.append([p.detach().clone() for p in policy.parts["vqvae_posterior"].parameters()])
        after(policy, job)
        slow.append([p.clone() for p in policy.slow_posterior.parameters()])

    loss = Codes.loss
    monkeypatch.setattr(train_cfg_vqvae.Policy, "after_step", watched)
    monkeypatch.setattr(
        Codes, "loss", lambda self, codes, *rest: seen.append(codes) or loss(self, codes, *rest)
    )
    exp.main("train.total_steps=4", "loss.posterior_ema=0.25", "train.micro_steps=1")
    expected = [
        p.clone() for name, p in exp.start.items() if name.startswith("parts.vqvae_posterior.")
    ]
    for decay, now, found in zip((2 / 11, 3 / 12, 0.25, 0.25), own, slow, strict=True):
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, now, strict=True)]
        torch.testing.assert_close(found, expected)
    policy = exp.job.policy
    batch = to_device(exp.job.data.windows[exp.job.data.train_rows[:8]], torch.device("cpu"))
    memory, x1 = policy.encode(batch), policy.stats.normalize("action", batch["action"])
    with torch.no_grad():
        for p in policy.slow_posterior.parameters():
            p.normal_()
        assert not policy.train().slow_posterior.training  # no dropout in what is to be predicted
        policy.code_chunks(memory, x1, Noise(0))
        z_e = policy.slow_posterior(**memory.latent_inputs, action=x1).tokens
    brute = ((z_e[:, :, None] - policy.codebook.codes) ** 2).sum(-1).argmin(-1)
    assert torch.equal(seen[-1], brute)


def test_the_prior_s_likelihood_sums_to_one_over_all_codes():
    slots, k = 3, 4
    head = latent_head("codes", 8, slots, None, k)
    torch.nn.init.normal_(head.embed)
    h = torch.randn(1, slots, 8)
    total = 0.0
    for codes in itertools.product(range(k), repeat=slots):
        total += (-slots * head(h).loss(torch.tensor([codes]))).exp().item()
    assert total == pytest.approx(1.0, abs=1e-5)


def test_smoothing_is_that_much_of_a_uniform_target():
    prior, codes = (
        latent_head("codes", 8, 1, None, 4)(torch.randn(6, 1, 8)),
        torch.randint(4, (6, 1)),
    )
    logp = prior.head.logits(prior.h, codes).log_softmax(-1)
    expected = -(0.9 * logp.gather(-1, codes[..., None])[..., 0] + 0.1 * logp.mean(-1)).mean()
    torch.testing.assert_close(prior.loss(codes, 0.1), expected)


def test_temperature_zero_is_the_most_likely_code_and_one_the_prior_s_own_draw():
    prior, codes = latent_head("codes", 8, 1, None, 4)(torch.randn(500, 1, 8)), torch.eye(4)
    logits = prior.head.logits(prior.h, torch.zeros(500, 1, dtype=torch.long))[:, 0].detach()
    with torch.no_grad():
        greedy, cold, plain = (
            prior.sample(Noise(0), codes, tau)[:, 0].argmax(-1) for tau in (0.0, 0.5, 1.0)
        )
    assert torch.equal(greedy, logits.argmax(-1))
    likely = [
        logits.softmax(-1).gather(1, drawn[:, None]).mean() for drawn in (greedy, cold, plain)
    ]
    assert likely[0] > likely[1] > likely[2]
    many = torch.cat(
        [prior.sample(Noise(i), codes, 0.5).detach()[:1, 0] for i in range(2000)]
    ).mean(0)
    torch.testing.assert_close(many, (logits[0] / 0.5).softmax(-1), atol=0.04, rtol=0)


def test_codes_start_at_the_centres_of_what_the_posterior_says(capsys):
    centres = 5 * torch.randn(6, D)
    z_e = (centres[torch.randint(6, (240,))] + 0.01 * torch.randn(240, D))[:, None]
    z_e[:6] = z_e[6]  # the first ones are of one centre
    book, far = Codebook(6, D), Codebook(300, D)
    adam = torch.optim.AdamW(book.parameters(), lr=0.0)
    book(z_e, Noise(0)).z.sum().backward()
    adam.step()
    moved = book.after_step(Noise(1), kmeans=True)
    optim.reset_rows([adam], NoAverage, book.codes, moved)
    assert (torch.cdist(centres, book.codes.detach()).amin(1) < 0.05).all()
    assert not adam.state[book.codes]["exp_avg"].any()
    before = far.codes.detach().clone()
    far(z_e, Noise(0))
    far.usage[:] = 1 / 300  # more codes than there are z_e: they stay as they are
    assert far.after_step(Noise(1), kmeans=True) is None
    assert torch.equal(far.codes, before)
    assert "300 codes start at random: a batch has only 240 points" in capsys.readouterr().out


def test_codes_of_a_file_are_not_moved_at_the_start(experiment):
    """The prior knows them by their numbers."""
    exp = experiment("train_cfg_vqvae")
    exp.main("train.total_steps=2")
    frozen = (
        "train.optim={peak_lr: 0.0, start_lr: 0.0}",
        f"train.save_dir={exp.folder / 'next'}",
        "train.total_steps=1",
    )
    exp.main(*frozen, f"train.load_dir={exp.save_dir}")
    assert torch.equal(exp.start["parts.vqvae_codebook.block.codes"], exp.job.policy.codebook.codes)
    exp.main(*frozen[:1], f"train.save_dir={exp.folder / 'fresh'}", "train.total_steps=1")
    assert not torch.equal(
        exp.start["parts.vqvae_codebook.block.codes"], exp.job.policy.codebook.codes
    )


def test_which_steps_move_codes_and_which_codes(experiment, monkeypatch):
    """Of 20 steps: k-means at the first, revival of dead codes at each fourth up to 60 %."""
    exp, calls, moved = experiment("train_cfg_vqvae"), [], []
    after = Codebook.after_step

    def watched(book, noise, kmeans=False):
        book.usage[2] = 0.0
        before = book.codes.detach().clone()
        rows = after(book, noise, kmeans)
        calls.append((noise is not None, kmeans))
        moved.append((book.codes != before).any(1).tolist())
        return rows

    monkeypatch.setattr(Codebook, "after_step", watched)
    exp.main("loss.revive_every=4", "train.save_every_steps=10")
    assert calls == [
        (step == 1 or (step % 4 == 0 and step <= 12), step == 1) for step in range(1, 21)
    ]
    assert all(moved[0])
    assert [step for step in range(2, 21) if any(moved[step - 1])] == [4, 8, 12]
    assert all(moved[step - 1] == [i == 2 for i in range(6)] for step in (4, 8, 12))


def test_the_terms_of_the_loss(trained):
    policy, batch = trained
    policy.weights.commitment = 0.7
    policy.weights.prior = 0.3
    policy.weights.label_smoothing = 0.2
    inputs = batch | {"noise": Noise(0), "progress": 0.5}
    loss, scalars = policy(inputs)
    torch.testing.assert_close(
        loss.detach(), scalars["flow"] + 0.7 * scalars["commitment"] + 0.3 * scalars["prior"]
    )
    memory, x1 = policy.encode(batch), policy.stats.normalize("action", batch["action"])
    prior = policy.parts["vqvae_prior"](**memory.latent_inputs)
    codes = policy.codebook(policy.slow_posterior(**memory.latent_inputs, action=x1).tokens).indices
    torch.testing.assert_close(scalars["prior"], prior.loss(codes, 0.2).detach())
    assert not torch.isclose(scalars["prior"], prior.loss(codes).detach())


@torch.no_grad()
def test_temperature_reaches_the_prior(trained):
    policy, batch = trained
    memory = policy.encode(batch)
    for tau in (0.0, 0.3):
        policy.sampling.temperature = tau
        prior = policy.parts["vqvae_prior"](**memory.latent_inputs)
        expected = prior.sample(Noise(3), policy.codebook.codes, tau)
        assert torch.equal(policy.latent(memory, Noise(3)), expected)


def test_zero_temperature_survives_a_draw_of_zero():
    prior, codes = latent_head("codes", 8, 1, None, 4)(torch.randn(6, 1, 8)), torch.eye(4)

    class Zeros:
        def uniform(self, *shape):
            return torch.zeros(shape)

    best = prior.head.logits(prior.h, torch.zeros(6, 1, dtype=torch.long))[:, 0].argmax(-1)
    assert torch.equal(prior.sample(Zeros(), codes, 0.0).detach()[:, 0].argmax(-1), best)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"null_tokens": 1}, "vqvae_codebook has null_tokens: 1, vqvae_posterior has tokens: 2"),
        ({"null_tokens": 0}, "loss.cond_drop_prob: 0.15, but vqvae_codebook has null_tokens: 0"),
    ],
)
def test_null_tokens_that_do_not_fit(experiment, change, message):
    exp = experiment("train_cfg_vqvae")
    file = exp.folder / "vqvae_codebook.yaml"
    data = yaml.safe_load(file.read_text())
    data["args"] |= change
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=message):
        exp.main("train.total_steps=1")


def test_settings_that_make_no_sense(experiment):
    exp = experiment("train_cfg_vqvae")
    for setting in (
        "loss.cond_drop_prob=15",
        "loss.posterior_ema=1.5",
        "loss.camera_dropout=9",
        "loss.label_smoothing=2",
    ):
        with pytest.raises(ConfigError, match="expected at most 1"):
            exp.main(setting)
    with pytest.raises(
        ConfigError, match=r"cond_drop_from=0.5: no codes are dropped: leave it out"
    ):
        exp.main("loss.cond_drop_prob=0", "loss.cond_drop_from=0.5")
    with pytest.raises(ConfigError, match=r"cond_drop_prob: 0.0, but vqvae_codebook has null"):
        exp.main("loss.cond_drop_prob=0")
    del exp.config["model"]["component_config_paths"]["vqvae_posterior"]
    exp.write()
    with pytest.raises(ConfigError, match="this policy needs vqvae_posterior; listed: backbone"):
        exp.main("train.total_steps=1")


def test_plain_codes_train_and_have_no_guidance(experiment, tmp_path):
    exp = experiment("train_cfg_vqvae")
    codebook = {"block": "vq_codebook", "args": {"num_codes": 6, "latent_dim": 4}}
    (exp.folder / "vqvae_codebook.yaml").write_text(yaml.safe_dump(codebook))
    plain = ("loss.cond_drop_prob=0", "train.total_steps=2")
    message = r"sampling\.guidance: leads away from null tokens, which loss.cond_drop_prob: 0 lacks"
    with pytest.raises(ConfigError, match=message):
        exp.main(*plain, "sampling.guidance=2")
    assert exp.main(*plain) == 0
    assert exp.job.policy.codebook.null is None
    argv = ["--checkpoint", str(exp.save_dir), "--nfe", "1", "--out", str(tmp_path / "out")]
    assert evaluate.main(argv) == 0
    with pytest.raises(ConfigError, match=message):
        evaluate.main([*argv, "--guidance", "2"])


def test_evaluation_takes_guidance_and_temperature(experiment, capsys):
    exp = experiment("train_cfg_vqvae")
    exp.main("train.total_steps=2")
    found = {}
    for options in ((), ("--guidance", "3"), ("--temperature", "0")):
        out = exp.folder / "".join(options)
        evaluate.main(
            ["--checkpoint", str(exp.save_dir), "--nfe", "2", "--out", str(out), *options]
        )
        found[options[:1]] = json.loads((out / "results.json").read_text())
    assert found[("--guidance",)]["sampling"] == {"guidance": 3.0, "temperature": 1.0}
    assert found[("--temperature",)]["sampling"] == {"guidance": 1.0, "temperature": 0.0}
    assert found[("--guidance",)]["mae"] != found[()]["mae"]


def test_a_codebook_with_half_its_codes_far_away_is_rescued():
    """16 clusters, 16 codes, 8 of them out of reach: gradients leave them, revival moves them."""
    centres, used = 4 * torch.randn(16, D), {}
    for revived in (False, True):
        torch.manual_seed(1)
        book = Codebook(16, D)
        book.codes.data[8:] += 1000
        adam = torch.optim.AdamW(book.parameters(), lr=1e-2)
        for step in range(1, 1500):
            z_e = centres[torch.randint(16, (128,))][:, None] + 0.05 * torch.randn(128, 1, D)
            code = book(z_e, Noise(step))
            (code.z - z_e).square().mean().backward()
            adam.step()
            adam.zero_grad()
            due = revived and step % 100 == 0 and step <= 1000
            moved = book.after_step(Noise("revive", step) if due else None)
            if moved is not None:
                optim.reset_rows([adam], NoAverage, book.codes, moved)
        used[revived] = (
            book.usage_scalars()["perplexity"].item(),
            book.usage_scalars()["dead"].item(),
        )
    assert used[False][1] == 8
    assert used[True][1] == 0
    assert used[True][0] > 1.4 * used[False][0]


def test_exp1_at_full_size_without_allocating_anything():
    folder = Path(train_cfg_vqvae.__file__).parent / "configs/cfg_vqvae_flow_matching"
    cfg = configured("exp1", train_cfg_vqvae, folder)
    policy, memory, z, velocity = on_meta(cfg, train_cfg_vqvae)
    assert policy.parts.frozen == {"backbone", "da3"}
    depth = 4 * 17 * 23  # layers of 238 x 322 pixels in patches of 14
    assert memory.shape == (2, 3 * 300 + depth + 3 + 40, 1024)
    assert (z.shape, velocity.shape) == ((2, 4, 256), (2, 40, 24))
    assert policy.codebook.null.shape == (4, 256)
    paths = cfg.model.component_config_paths
    named = {Path(path).stem for path in paths.values()}
    assert {path.stem for path in (folder / "exp1").iterdir()} == named | {"train", "info_encoder"}
    paths["info_encoder"] = folder / "exp1/info_encoder.yaml"
    assert on_meta(cfg, train_cfg_vqvae)[1].shape == memory.shape


def test_a_slow_copy_has_the_buffers_of_its_original():
    parts = torch.nn.ModuleDict(
        {"posterior": torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))}
    )
    slow = optim.slow_copy(parts, "posterior")
    parts["posterior"](torch.randn(8, 2) + 3)
    optim.update_slow_copy(slow, parts["posterior"], 0.5, 100)
    assert torch.equal(slow[1].running_mean, parts["posterior"][1].running_mean)
    assert slow[1].num_batches_tracked == 1
