"""Depth Anything 3's backbone: the reference's numbers, layers, picture sizes, weights."""

from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from helpers import DA3_TINY, published_da3, tiny_da3
from safetensors.torch import load_file, save_file

from common.blocks.depth_anything import PREFIX, PRESETS, DepthAnything3, rotate
from common.build import build
from common.config import ConfigError, UserError

PARITY = Path(__file__).resolve().parents[2] / "shared/data/parity/da3_tiny"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def file(tmp_path):
    save_file(published_da3(tiny_da3()), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def same_as_reference(result, reference):
    assert (result - reference).abs().max() <= 2e-5 * reference.abs().max()
    assert (result - reference).norm() <= 1e-5 * reference.norm()


@pytest.mark.parametrize("dtype", ["uint8", "float"])
@pytest.mark.parametrize("case", ["sq", "wide", "tall", "native", "odd", "wide.raw01"])
def test_features_are_the_references(case, dtype):
    if not PARITY.is_dir():
        pytest.skip("the reference's outputs are not on this machine")
    saved = load_file(PARITY / "io.safetensors")
    layers = [1, 2, 3, 4, 5]
    model = DepthAnything3(layers, weights=str(PARITY), normalize="raw01" not in case, num_heads=2)
    assert model.load_weights() == PARITY / "model.safetensors"
    image, reference = saved[f"{case.split('.')[0]}.image_u8"], saved[f"{case}.features"]
    image = image if dtype == "uint8" else image.float() / 255
    result = model(image)
    same_as_reference(result, reference)
    same_as_reference(torch.cat([model(one[None]) for one in image]), reference)
    assert torch.equal(model.train()(image), result)


def test_without_the_switch_it_is_a_dinov2_vit():
    import timm

    sizes = {
        "patch_size": 14,
        "img_size": 70,
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 2,
        "init_values": 1.0,
    }
    oracle = timm.create_model(
        "vit_small_patch14_dinov2", pretrained=False, num_classes=0, **sizes
    ).eval()
    oracle.norm.eps = 1e-5
    model = tiny_da3(alt_start=None)
    oracle.load_state_dict(model.state_dict())
    image = torch.rand(2, 3, 70, 70)
    seen = oracle.forward_intermediates(
        (image - model.mean) / model.std, [1, 3], norm=True, intermediates_only=True
    )
    torch.testing.assert_close(
        model(image), torch.stack(seen, 1).permute(0, 1, 3, 4, 2), atol=1e-5, rtol=1e-5
    )


def test_rope_keeps_lengths_and_sees_only_differences():
    q, k = torch.randn(2, 1, 8)
    angles = torch.arange(5.0)[:, None, None] * torch.tensor([[1.0, 0.1], [1.0, 0.1]])
    rotated_q, rotated_k = (rotate(x.expand(5, 8), angles.cos(), angles.sin()) for x in (q, k))
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm().expand(5))
    products = rotated_q @ rotated_k.T
    for offset in range(-3, 4):
        diagonal = products.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert products[0].std() > 0.01


def test_layers_come_in_the_order_asked_for():
    image, every = torch.rand(2, 3, 28, 42), tiny_da3([0, 1, 2, 3])
    features = every(image)
    assert features.shape == (2, 4, 2, 3, 32)
    for asked in ([3, 1], [1, 3], [-1, 0], [2, 2], [0]):
        model = DepthAnything3(asked, **DA3_TINY)
        assert len(model.blocks) == max(i % 4 for i in asked) + 1
        model.load_state_dict(
            {key: value for key, value in every.state_dict().items() if key in model.state_dict()}
        )
        torch.testing.assert_close(model(image), features[:, asked])


