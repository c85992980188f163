"""cfg_vqvae_flow_matching: guidance, null tokens, the prior's likelihood, the codebook's start, the slow posterior."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers import configured, on_meta
from test_latent import NoAverage

import evaluate
import train_cfg_vqvae
from common import flow, optim
from common.blocks.mlp import MLPActionDecoder
from common.blocks.transformer import ActionDecoder
from common.blocks.vq import Codebook
from common.config import ConfigError
from common.data.loader import to_device
from common.distributions import Codes, latent_head
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
    both = made.bind(memory, z)(x, t)
    for part in (slice(B), slice(B, None)):
        torch.testing.assert_close(both[part], made.bind(memory, z[part])(x[part], t[part]))


@pytest.mark.parametrize("target", ["velocity", "x1"])
@torch.no_grad()
def test_guidance_is_a_line_through_two_velocities(decoder, target):
    made, memory = decoder
    z, null, x, t = torch.randn(B, 2, D), torch.randn(B, 2, D), torch.randn(B, T, A), 0.3
    told, untold = (flow.velocity(made.bind(memory, which), target, x, t) for which in (z, null))
    for w in (0.0, 0.5, 1.0, 3.0):
        guided = flow.velocity(
            flow.guided(made.bind(memory, torch.cat([z, null])), w), target, x, t
        )
        torch.testing.assert_close(guided, untold + w * (told - untold), atol=1e-5, rtol=1e-5)


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


@torch.no_grad()
def test_w_of_one_is_the_conditional_and_costs_no_null_branch(trained):
    policy, batch = trained
    memory, x0, sizes = policy.encode(batch), torch.randn(8, 6, 4), []
    z = policy.latent(memory, Noise(1))
    decode = policy.parts["action_decoder"].bind(memory=memory.tokens, z=z)
    plain = policy.stats.denormalize("action", flow.generate(decode, policy.loss.target, x0, 4))
    run = ActionDecoder.run

    def counted(self, x_t, *rest):
        sizes.append(len(x_t))
        return run(self, x_t, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActionDecoder, "run", counted)
        assert torch.equal(policy.sample(memory, x0, 4, z, w=1.0), plain)
        assert torch.equal(policy.sample(memory, x0, 4, z), plain)  # the default
        assert sizes == [8] * 8
        guided = policy.sample(memory, x0, 4, z, w=2.0)
        assert sizes[8:] == [16] * 4
        policy.sampling.guidance = 2.0
        assert torch.equal(policy.sample(memory, x0, 4, z), guided)
    assert not torch.allclose(guided, plain)
    untold = policy.sample(memory, x0, 4, z, w=0.0)
    assert torch.equal(policy.sample(memory, x0, 4, torch.randn_like(z), w=0.0), untold)
    assert not torch.allclose(untold, plain)


@torch.no_grad()
def test_guided_sampling_is_the_guided_flow(trained):
    """Against two separate calls per step, integrated here."""
    policy, batch = trained
    memory, x = policy.encode(batch), torch.randn(8, 6, 4)
    z, decoder, w = policy.latent(memory, Noise(1)), policy.parts["action_decoder"], 1.7
    found = policy.sample(memory, x, 3, z, w=w)
    null = policy.codebook.null.expand_as(z)
    for k in range(3):
        t = torch.full((8, 1), k / 3)
        told, untold = (
            decoder(x_t=x[:, None], t=t, memory=memory.tokens, z=which)[:, 0] for which in (z, null)
        )
        x = x + (untold + w * (told - untold)) / 3
    torch.testing.assert_close(found, policy.stats.denormalize("action", x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("null", "progress", "share"), [(0.3, 0.5, 0.3), (0.3, 0.01, 0.0), (1.0, 0.02, 1.0)]
)
def test_so_many_samples_are_told_nothing(trained, monkeypatch, null, progress, share):
    policy, batch = trained
    policy.loss.null, policy.loss.camera_dropout, told = null, 0.0, []
    monkeypatch.setattr(
        ActionDecoder, "bind", lambda self, memory: lambda x_t, t, z: told.append(z) or 0 * x_t
    )
    for step in range(100):
        policy.train()(batch | {"noise": Noise(step), "progress": progress})
    z = torch.cat(told)
    untold = (z == policy.codebook.null).flatten(1).all(1)
    assert (
        not (z == policy.codebook.null).flatten(1).any(1)[~untold].any()
    )  # all tokens of a sample, or none
    assert abs(untold.float().mean().item() - share) < (0.05 if 0 < share < 1 else 1e-6)
    policy.eval()(batch | {"noise": Noise(0), "progress": progress})
    assert not (told[-1] == policy.codebook.null).any()


def test_only_the_posterior_decoder_and_codes_get_the_flow_s_gradient_and_the_prior_its_own(
    trained,
):
    policy, batch = trained
    policy.loss.prior = 0.0
    for module in policy.train().modules():
        module.p = 0.0  # of dropout
    policy(batch | {"noise": Noise(0), "progress": 0.0})[0].backward()
    assert not any(p.grad.any() for p in policy.parts["vqvae_prior"].parameters())
    assert policy.parts["vqvae_codebook"].block.codes.grad.any()
    others = {name: [p.grad.clone() for p in policy.parts[name].parameters()] for name in OTHERS}
    assert all(any(grad.any() for grad in grads) for grads in others.values())
    policy.zero_grad()
    policy.loss.prior = 5.0
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
        policy.infer(memory, x1, Noise(0))
        z_e = policy.slow_posterior(**memory.first_camera, action=x1).tokens
    brute = ((z_e[:, :, None] - policy.codebook.codes) ** 2).sum(-1).argmin(-1)
    assert torch.equal(seen[-1], brute)


def test_the_prior_s_likelihood_sums_to_one_over_all_codes():
    slots, k = 3, 4
    head = latent_head("codes", 8, slots, None, k)
    torch.nn.init.normal_(head.embed)
    h = torch.randn(1, slots, 8)
    total = 0.0
    for codes in itertools.product(range(k), repeat=slots):
        total += (-slots * head(h).loss(torch.tensor([codes]), None)).exp().item()
    assert total == pytest.approx(1.0, abs=1e-5)


def test_smoothing_is_that_much_of_a_uniform_target():
    prior, codes = (
        latent_head("codes", 8, 1, None, 4)(torch.randn(6, 1, 8)),
        torch.randint(4, (6, 1)),
    )
    logp = prior.head.logits(prior.h, codes).log_softmax(-1)
    expected = -(0.9 * logp.gather(-1, codes[..., None])[..., 0] + 0.1 * logp.mean(-1)).mean()
    torch.testing.assert_close(prior.loss(codes, None, 0.1), expected)


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
    book.after_step(Noise(1), [adam], NoAverage, first=True)
    assert (torch.cdist(centres, book.codes.detach()).amin(1) < 0.05).all()
    assert not adam.state[book.codes]["exp_avg"].any()
    before = far.codes.detach().clone()
    far(z_e, Noise(0))
    far.usage[:] = 1 / 300  # more codes than there are z_e: they stay as they are
    far.after_step(Noise(1), [], NoAverage, first=True)
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
    """Of 20 steps: k-means at the first, revival at each fourth up to 60 %, of what is marked as dead."""
    exp, calls, moved = experiment("train_cfg_vqvae"), [], []
    after = Codebook.after_step

    def watched(book, noise, optimizers, average, first=False):
        book.usage[2] = 0.0
        before = book.codes.detach().clone()
        after(book, noise, optimizers, average, first)
        calls.append((noise is not None, first))
        moved.append((book.codes != before).any(1).tolist())

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
    policy.loss.commitment, policy.loss.prior, policy.loss.smoothing = 0.7, 0.3, 0.2
    inputs = batch | {"noise": Noise(0), "progress": 0.5}
    loss, scalars = policy(inputs)
    torch.testing.assert_close(
        loss.detach(), scalars["flow"] + 0.7 * scalars["commitment"] + 0.3 * scalars["prior"]
    )
    memory, x1 = policy.encode(batch), policy.stats.normalize("action", batch["action"])
    prior = policy.parts["vqvae_prior"](**memory.first_camera)
    codes = policy.codebook(policy.slow_posterior(**memory.first_camera, action=x1).tokens).indices
    torch.testing.assert_close(scalars["prior"], prior.loss(codes, None, 0.2).detach())
    assert not torch.isclose(scalars["prior"], prior.loss(codes, None).detach())


@torch.no_grad()
def test_temperature_reaches_the_prior(trained):
    policy, batch = trained
    memory = policy.encode(batch)
    for tau in (0.0, 0.3):
        policy.sampling.temperature = tau
        prior = policy.parts["vqvae_prior"](**memory.first_camera)
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
        ({"null_tokens": 1}, "vqvae_codebook has null_tokens: 1.* the posterior has 2 tokens"),
        ({"null_tokens": 0}, "vqvae_codebook has null_tokens: 0.* the posterior has 2 tokens"),
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
    with pytest.raises(
        ConfigError, match=r"sampling\.guidance: leads away from null tokens, which learn nothing"
    ):
        exp.main("sampling.guidance=2", "loss.null=0.0")
    for setting in (
        "loss.null=15",
        "loss.posterior_ema=1.5",
        "loss.camera_dropout=9",
        "loss.smoothing=2",
    ):
        with pytest.raises(ConfigError, match="expected at most 1"):
            exp.main(setting)
    del exp.config["model"]["component_config_paths"]["vqvae_posterior"]
    exp.write()
    with pytest.raises(
        ConfigError, match="no component 'vqvae_posterior' is listed; there are backbone"
    ):
        exp.main("train.total_steps=1")


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
    """16 clusters, 16 codes, 8 of them out of reach: by gradients alone they stay there, revived all serve."""
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
            book.after_step(Noise("revive", step) if due else None, [adam], NoAverage)
        used[revived] = book.state()["perplexity"].item(), book.state()["dead"].item()
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
    assert (z.shape, velocity.shape) == ((2, 4, 256), (2, 1, 40, 24))
    assert policy.codebook.null.shape == (4, 256)
    named = {Path(path).stem for path in cfg.model.component_config_paths.values()}
    assert {path.stem for path in (folder / "exp1").iterdir()} == named | {"train", "info_encoder"}
    cfg.model.component_config_paths["info_encoder"] = folder / "exp1/info_encoder.yaml"
    del cfg.model.component_config_paths["proprio_projector"]
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
