"""`data.cache: features`: the same losses, no frozen forward in training, a cache that survives."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CAMERAS, COMPONENTS
from filelock import FileLock
from helpers import TWO, assert_same_run, environment, published_radio, timm_radio
from safetensors.torch import load_file, save_file

import evaluate
from common import run
from common.blocks.depth_anything import DepthAnything3
from common.blocks.vision import TinyCNN
from common.config import ConfigError, DataError, UserError
from common.data import features
from common.data.features import FeatureCache
from common.data.lerobot import cache_folder
from common.data.loader import to_device
from common.noise import Noise
from common.parts import IMAGE
from common.robot import Robot

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
FRAMES = 100
SAME = 5e-5  # relative difference of losses, from float16 on disk
DEPTH = {
    "block": "da3",
    "args": {"layers": [1, 0], "embed_dim": 8, "depth": 2, "alt_start": 1, "table_side": 3},
}
ENCODER = COMPONENTS["info_embedder"]


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """A cache of its own for each test; no pictures of curves."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(run, "draw_curves", lambda folder: None)


@pytest.fixture
def calls(monkeypatch):
    """How many pictures each kind of component has seen, since the last clear()."""
    seen = {}
    for kind in (TinyCNN, DepthAnything3):
        forward = kind.forward

        def counted(self, image, kind=kind, forward=forward):
            seen[kind.__name__] = seen.get(kind.__name__, 0) + len(image)
            return forward(self, image)

        monkeypatch.setattr(kind, "forward", counted)
    return seen


@pytest.fixture
def awake(monkeypatch):
    """Components in which every number matters: gates that start at zero would hide features."""
    build = run.build_parts

    @torch.no_grad()
    def disturbed(*args):
        parts = build(*args)
        for part in parts.values():
            random = torch.Generator().manual_seed(1)  # components that were equal stay so
            for p in part.parameters():
                p += 0.2 * torch.randn(p.shape, generator=random)
        return parts

    monkeypatch.setattr(run, "build_parts", disturbed)


def every_feature_counts(exp):
    """Losses move by more than SAME if a batch's entry or a layer of da3 is zero or another's."""
    policy, batch = exp.job.policy.eval(), to_device(exp.job.data.windows[[1, 20, 60]], "cpu")

    @torch.no_grad()
    def losses(**changed):
        inputs = [
            batch | changed | {"noise": Noise(i, device="cpu"), "progress": 1.0} for i in range(4)
        ]
        return np.array([policy(x)[0].item() for x in inputs])

    entries, changes = (
        {key: x.float() for key, x in batch.items() if key.startswith("features")},
        {},
    )
    for key, x in entries.items():
        changes |= {f"{key} zero": {key: 0 * x}, f"{key} of other samples": {key: x.roll(1, 0)}}
        if ".da3." in key:
            changes["layers swapped"] = {key: x.flip(1)}
            changes |= {
                f"layer {i} zero": {key: x.index_fill(1, torch.tensor([i]), 0)}
                for i in range(x.shape[1])
            }
    usual = losses()
    moved = {name: abs(losses(**change) / usual - 1).max() for name, change in changes.items()}
    assert min(moved.values()) > 2 * SAME, moved


@pytest.fixture
def cached(experiment):
    """cached(script, frozen, depth, name) -> Experiment with data.cache: features."""

    def make(script="train_flow_matching", frozen=True, depth=False, name="exp"):
        exp = experiment(script, name)
        exp.config["data"] |= {"augment": None, "cache": "features"}
        exp.config["train"]["total_steps"] = 4
        if frozen:
            exp.config["model"]["component_build_args"] = {"backbone": {"freeze": True}}
        if depth:
            (exp.folder / "da3.yaml").write_text(yaml.safe_dump(DEPTH))
            wide = {**ENCODER, "args": {**ENCODER["args"], "extra_visual_dims": [8]}}
            (exp.folder / "info_embedder.yaml").write_text(yaml.safe_dump(wide))
            exp.config["model"]["component_config_paths"]["da3"] = "./da3.yaml"
        exp.write()
        return exp

    return make


def cache_files():
    return sorted(Path(os.environ["XDG_CACHE_HOME"], "bimanual-flow/features").glob("*"))


def arrays():
    return {path.name: np.load(path) for path in cache_files() if path.suffix == ".npy"}