@pytest.mark.parametrize("layers", [[4], [-5], [0, 9], []])
def test_layers_out_of_range_are_refused_when_built(layers):
    with pytest.raises(ValueError, match=r"layers: expected some of -4 to 3, found \["):
        tiny_da3(layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "huge"}, "no 'huge'; known: small, base, large, metric_large, mono_large"),
        ({"model": "small", "depth": 4}, "sizes go with model: null; 'small' has its own"),
        ({"depth": 4}, "give model .*, weights, or embed_dim and depth"),
        (
            {"embed_dim": 36, "depth": 4, "num_heads": 2},
            "embed_dim 36 is not 2 heads of a multiple of 4",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DepthAnything3([0], **options)


@pytest.mark.parametrize(
    ("name", "millions"), [("small", 22.1), ("base", 86.6), ("large", 304.4), ("mono_large", 304.4)]
)
def test_presets_have_the_published_sizes(name, millions):
    with torch.device("meta"):
        model = DepthAnything3([-1], name)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
        assert model(torch.rand(2, 3, 28, 42)).shape == (2, 1, 2, 3, PRESETS[name][1]["embed_dim"])
    assert all(p.is_meta for p in model.parameters())
    assert hasattr(model, "camera_token") == ("_" not in name)
    assert hasattr(model.blocks[8].attn, "q_norm") == ("_" not in name)
    assert not hasattr(model.blocks[3].attn, "q_norm")


def test_sides_go_to_the_nearest_multiple_of_14_ties_up_and_this_is_said_once(capsys):
    model = tiny_da3([0])
    capsys.readouterr()
    for size, grid in [
        ((28, 28), (2, 2)),
        ((21, 48), (2, 3)),
        ((20, 49), (1, 4)),
        ((3, 34), (1, 2)),
    ]:
        assert model(torch.rand(1, 3, *size)).shape[2:4] == grid
    assert capsys.readouterr().out == (
        "notice: DepthAnything3 resizes pictures of (21, 48) to (28, 42),"
        " the nearest multiples of 14\n"
    )


def test_the_dtype_of_a_picture_decides_its_range():
    model, image = (
        tiny_da3(),
        torch.randint(2, (2, 3, 28, 28), dtype=torch.uint8),
    )  # nearly black, all values below 1.5
    assert torch.equal(model(image), model(image.float() / 255))
    assert not torch.allclose(model(image), model(image.float()), atol=0.01)
    with pytest.raises(
        ValueError, match=r"uint8 or float in \[0, 1\]; found \(2, 3, 28, 28\) torch.int64"
    ):
        model(image.long())
    with pytest.raises(
        ValueError, match=r"expected pictures \(B, 3, h, w\), .*; found \(3, 28, 28\)"
    ):
        model(image[0])


def test_it_is_frozen_by_design():
    model, image = tiny_da3(), torch.rand(1, 3, 28, 28, requires_grad=True)
    before = model(image)
    assert not before.requires_grad
    assert not model.train().training
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in tiny_da3().parameters())
    assert torch.equal(model.requires_grad_()(image), before)
    assert not model(image).requires_grad
    head = torch.nn.Linear(32, 1)
    head(before).sum().backward()  # an inference tensor could not be saved for this
    assert head.weight.grad.any()


@pytest.mark.parametrize("how", ["autocast", "whole"])
def test_bf16_is_close_to_float32(how):
    model, image = tiny_da3([3]), torch.rand(2, 3, 56, 70)
    exact = model(image)
    if how == "whole":
        rough = model.to(torch.bfloat16)(image)
        assert rough.dtype == torch.bfloat16
        assert all(x.dtype == torch.float32 for pair in model.grid(4, 5)[1:] for x in pair)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(image)
    assert (rough.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.slow
def test_it_compiles_to_one_graph():
    model, image = tiny_da3(), torch.rand(1, 3, 30, 42)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(image), model(image))
    torch.testing.assert_close(compiled(image + 0.1), model(image + 0.1))


def test_a_state_dict_goes_through_safetensors(tmp_path):
    model, image = tiny_da3(), torch.rand(1, 3, 28, 28)
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    other = tiny_da3()
    assert not torch.allclose(other(image), model(image))
    other.load_state_dict(load_file(tmp_path / "own.safetensors"))
    assert torch.equal(other(image), model(image))


@pytest.mark.parametrize("kind", ["backbone only", "without prefix", "float16", "folder"])
def test_files_that_load(file, kind):
    tensors, image = load_file(file), torch.rand(1, 3, 28, 28)
    if kind == "float16":
        tensors = {key: value.half() for key, value in tensors.items()}
    elif kind != "folder":
        tensors = {key: value for key, value in tensors.items() if key.startswith(PREFIX)}
    expected = tiny_da3()
    expected.load_state_dict(
        {k.removeprefix(PREFIX): v for k, v in tensors.items() if k.startswith(PREFIX)}
    )
    if kind == "without prefix":
        tensors = {key.removeprefix(PREFIX): value for key, value in tensors.items()}
    save_file(tensors, file)
    model = DepthAnything3(
        [1, 2], weights=str(file.parent if kind == "folder" else file), **DA3_TINY
    )
    assert model.load_weights() == file
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected.layers = [1, 2]
    assert torch.equal(model(image), expected(image))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("blocks.1.attn.qkv.weight", None, "missing blocks.1.attn.qkv.weight"),
        (
            "blocks.2.mlp.fc1.bias",
            None,
            "missing blocks.2.mlp.fc1.bias",
        ),  # of a block that is dropped
        ("blocks.0.ls1.gamma", None, "missing blocks.0.ls1.gamma"),
        ("camera_token", None, "missing camera_token"),
        (
            "blocks.3.attn.q_norm.weight",
            (4,),
            r"blocks.3.attn.q_norm.weight is \(4,\), expected \(16,\)",
        ),
        (
            "pos_embed",
            (1, 50, 32),
            r"file has embed_dim 32, depth 4, alt_start 1, table_side 7:\n"
            r".*pos_embed is \(1, 50, 32\)",
        ),
        ("blocks.1.extra", (1,), "unexpected blocks.1.extra"),
        ("mask_token", (1, 32), "unexpected mask_token"),
    ],
)
def test_files_that_are_refused(file, name, shape, message):
    tensors = load_file(file)
    tensors.pop(PREFIX + name, None)
    save_file(tensors | ({PREFIX + name: torch.zeros(shape)} if shape else {}), file)
    model = tiny_da3([1], weights=str(file))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        UserError, match=rf"(?s){file.name} \(weights: .*licence.*not the weights.*{message}"
    ):
        model.load_weights()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_file_of_another_model_is_recognised(tmp_path):
    tensors = {f"{PREFIX}blocks.{i}.attn.q_norm.weight": torch.ones(64) for i in range(4, 12)}
    save_file(
        tensors | {f"{PREFIX}pos_embed": torch.ones(1, 1370, 384)}, tmp_path / "a.safetensors"
    )
    with torch.device("meta"):
        large = DepthAnything3([-1], "large", weights=str(tmp_path / "a.safetensors"))
    with pytest.raises(
        UserError, match=r"(?s)CC BY-NC 4.0.*embed_dim 384, depth 12, alt_start 4.*\(model: small\)"
    ):
        large.load_weights()


