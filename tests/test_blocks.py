"""Components: shapes, contexts, causality, influence, gradients; those of all configs build."""

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common.blocks.embed import sincos
from common.blocks.mlp import MLPActionDecoder, MLPInfoEncoder, MLPPosterior, MLPPrior
from common.blocks.transformer import (
    ActionDecoder,
    Attention,
    DecoderContext,
    InfoEncoder,
    MultimodalBridge,
    VAEPosterior,
    VAEPrior,
)
from common.blocks.vision import TimmBackbone, TinyCNN
from common.build import FACTS, build
from common.config import ConfigError, UserError
from common.flow import detached
from common.noise import Noise

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
B, R, T, A, P, S, N, D = 3, 2, 6, 4, 5, 7, 9, 16  # D: width; N: memory tokens
GRID, VISUAL, SEMANTIC, LATENT = (2, 3), 8, 10, 5

DECODERS = {
    "transformer": lambda z: ActionDecoder(D, 4, 32, 2, A, latent_dim=LATENT if z else None),
    "causal": lambda z: ActionDecoder(
        D, 4, 32, 2, A, latent_dim=LATENT if z else None, causal=True
    ),
    "mlp": lambda z: MLPActionDecoder(D, 2, D, A, T, latent_size=2 * LATENT if z else 0),
}
INFO = {
    "transformer": lambda n: InfoEncoder(D, 4, 32, 1, S, n, VISUAL, SEMANTIC),
    "mlp": lambda n: MLPInfoEncoder(D, 1, S, P, n, VISUAL * GRID[0] * GRID[1], SEMANTIC),
    "bridge": lambda n: MultimodalBridge(D, S, n, VISUAL, SEMANTIC),
}
SIZES = {"latent_dim": LATENT, "state_dim": S, "proprio_history": P}
SIZES |= {"visual_size": VISUAL * GRID[0] * GRID[1], "semantic_dim": SEMANTIC}
LATENTS = {
    "transformer": (
        lambda: VAEPosterior(D, 4, 32, 1, S, VISUAL, SEMANTIC, LATENT, action_dim=A, tokens=2),
        lambda: VAEPrior(D, 4, 32, 1, S, VISUAL, SEMANTIC, LATENT, tokens=2),
    ),
    "mlp": (
        lambda: MLPPosterior(D, 1, action_dim=A, action_horizon=T, **SIZES),
        lambda: MLPPrior(D, 1, **SIZES),
    ),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def awake(module):
    """The module with all that starts at zero moved away from it, as after some training."""
    for p in module.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.3)
    return module


def decoder(kind, z=False):
    return awake(DECODERS[kind](z))


def decoder_inputs(kind, z=False, rows=R):
    inputs = {"x_t": torch.randn(B, rows, T, A), "t": torch.rand(B, rows)}
    inputs["memory"] = torch.randn(B, 1 if kind == "mlp" else N, D)
    return inputs | ({"z": torch.randn(B, 2, LATENT)} if z else {})


def answer(model, x_t, t, **known):
    """The decoder's prediction from inputs that go into its context and those that do not."""
    return model(x_t, t, model.context(**known))


def observation(cameras=2):
    return {
        "cond_proprio": torch.randn(B, P, S),
        "cond_visual": [torch.randn(B, *GRID, VISUAL) for _ in range(cameras)],
        "cond_semantic": [torch.randn(B, 1, SEMANTIC) for _ in range(cameras)],
    }