@pytest.mark.parametrize(
    ("script", "frozen", "depth", "history"),
    [
        ("train_flow_matching", True, False, 1),
        ("train_vfp", True, True, 1),
        ("train_vfp", False, True, 2),
        ("train_flow_matching", True, True, 2),
    ],
)
def test_losses_are_those_through_the_frozen_components(
    cached, awake, calls, script, frozen, depth, history
):
    exp = cached(script, frozen, depth)
    settings = [f"data.obs_images_history={history}", "train.micro_steps=1"]
    exp.main(*settings, "data.cache=frames", f"train.save_dir={exp.folder / 'slow'}")
    slow, policy = exp.job.data.windows[[3, 40]], exp.job.policy
    clear = run.Run.batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Run, "batches", lambda job: calls.clear() or clear(job))
        exp.main(*settings)
    # Neither training nor the held-out loss ran a frozen component.
    assert set(calls) == (set() if frozen else {"TinyCNN"})
    a, b = exp.log(save_dir=exp.folder / "slow"), exp.log()
    assert list(a) == list(b) == [1, 2, 3, 4]
    np.testing.assert_allclose([*a.values()], [*b.values()], rtol=SAME)

    fast = exp.job.data.windows[[3, 40]]
    shown = {key for key in fast if key.startswith(IMAGE)}
    assert shown == (set() if frozen else {IMAGE + name for name in CAMERAS})
    if depth:
        assert fast["features.da3.head"].shape == (2, 2, 2 * history, 2, 8)
        assert "features.da3.left" not in fast
    every_feature_counts(exp)
    with torch.no_grad():
        expected = policy.parts.encode_cameras(to_device(slow, "cpu"), [*CAMERAS])
        found = policy.parts.encode_cameras(to_device(fast, "cpu") | {}, [*CAMERAS])
    for x, y in zip([*expected[0], *expected[1]], [*found[0], *found[1]], strict=True):
        assert (x.shape, y.dtype) == (y.shape, torch.float32)
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


