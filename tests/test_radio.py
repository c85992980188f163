"""RadioV3: the reference's numbers, both layouts of files, what is refused, what learns."""

from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from helpers import RADIO_TINY, awake, published_radio, timm_radio
from safetensors.torch import load_file, save_file
from torch import nn

from common.blocks.radio import RadioV3
from common.build import build
from common.config import ConfigError, UserError, Yaml
from common.parts import build_parts, load_component
from common.schema import Model, Part

torch.set_num_threads(1)
PARITY = Path(__file__).resolve().parents[2] / "shared/data/parity/radio_tiny"
DIM = RADIO_TINY["embed_dim"]
DEPTH = RADIO_TINY["depth"]
BLOCK = "radio_model.model.blocks.1"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def loaded(tmp_path, tensors, **options):
    """With the sizes that are given, or RADIO_TINY."""
    save_file(tensors, tmp_path / "model.safetensors")
    model = RadioV3(
        weights=str(tmp_path / "model.safetensors"),
        **(options if "num_heads" in options else RADIO_TINY | options),
    )
    assert model.load_weights() == tmp_path / "model.safetensors"
    return model


def same(a, b, atol=2e-6):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=atol * y.abs().max().item(), rtol=0)


def expected(model, image):
    """What timm's own forward gives for sides that are multiples of 16."""
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    x = model.forward_features((image - mean) / std)
    grid = (image.shape[2] // 16, image.shape[3] // 16)
    return x[:, 8:].transpose(1, 2).unflatten(2, grid), x[:, :3].flatten(1)


@pytest.mark.parametrize("case", ["sq", "wide", "tall", "big", "odd"])
@torch.no_grad()
def test_numbers_are_the_references(case):
    if not PARITY.is_dir():
        pytest.skip(f"the reference's numbers are not on this machine: {PARITY}")
    model, io = RadioV3(weights=str(PARITY), num_heads=4), load_file(PARITY / "io.safetensors")
    assert model.load_weights() == PARITY / "model.safetensors"
    image = io[f"{case}.image_u8"]
    results = model(image.float() / 255)
    for name, result in zip(("features", "summary"), results, strict=True):
        reference = io[f"{case}.{name}"]
        assert result.shape == reference.shape
        assert (result - reference).abs().max() <= 2e-5 * reference.abs().max()
        assert (result - reference).norm() <= 1e-5 * reference.norm()
    same(model.train()(image), results)
    for i in range(len(image)):
        same(model(image[i : i + 1]), [x[i : i + 1] for x in results])


@pytest.mark.parametrize("layer_scale", [True, False])
@pytest.mark.parametrize("layout", ["nvidia", "timm"])
@torch.no_grad()
def test_both_layouts_of_files_give_sizes_and_timms_numbers(tmp_path, layout, layer_scale):
    reference = timm_radio(layer_scale, table=5)
    file = published_radio(reference) if layout == "nvidia" else reference.state_dict()
    if layout == "nvidia":
        file["adaptors.clip.blocks.7.norm.bias"] = torch.zeros(3)  # a teacher's head
    model = loaded(tmp_path, file, num_heads=2)
    for h, w in ((80, 80), (32, 64), (112, 48)):  # the table as it is, smaller, larger
        image = torch.rand(2, 3, h, w)
        features, summary = model(image)
        assert features.shape == (2, DIM, h // 16, w // 16)
        assert summary.shape == (2, 3 * DIM)
        same((features, summary), expected(reference, image))


@torch.no_grad()
def test_what_a_file_may_lack_or_hold_beside(tmp_path):
    reference, image = timm_radio(), torch.rand(1, 3, 64, 64)
    file, result = published_radio(reference), expected(reference, image)
    optional = [
        name
        for name in file
        if "conditioner" in name or "summary" in name or name.endswith(".reg_token")
    ]
    assert len(optional) == 4
    same(
        loaded(tmp_path, {name: x for name, x in file.items() if name not in optional})(image),
        result,
    )
    same(
        loaded(tmp_path, {name.replace("grandma", "gamma"): x for name, x in file.items()})(image),
        result,
    )
    same(loaded(tmp_path, file | {"adaptors.clip.weight": torch.zeros(3)})(image), result)
    half = loaded(
        tmp_path, {name: x.half() if x.is_floating_point() else x for name, x in file.items()}
    )
    assert all(p.dtype == torch.float32 for p in half.parameters())
    same(half(image), result, atol=5e-3)


@torch.no_grad()
def test_summary_tokens_and_normalisation_are_the_files(tmp_path):
    file, image = published_radio(timm_radio()), torch.rand(1, 3, 64, 64)
    features, summary = loaded(tmp_path, file)(image)
    file["radio_model.summary_idxs"] = torch.tensor([2, 0, 1])
    other = loaded(tmp_path, file)(image)
    same(other, (features, summary.view(3, DIM)[[2, 0, 1]].view(1, -1)))
    file["radio_model.input_conditioner.norm_mean"] += 0.1
    assert (loaded(tmp_path, file)(image)[0] - features).abs().max() > 1e-3
    file["radio_model.summary_idxs"] = torch.tensor([0, 5])
    assert loaded(tmp_path, file, channels=[DIM, 2 * DIM])(image)[1].shape == (1, 2 * DIM)
    with pytest.raises(UserError, match=r"radio_model.summary_idxs is \(2,\), expected \(3,\)"):
        loaded(tmp_path, file)
    file["radio_model.summary_idxs"] = torch.tensor([0, 1, 8])
    with pytest.raises(UserError, match=r"summary_idxs \[0, 1, 8\] of 8 learned tokens"):
        loaded(tmp_path, file)


REFUSED = {
    "a missing weight": (
        lambda f: f.pop(f"{BLOCK}.mlp.fc1.weight"),
        rf"missing {BLOCK}\.mlp\.fc1\.weight",
    ),
    "a missing LayerScale": (
        lambda f: f.pop(f"{BLOCK}.ls2.grandma"),
        rf"missing {BLOCK}\.ls2\.grandma",
    ),
    "a wrong shape": (
        lambda f: f.update({f"{BLOCK}.attn.proj.bias": torch.zeros(5)}),
        rf"{BLOCK}\.attn\.proj\.bias is \(5,\), expected \(32,\)",
    ),
    "another patch": (
        lambda f: f.update(
            {"radio_model.model.patch_generator.embedder.weight": torch.zeros(DIM, 588)}
        ),
        r"embedder\.weight is \(32, 588\), expected \(32, 768\)",
    ),
    "a final norm": (
        lambda f: f.update({"radio_model.model.norm.weight": torch.zeros(DIM)}),
        r"unexpected radio_model\.model\.norm\.weight",
    ),
    "a feature normaliser": (
        lambda f: f.update({"radio_model.feature_normalizer.mean": torch.zeros(DIM)}),
        r"unexpected radio_model\.feature_normalizer\.mean",
    ),
    "one more block": (
        lambda f: f.update({"radio_model.model.blocks.3.norm1.bias": torch.zeros(DIM)}),
        r"unexpected radio_model\.model\.blocks\.3\.norm1\.bias",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_would_give_other_numbers_is_refused(tmp_path, case):
    change, message = REFUSED[case]
    file = published_radio(timm_radio())
    change(file)
    with pytest.raises(
        UserError, match=rf"(?s)not the weights of RadioV3.*embed_dim 32, depth 3, .*{message}"
    ):
        loaded(tmp_path, file)


def test_a_file_of_another_size_is_refused(tmp_path):
    with pytest.raises(
        UserError,
        match=r"(?s)table 6, .*the file has .*table 4, "
        r".*pos_embed is \(1, 16, 32\), expected \(1, 36, 32\)",
    ):
        loaded(tmp_path, published_radio(timm_radio(table=4)))
    without = published_radio(timm_radio(layer_scale=False))
    with pytest.raises(
        UserError, match=r"prefix 8, LayerScale\); the file has .*prefix 8, no LayerScale"
    ):
        loaded(tmp_path, without)
    missing = (
        r"missing radio_model.model.blocks.0 to radio_model.model.blocks.2: ls1.grandma\n"
        r"    missing .*: ls2.grandma$"
    )
    with pytest.raises(UserError, match=missing):
        loaded(tmp_path, without)
    with pytest.raises(
        UserError, match=r"embeds.pos_embed is \(1, 4, 4, 32\), expected \(1, 6, 6, 32\)"
    ):
        loaded(tmp_path, timm_radio(table=4).state_dict())


def test_sizes_that_are_given_are_kept(tmp_path):
    """Explicit ones win, and are checked against the file; `size` is explicit, too."""
    file = published_radio(timm_radio(table=5))
    with pytest.raises(
        UserError,
        match=r"(?s)depth 2, table 5, .*the file has .*depth 3"
        r".*unexpected .*blocks.2 \(14 tensors\)",
    ):
        loaded(tmp_path, file, num_heads=2, depth=2)
    with (
        torch.device("meta"),
        pytest.raises(
            UserError, match=r"(?s)embed_dim 1024, depth 24, .*has embed_dim 32, depth 3"
        ) as e,
    ):
        loaded(tmp_path, file, num_heads=16, size="L")
    lines = str(e.value).splitlines()
    assert lines[1].endswith("norm1.weight is (32,), expected (1024,)")
    assert lines[9:] == [
        "    and 37 more",
        "    missing radio_model.model.blocks.3 to radio_model.model.blocks.23 (294 tensors)",
    ]


def test_sizes_of_weights_that_are_gone(tmp_path):
    message = (
        r"no such file .*none.safetensors(?s:.*)"
        "to do without it, give size, or embed_dim, depth and table"
    )
    with pytest.raises(UserError, match=message):
        RadioV3(weights=str(tmp_path / "none.safetensors"))
    save_file({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(
        UserError,
        match=r"other.safetensors: neither blocks nor a table of positions by the names of",
    ):
        RadioV3(weights=str(tmp_path / "other.safetensors"))
    with torch.device("meta"):
        assert RadioV3(weights=str(tmp_path / "none.safetensors"), size="B").model.embed_dim == 768
        assert (
            RadioV3(embed_dim=1280, depth=1).model.blocks[0].attn.num_heads == 16
        )  # H: heads of 80


def test_more_learned_tokens_are_the_files(tmp_path):
    file = published_radio(timm_radio())
    tokens = "radio_model.model.patch_generator.cls_token.token"
    file[tokens] = torch.cat([file[tokens], torch.randn(2, DIM)])
    model = loaded(tmp_path, file, num_heads=2)
    assert model.prefix == 10
    assert model(torch.rand(1, 3, 32, 48))[0].shape == (1, DIM, 2, 3)
    again = RadioV3(num_heads=2, **model.sizes)
    again.load_state_dict(model.state_dict())


def test_weights_are_a_file_a_folder_or_a_hub_id(tmp_path, monkeypatch):
    save_file(published_radio(timm_radio()), tmp_path / "model.safetensors")
    assert (
        RadioV3(weights=str(tmp_path), **RADIO_TINY).load_weights()
        == tmp_path / "model.safetensors"
    )
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda *args: asked.append(args) or tmp_path / "model.safetensors",
    )
    model = RadioV3(weights="nvidia/C-RADIOv3-L", **RADIO_TINY)
    assert asked == []  # building opens nothing where the sizes are given
    assert model.load_weights() == tmp_path / "model.safetensors"
    assert asked == [("nvidia/C-RADIOv3-L", "model.safetensors")]

    message = (
        r"(?s)nvidia/C-RADIOv3-L .*model.safetensors.*NVIDIA Open Model License"
        ".*hf download.*no network"
    )
    for problem in (
        huggingface_hub.errors.LocalEntryNotFoundError,
        type("ReadTimeout", (Exception,), {}),
    ):
        monkeypatch.setattr(
            huggingface_hub, "hf_hub_download", Mock(side_effect=problem("no network"))
        )
        with pytest.raises(UserError, match=message):
            model.load_weights()
    model.weights = "nvidia/c-radio-v3_l_half.pth.tar"
    with pytest.raises(UserError, match="pickles are not read"):
        model.load_weights()
    model.weights = str(tmp_path / "none.safetensors")
    with pytest.raises(
        UserError, match=r"no such file .*none.safetensors.*NVIDIA Open Model License"
    ):
        model.load_weights()
    monkeypatch.chdir(tmp_path)
    Path("nvidia/C-RADIOv3-L").mkdir(parents=True)
    model.weights = "nvidia/C-RADIOv3-L"
    with pytest.raises(
        UserError,
        match=rf"the folder {tmp_path}/nvidia/C-RADIOv3-L holds no model.safetensors; licence",
    ):
        model.load_weights()
    model.weights = "./model.safetensors"
    assert model.load_weights() == tmp_path / "model.safetensors"


@torch.no_grad()
def test_bytes_and_floats_are_told_apart_by_their_type():
    model, image = (
        awake(RadioV3(**RADIO_TINY)),
        torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8),
    )
    same(model(image), model(image / 255), atol=0)
    dark = torch.ones(1, 3, 32, 32, dtype=torch.uint8)
    same(model(dark), model(dark / 255), atol=0)
    assert (model(dark)[0] - model(dark.float())[0]).abs().max() > 0.1
    for wrong in (dark.long(), dark[0], dark[:, :1]):
        with pytest.raises(
            ValueError,
            match=r"RadioV3: expected pictures \(B, 3, h, w\), uint8 or float in \[0, 1\]; found",
        ):
            model(wrong)


@torch.no_grad()
def test_sides_are_rounded_to_16_ties_to_even_and_that_is_said_once(capsys):
    model = awake(RadioV3(**RADIO_TINY))
    capsys.readouterr()
    for (h, w), grid in {(232, 248): (14, 16), (7, 25): (1, 2), (40, 55): (2, 3)}.items():
        image = torch.rand(1, 3, h, w)
        resized = nn.functional.interpolate(image, [16 * n for n in grid], mode="bilinear")
        assert model(image)[0].shape[2:] == grid
        same(model(image), model(resized), atol=0)
    assert capsys.readouterr().out.count("resizes pictures of (232, 248) to (224, 256)") == 1
    model(torch.rand(1, 3, 20, 20))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"channels": [1024, 3072]},
            r"channels: \[1024, 3072\] here, but this size gives \[32, 96\]",
        ),
        ({"channels": [DIM, 9 * DIM]}, r"channels: .* gives \[32, 96\]"),
        ({"tune": 4}, "tune: 4 is neither all nor a number of blocks from 1 to 3"),
        ({"tune": "last_2"}, "tune: last_2 is neither all nor a number"),
        ({"tune": 0}, "tune: 0"),
        ({"size": "XL"}, "size: XL is none of B, L, H, g"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RadioV3(**RADIO_TINY | options)


def loss(model, image):
    return sum((x - 0.3).square().mean() for x in model(image))


def test_everything_learns_and_train_mode_changes_nothing():
    model, image = awake(RadioV3(**RADIO_TINY)).train(), torch.rand(2, 3, 48, 32)
    same(model(image), model.eval()(image), atol=0)
    loss(model.train(), image).backward()
    assert [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()
    ] == []


@pytest.mark.parametrize("tune", [1, 2, 3])
def test_only_the_last_blocks_learn_when_so_told(tune):
    full, image = awake(RadioV3(**RADIO_TINY)), torch.rand(2, 3, 48, 32)
    model = RadioV3(tune=tune, **RADIO_TINY)
    model.load_state_dict(full.state_dict())
    recorded = []
    for i, inner in enumerate(model.model.blocks):
        inner.register_forward_hook(
            lambda module, inputs, x, i=i: recorded.append((i, x.requires_grad))
        )
    for either in (full, model):
        loss(either, image).backward()
    assert recorded == [(i, i >= DEPTH - tune) for i in range(DEPTH)]
    for (name, p), q in zip(model.named_parameters(), full.parameters(), strict=True):
        learns = any(name.startswith(f"model.blocks.{i}.") for i in range(DEPTH - tune, DEPTH))
        assert p.requires_grad == learns
        assert p.grad is None if not learns else torch.allclose(p.grad, q.grad, atol=1e-6)


@pytest.mark.parametrize("tune", ["all", 2])
def test_gradient_checkpointing_keeps_gradients(tune):
    model, image = awake(RadioV3(tune=tune, **RADIO_TINY)), torch.rand(2, 3, 48, 32)
    again = RadioV3(tune=tune, gradient_checkpointing=True, **RADIO_TINY)
    again.load_state_dict(model.state_dict())
    calls = []
    again.model.blocks[-1].register_forward_pre_hook(lambda *_: calls.append(1))
    for either in (model, again):
        loss(either, image).backward()
    assert len(calls) == 2
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert p.grad is q.grad is None or torch.equal(p.grad, q.grad)


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["all", 1])
def test_it_compiles_into_one_graph(tune):
    model, image = awake(RadioV3(tune=tune, **RADIO_TINY)), torch.rand(2, 3, 40, 32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    same(compiled(image), model(image), atol=1e-5)
    loss(compiled, image).backward()
    assert model.model.blocks[-1].mlp.fc1.weight.grad.any()
    torch._dynamo.reset()


@torch.no_grad()
def test_bf16_by_autocast_or_of_the_weights_is_close():
    model, image = awake(RadioV3(**RADIO_TINY)), torch.rand(2, 3, 48, 32)
    full = model(image)
    with torch.autocast("cpu", torch.bfloat16):
        same(model(image), full, atol=0.05)
    rounded = model.bfloat16()(image)
    assert all(x.dtype == torch.bfloat16 for x in rounded)
    same([x.float() for x in rounded], full, atol=0.1)


def component(tmp_path, **args):
    text = "\n".join(f"  {name}: {value}" for name, value in (RADIO_TINY | args).items())
    path = tmp_path / "backbone.yaml"
    path.write_text(f"block: radiov3\nargs:\n{text}\n")
    return Yaml.read(path)


def test_as_a_frozen_component_of_a_policy(tmp_path):
    reference = timm_radio()
    save_file(published_radio(reference), tmp_path / "radio.safetensors")
    source = component(tmp_path, weights="./radio.safetensors", channels=[DIM, 3 * DIM])
    section = Model(component_config_paths={}, component_build_args={"backbone": Part(freeze=True)})
    parts = build_parts(section, {"backbone": source}, {}, {"head": "", "left": ""}).train()
    assert parts.sources == {"backbone": tmp_path / "radio.safetensors"}
    images = {
        f"observation.images.{name}": torch.rand(2, 2, 3, 32, 48) for name in ("head", "left")
    }
    grids, summaries = parts.encode_cameras(images, ["head", "left"])
    features, _ = expected(reference, images["observation.images.left"].flatten(0, 1))
    torch.testing.assert_close(
        grids[1], features.unflatten(0, (2, 2)).permute(0, 1, 3, 4, 2).flatten(1, 2).detach()
    )
    assert [x.shape for x in grids + summaries] == [(2, 4, 3, DIM)] * 2 + [(2, 1, 3 * DIM)] * 2
    assert not any(x.requires_grad for x in grids + summaries)
    with pytest.raises(
        ConfigError, match=r"backbone.yaml:1: block: RadioV3 refuses its arguments: channels"
    ):
        build(component(tmp_path, channels=[DIM, DIM + 1]))


def test_its_state_survives_a_safetensors_file(tmp_path):
    first, second = (build(component(tmp_path)) for _ in range(2))
    awake(first).block.summary_idxs.copy_(torch.tensor([3, 1, 0]))
    save_file(first.state_dict(), tmp_path / "backbone.safetensors")
    load_component(second, tmp_path / "backbone.safetensors", "backbone")
    image = torch.rand(1, 3, 32, 32)
    same(second(image), first(image), atol=0)


def test_published_sizes(tmp_path):
    counts = {}
    with torch.device("meta"):
        for size in ("B", "L", "H", "g"):
            model = RadioV3(size=size)
            assert all(x.is_meta for x in model.state_dict().values())
            counts[size] = round(sum(p.numel() for p in model.parameters()) / 1e6, 1)
            if size == "L":
                RadioV3(channels=[1024, 3072], tune=4)
                features, summary = model(torch.zeros(2, 3, 240, 320, device="meta"))
                assert (features.shape, summary.shape) == ((2, 1024, 15, 20), (2, 3072))
    assert counts == {"B": 98.3, "L": 319.9, "H": 651.6, "g": 1159.6}