@pytest.mark.parametrize("z", [False, True])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_predicts_for_every_row_of_every_sample(kind, z):
    model, inputs = decoder(kind, z), decoder_inputs(kind, z)
    result = answer(model, **inputs)
    assert result.shape == (B, R, T, A)
    for r in range(R):  # the rows share the memory and nothing else
        one = {name: inputs[name][:, r : r + 1] for name in ("x_t", "t")}
        alone = answer(model, **inputs | one)
        torch.testing.assert_close(result[:, r : r + 1], alone, atol=1e-5, rtol=1e-5)
    for b in range(B):
        alone = answer(model, **{name: x[b : b + 1] for name, x in inputs.items()})
        torch.testing.assert_close(result[b : b + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", DECODERS)
def test_a_new_transformer_decoder_says_zero(kind):
    if kind != "mlp":
        assert not answer(DECODERS[kind](True), **decoder_inputs(kind, True)).any()


@pytest.mark.parametrize("kind", DECODERS)
def test_a_latent_is_in_the_context_or_added_to_it(kind):
    model, inputs = decoder(kind, True), decoder_inputs(kind, True)
    noisy = {name: inputs[name] for name in ("x_t", "t")}
    expected = answer(model, **inputs)
    later = model.with_latent(model.context(inputs["memory"]), z=inputs["z"])
    assert torch.equal(model(**noisy, context=later), expected)
    for b in range(B):
        moved = inputs["z"].clone()
        moved[b] += 1
        difference = (answer(model, **inputs | {"z": moved}) - expected).abs().amax((1, 2, 3))
        assert (difference > 1e-4).tolist() == [i == b for i in range(B)]


@pytest.mark.parametrize("kind", DECODERS)
@torch.no_grad()
def test_a_context_is_a_tuple_of_tensors_that_serves_all_times(kind):
    """Calls change nothing in it, and a call of one time is a call of that time alone."""
    model, inputs = decoder(kind, True), decoder_inputs(kind, True)
    context = model.context(inputs["memory"], inputs["z"])
    before = [x.clone() for x in flat(context)]
    results = [model(inputs["x_t"], torch.full((B, R), t), context) for t in (0.0, 0.5)]
    for x, kept in zip(flat(context), before, strict=True):
        assert torch.equal(x, kept)
    again = answer(model, **inputs | {"t": torch.full((B, R), 0.5)})
    assert torch.equal(results[1], again)
    assert not torch.equal(*results)


def flat(context):
    """All tensors of a context."""
    if context is None:
        return []
    if torch.is_tensor(context):
        return [context]
    assert isinstance(context, tuple | list)
    return [x for part in context for x in flat(part)]


@pytest.mark.parametrize("kind", DECODERS)
def test_detached_memory_gets_no_gradient_and_the_latent_does(kind):
    model, inputs = decoder(kind, True), decoder_inputs(kind, True)
    memory, z = inputs["memory"].requires_grad_(), inputs["z"].requires_grad_()
    observed = detached(model.context(memory))
    assert not any(x.requires_grad for x in flat(observed))
    context = model.with_latent(observed, z=z)
    model(inputs["x_t"], inputs["t"], context).square().sum().backward()
    assert memory.grad is None
    assert z.grad.any()
    if kind == "mlp":
        assert model.memory.weight.grad is None
        return
    # Keys and values of z go through the same weights: only z may give them a gradient.
    given = [layer.cross.key_value.weight.grad.clone() for layer in model.layers]
    model.zero_grad()
    joined = model.context(memory.detach(), z)
    keys_values = [
        tuple(torch.cat([x[:, :, :N].detach(), x[:, :, N:]], 2) for x in pair)
        for pair in joined.keys_values
    ]
    context = DecoderContext(keys_values, joined.latent)
    model(inputs["x_t"], inputs["t"], context).square().sum().backward()
    for grad, layer in zip(given, model.layers, strict=True):
        torch.testing.assert_close(grad, layer.cross.key_value.weight.grad)


def test_detached_leaves_key_value_weights_alone_without_a_latent():
    model, inputs = decoder("transformer"), decoder_inputs("transformer")
    context = detached(model.context(inputs["memory"]))
    assert isinstance(context, DecoderContext)
    model(inputs["x_t"], inputs["t"], context).square().sum().backward()
    assert all(layer.cross.key_value.weight.grad is None for layer in model.layers)
    assert all(layer.cross.query.weight.grad.any() for layer in model.layers)


@pytest.mark.parametrize("kind", ["transformer", "mlp"])
def test_a_given_prefix_is_marked(kind):
    if kind == "mlp":
        model = awake(MLPActionDecoder(D, 2, D, A, T, prefix=True))
    else:
        model = awake(ActionDecoder(D, 4, 32, 2, A, prefix=True))
    inputs = decoder_inputs(kind)
    context = model.context(inputs.pop("memory"))
    given = torch.zeros(B, R, T, dtype=torch.bool)
    plain = model(**inputs, context=context)
    assert torch.equal(model(**inputs, context=context, prefix_mask=given), plain)
    given[1, 0, :2] = True
    changed = (model(**inputs, context=context, prefix_mask=given) - plain).abs().amax((2, 3))
    assert (changed > 1e-4).tolist() == [[False, False], [True, False], [False, False]]


@pytest.mark.parametrize("kind", DECODERS)
def test_a_prefix_without_the_decoder_s_option_is_an_error(kind):
    model, inputs = decoder(kind), decoder_inputs(kind)
    context = model.context(inputs.pop("memory"))
    with pytest.raises(
        ConfigError, match=r"\(loss.prefix\): build the decoder with `prefix: true`"
    ):
        model(**inputs, context=context, prefix_mask=torch.ones(B, R, T, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["transformer", "causal"])
def test_causal_means_that_early_steps_do_not_see_late_ones(kind):
    model, inputs = decoder(kind), decoder_inputs(kind)
    x = inputs["x_t"].requires_grad_()
    early = answer(model, **inputs)[:, :, :3].square().sum()
    late = torch.autograd.grad(early, x)[0][:, :, 3:]
    assert late.any() == (kind != "causal")


@pytest.mark.parametrize("kind", ["transformer", "causal"])
def test_positions_of_action_steps_matter(kind):
    model, inputs = decoder(kind), decoder_inputs(kind)
    order = torch.tensor([1, 0, *range(2, T)])
    swapped = answer(model, **inputs | {"x_t": inputs["x_t"][:, :, order]})[:, :, order]
    assert (swapped - answer(model, **inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", DECODERS)
def test_times_are_told_apart_over_their_whole_range(kind):
    model, inputs = decoder(kind), decoder_inputs(kind)
    results = [
        answer(model, **inputs | {"t": torch.full((B, R), t)})
        for t in (0.0, 0.01, 0.5, 0.99, 0.999)
    ]
    assert min((a - b).abs().max() for a, b in pairwise(results)) > 1e-4
    seen = []
    model.time.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    answer(model, **inputs | {"t": torch.tensor([[0.0, 1.0]] * B)})
    assert (
        torch.cosine_similarity(*seen[0], dim=0) < 0.5
    )  # the usual base of 10,000 gives 0.95 for t in [0, 1]


def test_sincos_periods_run_from_shortest_to_longest():
    phases = sincos(torch.tensor([0.0, 3.0, 50.0]), 8, longest=50.0, shortest=3.0)
    torch.testing.assert_close(phases[1, [0, 4]], phases[0, [0, 4]], atol=1e-5, rtol=0)
    torch.testing.assert_close(phases[2, [3, 7]], phases[0, [3, 7]], atol=1e-5, rtol=0)
    torch.testing.assert_close(phases.square().sum(1), torch.full((3,), 4.0))


@pytest.mark.parametrize("kind", INFO)
def test_memory_has_the_tokens_of_every_source(kind):
    memory = INFO[kind](2)(**observation())
    assert memory.shape == (B, 1 if kind == "mlp" else 2 * 6 + 2 + P, D)
    assert INFO[kind](0)(**observation(0)).shape == (B, 1 if kind == "mlp" else P, D)


@pytest.mark.parametrize("kind", INFO)
def test_a_hidden_camera_has_no_influence_and_the_others_have(kind):
    model, obs = awake(INFO[kind](2)), observation()
    mask = torch.tensor([[True, False], [False, True], [False, False]])
    seen = model(**obs, visual_mask=mask)
    for name in ("cond_visual", "cond_semantic"):
        for camera in range(2):
            other = copy.copy(obs)
            other[name] = [
                x + 1 + torch.randn_like(x) if i == camera else x for i, x in enumerate(obs[name])
            ]
            changed = (model(**other, visual_mask=mask) - seen).abs().amax((1, 2)) > 1e-4
            assert changed.tolist() == (~mask[:, camera]).tolist()
    hidden = (model(**obs) - seen).abs().amax((1, 2)) > 1e-4
    assert hidden.tolist() == [True, True, False]


def test_positions_tell_patches_and_history_steps_apart():
    model, obs = MultimodalBridge(D, S, 1, VISUAL, SEMANTIC), observation(1)
    same = {
        name: torch.ones_like(x) if torch.is_tensor(x) else [torch.ones_like(y) for y in x]
        for name, x in obs.items()
    }
    tokens = model(**same)[0]
    assert torch.pdist(tokens).min() > 1e-2
    moved = (
        model(**obs | {"cond_visual": [obs["cond_visual"][0].flip(2)]})[:, :6]
        .unflatten(1, GRID)
        .flip(2)
        .flatten(1, 2)
    )
    assert (moved - model(**obs)[:, :6]).abs().max() > 1e-2


def test_a_bridge_takes_more_visual_inputs_and_an_action():
    model = MultimodalBridge(D, S, 1, VISUAL, SEMANTIC, extra_visual_dims=[12], action_dim=A)
    obs, action = observation(1), torch.randn(B, T, A)
    obs["cond_visual"].append(torch.randn(B, 4, 12))
    seen = model(**obs, action=action, visual_mask=torch.tensor([[False, True]] * B))
    assert seen.shape == (B, 6 + 4 + 1 + P + T, D)
    obs["cond_visual"][1] = torch.randn(B, 4, 12)
    assert torch.equal(
        model(**obs, action=action, visual_mask=torch.tensor([[False, True]] * B)), seen
    )
    assert not torch.equal(model(**obs, action=action), seen)


@pytest.mark.parametrize("kind", INFO)
def test_a_wrong_number_of_pictures_is_named(kind):
    with pytest.raises(ValueError, match=r"1 visual and 2 semantic inputs given, built for 2"):
        INFO[kind](2)(**observation() | {"cond_visual": observation()["cond_visual"][:1]})


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_torchs(causal):
    ours, reference = Attention(D, 4), nn.MultiheadAttention(D, 4, batch_first=True)
    ours.out = reference.out_proj
    reference.in_proj_weight.data = torch.cat([ours.query.weight, ours.key_value.weight]).detach()
    x, memory = torch.randn(B, T, D), torch.randn(B, N, D)
    mask = nn.Transformer.generate_square_subsequent_mask(T) if causal else None
    torch.testing.assert_close(
        ours(x, causal=causal), reference(x, x, x, attn_mask=mask, is_causal=causal)[0]
    )
    torch.testing.assert_close(ours(x, ours.keys_values(memory)), reference(x, memory, memory)[0])


def test_dim_must_be_a_multiple_of_heads():
    with pytest.raises(ValueError, match="dim 16 is not a multiple of heads 3"):
        ActionDecoder(D, 3, 32, 1, A)


@pytest.mark.parametrize("kind", LATENTS)
def test_latents_are_gaussians_with_a_bounded_variance(kind):
    posterior, prior = (make() for make in LATENTS[kind])
    obs, action = observation(1), torch.randn(B, T, A)
    q, p = posterior(**obs, action=action), prior(**obs)
    tokens = 2 if kind == "transformer" else 1
    for gaussian in (q, p):
        assert gaussian.mu.shape == gaussian.logvar.shape == (B, tokens, LATENT)
    assert (posterior(**obs, action=action + 1).mu - q.mu).abs().max() > 1e-4
    mask = torch.tensor([[True]] * B)
    hidden = prior(**obs, visual_mask=mask).mu
    assert torch.equal(
        prior(**obs | {"cond_visual": observation(1)["cond_visual"]}, visual_mask=mask).mu, hidden
    )
    prior.head.weight.data *= 1000
    assert prior(**obs).logvar.unique().tolist()[:: tokens * B * LATENT] == [-6.0]
    assert prior(**obs).logvar.max() == 2
    eps = Noise(0).normal(B, tokens, LATENT)
    torch.testing.assert_close(q.sample(Noise(0)), q.mu + q.logvar.exp().sqrt() * eps)
    with torch.autocast("cpu", torch.bfloat16):
        assert prior(**obs).logvar.dtype == torch.float32


def without_gradient_after_two_steps(module, loss):
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("kind", DECODERS)
def test_every_parameter_of_a_decoder_learns(kind):
    model, inputs, target = (
        DECODERS[kind](True),
        decoder_inputs(kind, True),
        torch.randn(B, R, T, A),
    )
    assert (
        without_gradient_after_two_steps(
            model, lambda: (answer(model, **inputs) - target).square().mean()
        )
        == []
    )


@pytest.mark.parametrize("kind", INFO)
def test_every_parameter_of_an_encoder_learns(kind):
    model, obs, target = INFO[kind](2), observation(), torch.randn(D)
    mask = torch.tensor([[True, False], [False, True], [False, False]])
    assert (
        without_gradient_after_two_steps(
            model, lambda: (model(**obs, visual_mask=mask) - target).square().mean()
        )
        == []
    )


@pytest.mark.parametrize("kind", LATENTS)
def test_every_parameter_of_posterior_and_prior_learns(kind):
    obs, mask = observation(1), torch.tensor([[True], [False], [False]])
    for make, more in zip(LATENTS[kind], ({"action": torch.randn(B, T, A)}, {}), strict=True):
        model, inputs = make(), obs | more

        def loss(model=model, inputs=inputs):
            return sum(x.square().sum() for x in model(**inputs, visual_mask=mask))

        assert without_gradient_after_two_steps(model, loss) == []


BACKBONES = {
    "tiny_cnn": (lambda: TinyCNN(dim=12), 12, 24),
    "resnet": (lambda: TimmBackbone("test_resnet"), 96, 96),
    "vit": (lambda: TimmBackbone("test_vit", dynamic_img_size=True), 64, 64),
}


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_backbone_gives_a_grid_and_a_summary_and_learns(kind):
    make, channels, summary_size = BACKBONES[kind]
    model, image = make().eval(), torch.rand(2, 3, 96, 128)
    stride = 32 if kind == "resnet" else 16
    features, summary = model(image)
    assert features.shape == (2, channels, 96 // stride, 128 // stride)
    assert summary.shape == (2, summary_size)
    assert (
        without_gradient_after_two_steps(
            model, lambda: sum((x - 0.3).square().sum() for x in model(image))
        )
        == []
    )


def test_the_keypoint_summary_finds_a_bright_dot():
    model = TinyCNN(dim=2, width=4)
    for conv in (
        m for m in model.stem if isinstance(m, nn.Conv2d)
    ):  # brightness, blurred over a few pixels
        nn.init.constant_(conv.weight, 1 / conv.weight[0].numel())
        nn.init.zeros_(conv.bias)
    nn.init.constant_(model.keypoints.weight, 300)
    for row, column in ((12, 20), (40, 100), (84, 64)):
        image = torch.zeros(1, 3, 96, 128)
        image[:, :, row - 4 : row + 4, column - 4 : column + 4] = 1
        _, summary = model(image)
        expected = torch.tensor([2 * column / 127 - 1] * 2 + [2 * row / 95 - 1] * 2)
        torch.testing.assert_close(summary[0], expected, atol=0.15, rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("test_resnett", {}, "no model 'test_resnett'; did you mean 'test_resnet'"),
        ("hf-hub:evil/model", {}, "no model 'hf-hub:evil/model'"),
        ("local-dir:/tmp", {}, "no model 'local-dir:/tmp'"),
        ("test_resnet", {"checkpoint_path": "evil.pth"}, "checkpoint_path: weights come from"),
        ("test_resnet", {"pretrained_cfg": {"file": "evil.pth"}}, "pretrained_cfg: weights come"),
    ],
)
def test_timm_fetches_nothing_and_reads_no_pickle(name, options, message):
    with pytest.raises(ConfigError, match=message):
        TimmBackbone(name, **options)


def test_timm_pictures_are_normalised_and_prefix_tokens_dropped():
    model, image = (
        TimmBackbone(
            "vit_tiny_patch16_224", depth=1, embed_dim=24, num_heads=2, img_size=64
        ).eval(),
        torch.rand(2, 3, 64, 64),
    )
    tokens = model.model.forward_features(
        (image - 0.5) / 0.5
    )  # this model's own mean and deviation
    features, summary = model(image)
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), tokens[:, 1:])
    torch.testing.assert_close(summary, tokens[:, 0])


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_timm_weights_come_from_a_file_whose_classifier_is_ignored(tmp_path, name):
    import timm

    torch.manual_seed(1)
    published, file = timm.create_model(name), tmp_path / "model.safetensors"
    save_file(published.state_dict(), file)
    model = TimmBackbone(name, weights=str(file))
    assert model.load_weights() == file
    own = model.model.state_dict()
    assert all(
        torch.equal(own[key], value) for key, value in published.state_dict().items() if key in own
    )
    tensors = {key: value for key, value in own.items() if "norm" not in key and "bn" not in key}
    save_file(tensors, file)
    with pytest.raises(
        UserError, match=rf"(?s)model.safetensors: not the weights of timm's '{name}'.*Missing key"
    ):
        model.load_weights()
    with pytest.raises(UserError, match="no such file"):
        TimmBackbone(name, weights=str(tmp_path / "none.safetensors")).load_weights()


CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if not p.name.startswith("train"))


@pytest.mark.parametrize(
    "path", CONFIGS, ids=[str(path.relative_to(ROOT / "configs")) for path in CONFIGS]
)
def test_every_component_of_the_configs_builds(path):
    facts = {name: 3 for name in FACTS if f"{name}: null" in path.read_text()}
    with torch.device("meta"):
        model = build(path, facts)
    assert all(p.is_meta for p in model.parameters())
    assert list(model.state_dict())