def test_losses_with_radio_and_two_layers_of_depth(cached, awake):
    exp = cached("train_vfp", depth=True)
    radio = {"size": "B", "embed_dim": 64, "depth": 2, "table": 4, "channels": [64, 192]}
    (exp.folder / "backbone.yaml").write_text(yaml.safe_dump({"block": "RadioV3", "args": radio}))
    for name in ("info_embedder", "vae_posterior", "vae_prior"):
        content = yaml.safe_load((exp.folder / f"{name}.yaml").read_text())
        content["args"] |= {"visual_dim": 64, "semantic_dim": 192}
        (exp.folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    settings = ["train.micro_steps=1", "data.image_size=[32, 48]"]
    exp.main(*settings, "data.cache=frames", f"train.save_dir={exp.folder / 'slow'}")
    exp.main(*settings)
    assert exp.job.data.windows[[0]]["features.backbone.left"].shape == (1, 2, 3, 64)
    every_feature_counts(exp)
    slow, fast = exp.log(save_dir=exp.folder / "slow"), exp.log()
    np.testing.assert_allclose([*slow.values()], [*fast.values()], rtol=SAME)


@pytest.mark.parametrize("same", [True, False])
def test_a_hand_extractor_with_a_summary(cached, awake, same):
    """Of its results only the grid is kept; one that equals the backbone shares the file of it."""
    exp = cached()
    weights = exp.folder / "same.safetensors"
    save_file(
        {f"block.{key}": value for key, value in TinyCNN(dim=8, width=4).state_dict().items()},
        weights,
    )
    hand = COMPONENTS["backbone"] if same else {"block": "tiny_cnn", "args": {"dim": 8, "width": 8}}
    (exp.folder / "left_hand_extractor.yaml").write_text(yaml.safe_dump(hand))
    wide = {**ENCODER, "args": {**ENCODER["args"], "extra_visual_dims": [8]}}
    (exp.folder / "info_embedder.yaml").write_text(yaml.safe_dump(wide))
    exp.config["model"]["component_config_paths"]["left_hand_extractor"] = (
        "./left_hand_extractor.yaml"
    )
    args = {
        "backbone": {"freeze": True, "init": str(weights)},
        "left_hand_extractor": {"freeze": True},
    }
    args["left_hand_extractor"] |= {"init": str(weights)} if same else {}
    exp.config["model"]["component_build_args"] = args
    exp.write()
    exp.main("data.cache=frames", f"train.save_dir={exp.folder / 'slow'}")
    exp.main()
    np.testing.assert_allclose(
        [*exp.log(save_dir=exp.folder / "slow").values()], [*exp.log().values()], rtol=SAME
    )
    assert len(arrays()) == (6 if same else 7)
    assert "features.left_hand_extractor.left" in exp.job.data.windows[[0]]
    every_feature_counts(exp)


def test_frames_of_a_history_are_stacked(tmp_path):
    shapes = {
        "grid": (5, 2, 3, 4),
        "grid.summary": (5, 6),
        "hand": (5, 7, 4),
        "da3": (5, 2, 3, 4, 8),
    }
    kept = {
        key: np.random.default_rng(0).normal(size=shape).astype(np.float16)
        for key, shape in shapes.items()
    }
    for key, x in kept.items():
        np.save(tmp_path / f"{key}.npy", x)
    cache = FeatureCache({key: tmp_path / f"{key}.npy" for key in kept})
    batch = pickle.loads(pickle.dumps(cache)).gather(np.array([[0, 1], [4, 4], [2, 3]]))
    for i, (a, b) in enumerate([(0, 1), (4, 4), (2, 3)]):
        np.testing.assert_array_equal(
            batch["grid"][i], np.concatenate([kept["grid"][a], kept["grid"][b]])
        )
        np.testing.assert_array_equal(
            batch["hand"][i], np.concatenate([kept["hand"][a], kept["hand"][b]])
        )
        both = np.stack([kept["grid.summary"][a], kept["grid.summary"][b]]).astype(np.float32)
        np.testing.assert_allclose(batch["grid.summary"][i], both.mean(0, keepdims=True))
        for layer in range(2):
            both = np.concatenate([kept["da3"][a, layer], kept["da3"][b, layer]])
            np.testing.assert_array_equal(batch["da3"][i, layer], both)


def test_gradients_are_the_same(cached, awake):
    exp = cached("train_vfp", depth=True)
    exp.main()
    policy, grads = exp.job.policy, []
    for pictures in (False, True):
        windows = exp.job.data.windows
        if pictures:
            windows.features, windows.pictures = None, list(CAMERAS)
        batch = to_device(windows[[1, 20, 60]], "cpu") | {
            "noise": Noise("x", device="cpu"),
            "progress": 1.0,
        }
        policy.eval().zero_grad()
        policy(batch)[0].backward()
        grads.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad]))
    assert (grads[0] - grads[1]).norm() < 2e-3 * grads[1].norm()


def test_what_is_on_disk_and_announced(cached, capsys):
    exp = cached(depth=True)
    exp.main()
    text = capsys.readouterr().out
    line = (
        rf"features of {FRAMES} frames \(backbone of head, .*, da3 of head\) take 0.00 GB: "
        "about 0.1 minutes on cpu"
    )
    assert re.search(line, text)
    found = arrays()
    assert {x.dtype.name for x in found.values()} == {"float16"}
    shapes = sorted((x.shape for x in found.values()), key=len)
    assert shapes == [(FRAMES, 16)] * 3 + [(FRAMES, 2, 2, 8)] * 3 + [(FRAMES, 2, 2, 2, 8)]
    assert {path.suffix for path in cache_files()} == {".npy", ".lock"}
    exp.main("train.total_steps=5")
    assert "features of" not in capsys.readouterr().out


def test_shared_modules_and_trained_ones(cached, calls):
    """left shares head's frozen backbone; right's is trained, so that its pictures still come."""
    exp = cached()
    paths = exp.config["model"]["component_config_paths"]
    paths |= {f"{name}_backbone": paths["backbone"] for name in CAMERAS}
    del paths["backbone"]
    args = {"head_backbone": {"freeze": True}, "left_backbone": {"same_as": "head_backbone"}}
    exp.config["model"]["component_build_args"] = args
    exp.write()
    exp.main()
    entries = {key for key in exp.job.data.windows[[0]] if key.startswith(("features", IMAGE))}
    eyes = {f"features.head_backbone.{name}" for name in ("head", "left")}
    assert entries == eyes | {f"{key}.summary" for key in eyes} | {IMAGE + "right"}
    start, end = exp.start, exp.job.policy.state_dict()
    changed = {
        key.split(".")[1]
        for key in end
        if key.startswith("parts.") and not torch.equal(start[key], end[key])
    }
    assert changed == {"right_backbone", "info_embedder", "action_decoder"}