@pytest.mark.parametrize("alt_start", [2, -1])
@pytest.mark.parametrize("layout", ["published", "without prefix"])
def test_sizes_are_the_files_where_none_are_given(tmp_path, layout, alt_start):
    full = tiny_da3(alt_start=alt_start)
    save_file(
        published_da3(full) if layout == "published" else full.state_dict(),
        tmp_path / "a.safetensors",
    )
    model = DepthAnything3([1, 3], weights=str(tmp_path / "a.safetensors"), num_heads=2)
    assert model.sizes | {"num_heads": 2} == DA3_TINY | {"alt_start": alt_start}
    model.load_weights()
    image = torch.rand(1, 3, 28, 42)
    assert torch.equal(model(image), full(image))
    (tmp_path / "a.safetensors").unlink()
    again = DepthAnything3(
        [1, 3], weights=str(tmp_path / "a.safetensors"), num_heads=2, **model.sizes
    )
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(image), full(image))
    with pytest.raises(
        UserError,
        match=r"no such file .*a.safetensors(?s:.*)"
        r"to do without it, give model \(small, base, .*\), or",
    ):
        DepthAnything3([0], weights=str(tmp_path / "a.safetensors"))


def test_sizes_that_are_given_are_kept(file):
    with pytest.raises(
        UserError, match=r"the file has .*depth 4.*\n    missing blocks.4 \(18 tensors\)$"
    ):
        DepthAnything3([1], weights=str(file), num_heads=2, depth=5).load_weights()
    with (
        torch.device("meta"),
        pytest.raises(
            UserError,
            match=r"(?s)pos_embed is \(1, 26, 32\), expected \(1, 1370, 1024\).*unexpected camera",
        ),
    ):
        DepthAnything3([1], "metric_large", weights=str(file)).load_weights()


def test_the_licence_is_that_of_the_weights_or_else_of_the_model(
    file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", Mock(side_effect=OSError("no network")))
    with torch.device("meta"):
        models = {
            name: DepthAnything3([0], name, weights=str(tmp_path / "none.safetensors"))
            for name in PRESETS
        }
    for name, model in models.items():
        licence = "CC BY-NC 4.0: no commercial use" if name == "large" else "Apache-2.0"
        with pytest.raises(UserError, match=rf"none.safetensors.*{licence}"):
            model.load_weights()
    for name, weights, licence in (
        ("metric_large", "DA3-LARGE-1.1", "CC BY-NC"),
        ("large", "DA3-BASE", "Apache-2.0"),
    ):
        models[name].weights = f"depth-anything/{weights}"
        with pytest.raises(UserError, match=rf"{weights} .*\({licence}"):
            models[name].load_weights()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args: str(file))
    for weights, count in (("DA3-LARGE", 1), ("DA3-BASE", 0)):
        DepthAnything3([0], weights=f"depth-anything/{weights}", **DA3_TINY).load_weights()
        assert (
            capsys.readouterr().out.count(
                "notice: weights: depth-anything/DA3-LARGE, CC BY-NC 4.0: no comm"
            )
            == count
        )


def test_it_is_a_block_of_component_yaml(tmp_path, file):
    yaml = tmp_path / "da3.yaml"
    sizes = "embed_dim: 32, depth: 4, num_heads: 2, table_side: 5"
    args = f"layers: [3, 1], weights: ./model.safetensors, {sizes}"
    yaml.write_text(f"block: da3\nargs: {{{args}, alt_start: 1}}\n")
    model = build(yaml)
    assert model.block.load_weights() == file
    assert model(image=torch.rand(1, 3, 28, 28)).shape == (1, 2, 2, 2, 32)
    yaml.write_text(f"block: da3\nargs: {{{args}, alt_start: 1}}\n".replace("[3, 1]", "[3, 4]"))
    with pytest.raises(
        ConfigError, match=r"da3.yaml:1: .*refuses its arguments: layers: expected some of -4 to 3"
    ):
        build(yaml)