def test_a_killed_build_goes_on_where_it_stopped(cached, calls, capsys):
    exp = cached(depth=True)
    exp.main()
    whole = arrays()
    shutil.rmtree(cache_files()[0].parent)
    look, size = features.compute_features, features.CPU_BATCH

    def fork(batches):
        def dying(*args):
            nonlocal batches
            batches -= 1
            if batches < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return look(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(features, "SAVE_PROGRESS", 0.0)
            patch.setattr(features, "compute_features", dying)
            pid = exp.fork(f"train.save_dir={exp.folder / 'killed'}")
            assert os.waitpid(pid, 0)[1] == signal.SIGKILL

    trial = 2 * 4  # two batches for each of three cameras and da3
    fork(trial + 5)
    assert [path.read_text() for path in cache_files() if path.suffix == ".rows"] == [str(5 * size)]
    fork(trial + 13 + 3)  # 13 batches are a camera: the first is whole now, the second begun
    done = (trial + 13 + 3 - trial - 8) * size  # 8 of them ended the first
    assert [path.read_text() for path in cache_files() if path.suffix == ".rows"] == [str(done)]
    calls.clear()
    run_batches = run.Run.batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Run, "batches", lambda job: seen.update(calls) or run_batches(job))
        seen = {}
        exp.main(f"train.save_dir={exp.folder / 'again'}")
    assert f"going on after {done} of {3 * FRAMES}" in capsys.readouterr().out
    # A picture of each camera for the size without weights, a loss and a chunk in the preflight,
    # shapes and time of two cameras, eight rows of each camera for the check.
    tried = 3 + 2 * 3 * 2 + 2 * 2 * size + 3 * 8
    assert seen["TinyCNN"] == 2 * FRAMES - done + tried
    assert arrays().keys() == whole.keys()
    assert all(np.array_equal(x, whole[name]) for name, x in arrays().items())


def interrupt(exp, *settings):
    """A build of three cameras that is cut short after 32 frames; its note of that."""
    look, count = features.compute_features, iter(range(100))

    def interrupted(*args):
        if next(count) == 2 * 3 + 4:
            raise KeyboardInterrupt
        return look(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "compute_features", interrupted)
        with pytest.raises(KeyboardInterrupt):
            exp.main(*settings)
    (note,) = left("rows")
    return note


def left(*kinds):
    return [path for path in cache_files() if path.suffix[1:] in kinds]


def test_ctrl_c_notes_how_far_it_came(cached):
    exp = cached()
    assert interrupt(exp).read_text() == "32"
    exp.main()
    assert not left("rows", "tmp")


@pytest.mark.parametrize("damage", ["", "3?", "101", "-8", "half"])
def test_a_build_that_left_nonsense_begins_anew(cached, capsys, damage):
    exp = cached()
    note = interrupt(exp)
    if damage == "half":
        file = note.with_suffix(".tmp")
        file.write_bytes(file.read_bytes()[:999])
    else:
        note.write_text(damage)
    exp.main()
    assert "going on after" not in capsys.readouterr().out
    assert not left("rows", "tmp")


def test_what_other_builds_left_is_removed_unless_a_process_is_at_it(cached):
    exp = cached()
    note = interrupt(exp)
    with FileLock(note.with_suffix(".lock")):
        exp.main("data.image_size=[48, 48]", f"train.save_dir={exp.folder / 'other'}")
        assert [path.stem.partition(".")[0] for path in left("rows", "tmp")] == [note.stem] * 3
    exp.main(
        "data.image_size=[48, 48]", f"train.save_dir={exp.folder / 'there'}", "train.total_steps=5"
    )
    assert len(left("rows", "tmp")) == 3  # no build began
    exp.main("data.image_size=[32, 48]", f"train.save_dir={exp.folder / 'third'}")
    assert not left("rows", "tmp")


def test_other_weights_sizes_and_settings_have_another_cache(cached, calls):
    exp = cached(depth=True)

    def files(name, *settings):
        before = set(arrays())
        exp.main("train.total_steps=1", f"train.save_dir={exp.folder / name}", *settings)
        return len(set(arrays()) - before)

    assert files("a") == 7
    assert files("b", "train.optim.peak_lr=2e-3", "data.batch_size=16", "loss.draws=2") == 0
    assert files("c", "data.image_size=[48, 32]") == 7
    assert files("d", "data.episodes=[0, 1, 2, 5]") == 7
    assert files("e", "seed=1") == 7  # random weights
    weights = exp.folder / "other.safetensors"
    frozen = load_file(exp.folder / "a/frozen/backbone.safetensors")
    save_file(frozen, weights)
    init = f"model.component_build_args={{backbone: {{freeze: true, init: {weights}}}}}"
    assert files("f", init) == 0  # the same weights from a file
    save_file(
        {key: value + (key == "block.patches.bias") for key, value in frozen.items()}, weights
    )
    assert files("g", init) == 6
    other = {**DEPTH, "args": {**DEPTH["args"], "layers": [0, 1]}}
    (exp.folder / "da3.yaml").write_text(yaml.safe_dump(other))
    assert files("h") == 1
    assert (
        files("i", "data.cameras={head: observation.images.cam_left}") == 1 + 0
    )  # da3 looks at another camera


def test_the_key_is_what_makes_the_features(cached, monkeypatch):
    """The place of weights and the way a trained part uses memory change none; precision does."""
    exp = cached()
    files = [exp.folder / f"{name}.safetensors" for name in "ab"]
    torch.manual_seed(0)
    radio = timm_radio()
    for file in files:
        save_file(published_radio(radio), file)
    wide = {**ENCODER, "args": {**ENCODER["args"], "visual_dim": 32, "semantic_dim": 96}}
    (exp.folder / "info_embedder.yaml").write_text(yaml.safe_dump(wide))

    def made(name, **args):
        before, data = set(arrays()), {"block": "RadioV3", "args": {"num_heads": 2, **args}}
        (exp.folder / "backbone.yaml").write_text(yaml.safe_dump(data))
        exp.main("train.total_steps=1", f"train.save_dir={exp.folder / name}")
        return len(set(arrays()) - before)

    assert made("a", weights=str(files[0])) == 6
    assert made("b", weights=str(files[1]), gradient_checkpointing=True, tune=2) == 0
    assert made("c", weights=str(files[0]), num_heads=4) == 6
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert made("d", weights=str(files[0])) == 6


def test_in_bf16_losses_are_close_and_the_check_knows_it(cached, awake, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    exp, forward = cached(depth=True), TinyCNN.forward
    exp.main("data.cache=frames", f"train.save_dir={exp.folder / 'slow'}")
    exp.main()
    assert exp.job.accelerator.mixed_precision == "bf16"
    np.testing.assert_allclose(
        [*exp.log(save_dir=exp.folder / "slow").values()], [*exp.log().values()], rtol=2e-2
    )
    every_feature_counts(exp)
    monkeypatch.setattr(
        TinyCNN, "forward", lambda self, image: tuple(1.03 * x for x in forward(self, image))
    )
    exp.main("train.total_steps=5")
    monkeypatch.setattr(
        TinyCNN, "forward", lambda self, image: tuple(1.07 * x for x in forward(self, image))
    )
    with pytest.raises(UserError, match="'backbone' gives other features now"):
        exp.main("train.total_steps=6")


def test_changed_code_is_noticed(cached, monkeypatch):
    exp, forward = cached(), TinyCNN.forward
    exp.main("train.total_steps=1")

    def times(grid, summary):
        def changed(self, image):
            features, positions = forward(self, image)
            return grid * features, summary * positions

        monkeypatch.setattr(TinyCNN, "forward", changed)

    times(1.005, 0.995)  # as another device might
    exp.main("train.total_steps=2")
    for factors, file in (((1.02, 1), r"\w\.npy"), ((1, 1.02), r"\.summary\.npy")):
        times(*factors)
        with pytest.raises(
            UserError, match=rf"{file}: 'backbone' gives other features now: did its code change\?"
        ):
            exp.main("train.total_steps=3")


def test_files_that_lost_something_are_noticed(cached):
    exp = cached()
    exp.main("train.total_steps=1")
    for path in left("npy")[:2]:  # a grid and its summary
        whole = path.read_bytes()
        for n in (0, 50, len(whole) - 1):
            path.write_bytes(whole[:n])
            with pytest.raises(
                UserError,
                match=rf"{path}: the file is not whole \(.*\). Delete it: it is computed again",
            ):
                exp.main("train.total_steps=2")
        path.write_bytes(whole)
        np.load(path, mmap_mode="r+")[5:35] = 0  # neither an end nor the middle
        with pytest.raises(UserError, match=rf"{path}: 'backbone' gives other features now"):
            exp.main("train.total_steps=2")
        path.unlink()
        exp.main("train.total_steps=1", f"train.save_dir={exp.folder / path.stem}")
        assert path.read_bytes() == whole


def test_several_processes_build_once(cached):
    exp = cached()
    exp.main("train.total_steps=1", f"train.save_dir={exp.folder / 'alone'}")
    whole = arrays()
    shutil.rmtree(cache_files()[0].parent)
    outputs = [exp.folder / f"{i}.txt" for i in range(3)]
    pids = [exp.fork(f"train.save_dir={path.with_suffix('')}", output=path) for path in outputs]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    assert sorted("features of" in path.read_text() for path in outputs) == [False, False, True]
    assert all(np.array_equal(x, whole[name]) for name, x in arrays().items())
    assert len({json.dumps(exp.log(save_dir=path.with_suffix(""))) for path in outputs}) == 1


def test_it_says_once_that_it_waits_for_another_process(cached, capsys, monkeypatch):
    exp = cached()
    exp.main("train.total_steps=1")
    assert "waiting" not in capsys.readouterr().out
    for path in left("npy"):
        path.unlink()
    held = {}
    for path in left("lock"):
        held[str(path)] = FileLock(path)
        held[str(path)].acquire()
    acquire = FileLock.acquire

    def released_when_waited_for(lock, blocking=True):
        if blocking and lock.lock_file in held:
            held.pop(lock.lock_file).release()
        return acquire(lock, blocking=blocking)

    monkeypatch.setattr(FileLock, "acquire", released_when_waited_for)
    exp.main("train.total_steps=2")
    first = min(path for path in left("npy") if "summary" not in path.name)
    assert re.findall("waiting.*", capsys.readouterr().out) == [
        f"waiting for {first}: another process computes it"
    ]
    assert not held


def test_two_processes_of_one_run(cached):
    exp = cached(depth=True)
    for file in exp.folder.glob("*.yaml"):
        file.write_text(file.read_text().replace("dropout: 0.1", "dropout: 0.0"))
    command = [*TWO, "train_flow_matching.py", *exp.argv()]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("features of") == 1
    assert len(arrays()) == 7
    exp.main(f"train.save_dir={exp.folder / 'one'}")
    np.testing.assert_allclose(
        [*exp.log().values()], [*exp.log(save_dir=exp.folder / "one").values()], rtol=1e-5
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_resuming_is_bit_exact(cached, workers):
    exp = cached("train_vfp", depth=True)
    settings = ["train.total_steps=7", f"data.num_workers={workers}"]
    exp.main(*settings, f"train.save_dir={exp.folder / 'whole'}")
    exp.stop_at(3, *settings)
    exp.main(*settings)
    assert_same_run(exp.folder / "whole", exp.save_dir, "step_7")


def test_resumed_with_another_seed_it_reads_features_of_the_weights_it_has(cached):
    """Frozen random weights come from frozen/, not from the new seed."""
    exp = cached()
    exp.main("train.total_steps=2")
    before = set(arrays())
    exp.main("train.total_steps=4", "seed=5")
    assert set(arrays()) == before


def test_evaluation_looks_at_pictures(cached, calls):
    exp = cached("train_vfp", depth=True)
    exp.main()
    calls.clear()
    evaluate.main(
        ["--checkpoint", str(exp.save_dir), "--nfe", "2", "--out", str(exp.folder / "open")]
    )
    assert calls["TinyCNN"] == 3 * calls["DepthAnything3"] > 0
    assert json.loads((exp.folder / "open/results.json").read_text())["nfe"] == 2
    robot = Robot.open(exp.save_dir, replan_steps=1)
    pictures = dict.fromkeys(CAMERAS.values(), np.zeros((64, 48, 3), "u1"))
    calls.clear()
    robot.act({"observation.state": np.zeros(5), **pictures})
    assert calls == {"TinyCNN": 3, "DepthAnything3": 1}


def test_errors(cached):
    exp = cached()
    why = r"train.yaml:\d+: data.augment: set it to null: data.cache: features sees each picture"
    exp.config["data"]["augment"] = {}
    exp.write()
    with pytest.raises(ConfigError, match=why):
        exp.main()
    with pytest.raises(
        ConfigError, match=r"none of them is frozen: set model.component_build_args"
    ):
        exp.main("data.augment=null", "model.component_build_args={}")


@pytest.fixture
def wide(cached):
    """Features of 3.7 MB from pictures of 0.9 MB."""
    exp = cached()
    sizes = {"visual_dim": 1024, "semantic_dim": 2048}
    for name, changes in (("backbone", {"dim": 1024}), ("info_embedder", sizes)):
        content = {**COMPONENTS[name], "args": {**COMPONENTS[name]["args"], **changes}}
        (exp.folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return exp


def test_a_cache_above_the_limit(wide):
    with pytest.raises(
        DataError,
        match=r"features of 100 frames .* take 0.00 GB, above data.cache_max_gb: 0.002; rai",
    ):
        wide.main("data.cache_max_gb=0.002")
    assert not cache_files()


def test_the_limit_is_for_all_files_of_the_run(wide):
    wide.main("train.total_steps=1")
    for path in left("npy")[:2]:  # of one camera of three
        path.unlink()
    limit, text = (
        "data.cache_max_gb=0.003",
        r"features of 100 frames \(backbone of head, .* right\) take 0.00 GB, above",
    )
    with pytest.raises(DataError, match=text):
        wide.main("train.total_steps=2", limit)
    wide.main("train.total_steps=2")
    with pytest.raises(DataError, match=text):
        wide.main("train.total_steps=3", limit)


def test_a_full_disk(cached, monkeypatch):
    exp = cached()
    exp.main("data.cache=frames", "train.total_steps=1", f"train.save_dir={exp.folder / 'a'}")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    with pytest.raises(
        DataError,
        match=r"features: features of 100 frames .* take 0.00 GB, but 0.00 GB are free; set",
    ):
        exp.main()
    assert not [path for path in cache_files() if path.suffix == ".tmp"]


def test_values_that_do_not_fit_are_refused(cached):
    exp = cached()
    exp.main("data.cache=frames", "train.total_steps=1", f"train.save_dir={exp.folder / 'a'}")
    frozen = load_file(exp.folder / "a/frozen/backbone.safetensors")
    save_file({key: 1e6 * value for key, value in frozen.items()}, exp.folder / "big.safetensors")
    init = f"{{backbone: {{freeze: true, init: {exp.folder / 'big.safetensors'}}}}}"
    with pytest.raises(
        UserError,
        match="'backbone' makes of camera 'head' from frame 0 on what float16 cannot hold",
    ):
        exp.main(f"model.component_build_args={init}")
    assert {path.suffix for path in cache_files()} == {".lock"}


def test_a_dry_run_says_what_the_cache_takes_and_leaves_it(wide, capsys):
    wide.main("--dry_run")
    line = (
        r"features of 100 frames \(backbone of head, .* right\) take 0.00 GB: "
        "about 0.1 minutes on cpu, once"
    )
    assert re.search(line, capsys.readouterr().out)
    assert cache_files() == []
    assert not cache_folder().joinpath("features").exists()
    with pytest.raises(DataError, match=r"above data.cache_max_gb: 0.002"):
        wide.main("--dry_run", "data.cache_max_gb=0.002")
    wide.main("train.total_steps=1")
    capsys.readouterr()
    wide.main("--dry_run")
    assert "features of" not in capsys.readouterr().out


def test_a_resumed_run_warns_where_pictures_become_features(cached, capsys):
    exp = cached()
    for step, cache, warned in (
        (1, "none", 0),
        (2, "frames", 0),
        (3, "features", 1),
        (4, "features", 0),
        (5, "none", 1),
    ):
        exp.main(f"train.total_steps={step}", f"data.cache={cache}")
        assert capsys.readouterr().out.count("warning: data.cache was") == warned
