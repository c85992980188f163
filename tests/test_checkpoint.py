"""What opening, saving and loading a checkpoint may do."""

import functools
import json
import os
import re
import shlex
import shutil
import stat
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Experiment, forget_accelerator
from fuzz import ending
from helpers import rewrite_meta
from safetensors.torch import load_file, save_file
from torch import nn

import evaluate
import train_flow_matching
import train_mi
from common import checkpoint, parts, run, trust
from common.blocks.mlp import Sum
from common.blocks.transformer import MultimodalBridge
from common.blocks.vae import StateDecoder, StateEncoder
from common.blocks.vision import TinyCNN
from common.config import UserError, Yaml
from common.data.loader import to_device
from common.robot import Robot


def evaluated(exp, *options):
    """evaluate.py on the newest checkpoint of an experiment, as few samples as possible."""
    out = exp.folder / "results"
    return evaluate.main(["--checkpoint", str(exp.save_dir), "--out", str(out), *options])


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(run, "draw_curves", lambda folder: None)


@pytest.fixture(scope="module")
def one_run(tmp_path_factory, demos):
    exp = Experiment(tmp_path_factory.mktemp("one_run") / "exp", demos)
    exp.main("train.total_steps=2")
    forget_accelerator()
    return exp


@pytest.fixture
def trained(one_run, tmp_path):
    """A finished run of two steps, a copy for each test."""
    exp = Experiment(tmp_path / "exp", one_run.config["data"]["root"])
    shutil.copytree(one_run.save_dir, exp.save_dir)
    yield exp
    forget_accelerator()


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A training script and a plugin in a folder that Python searches; they tell if they run."""
    folder = tmp_path / "stranger"
    folder.mkdir()
    mark = f"open({str(folder / 'ran')!r}, 'w').close()\n"
    script = Path(train_flow_matching.__file__).read_text()
    (folder / "train_theirs.py").write_text(script + mark)
    (folder / "their_blocks.py").write_text(mark)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    yield folder
    for name in ("train_theirs", "their_blocks"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "name",
    ["{}/train_theirs.py", "/proc/self/cwd/train_theirs.py", "./train_theirs.py", "../evaluate.py"],
)
def test_a_script_that_is_not_beside_common_runs_only_if_it_is_named(trained, stranger, name):
    recorded = name.format(stranger)
    rewrite_meta(trained.save_dir / "step_2", script=recorded)
    message = rf"step_2: trained by the script '{recorded}', .*If you trust it: --script PATH"
    with pytest.raises(UserError, match=message):
        evaluated(trained)
    assert not (stranger / "ran").exists()
    checkpoint.open_policy(trained.save_dir, script=stranger / "train_theirs.py")
    assert (stranger / "ran").exists()


def test_a_link_beside_common_is_no_script_of_the_project(trained, stranger, monkeypatch, tmp_path):
    root = tmp_path / "project"
    root.mkdir()
    (root / "train_mine.py").symlink_to(stranger / "train_theirs.py")
    monkeypatch.setattr(trust, "ROOT", root)
    rewrite_meta(trained.save_dir / "step_2", script="train_mine.py")
    with pytest.raises(UserError, match="is not beside common/"):
        checkpoint.open_policy(trained.save_dir)
    assert not (stranger / "ran").exists()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("nothing.py", "no such file: .*nothing.py"),
        ("evaluate.py", r"evaluate.py: not a training script: it has no Config and Policy"),
        ("README.md", r"README.md: not a Python file"),
    ],
)
def test_a_named_script_must_be_one(trained, script, message):
    with pytest.raises(UserError, match=message):
        checkpoint.open_policy(trained.save_dir, script=checkpoint.ROOT / script)


def test_a_plugin_that_is_not_the_projects_is_imported_only_if_it_is_named(trained, stranger):
    def name_plugins(meta):
        meta["config"]["plugins"] = ["common.metrics", "their_blocks"]

    rewrite_meta(trained.save_dir / "step_2", name_plugins)
    with pytest.raises(UserError, match=r"plugins \['their_blocks'\].* --plugins their_blocks$"):
        evaluated(trained)
    assert not (stranger / "ran").exists()
    checkpoint.open_policy(trained.save_dir, plugins=["their_blocks"])
    assert (stranger / "ran").exists()


@pytest.mark.parametrize(
    ("name", "projects"),
    [
        ("lab", True),
        ("lab.blocks", True),
        ("lab.nothing", False),
        ("single", True),
        ("json", False),
        ("linked", False),
        ("runs.old.payload", False),
        ("runs.payload", False),  # above the run
        ("", False),
        (".lab", False),
        ("lab..blocks", False),
        ("../stranger/their_blocks", False),
    ],
)
def test_what_counts_as_a_plugin_of_the_project(tmp_path, stranger, monkeypatch, name, projects):
    root = tmp_path / "project"
    for file in (
        "lab/__init__.py",
        "lab/blocks.py",
        "single.py",
        "runs/old/payload.py",
        "runs/payload.py",
    ):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("raise SystemError")  # nothing is imported to find out
    (root / "linked.py").symlink_to(stranger / "their_blocks.py")
    monkeypatch.setattr(trust, "ROOT", root)
    (root / "elsewhere/step_2").mkdir(parents=True)
    folder = root / "runs/old/step_2"
    folder.symlink_to(root / "elsewhere/step_2")
    if projects:
        trust.check_plugins(folder, [name], [])
    else:
        with pytest.raises(UserError, match="needs the plugins"):
            trust.check_plugins(folder, [name], [])


def test_scoring_again_passes_script_and_plugins_on(trained, stranger, monkeypatch):
    rewrite_meta(trained.save_dir / "step_2", script=str(stranger / "train_theirs.py"))
    again = ["--score", str(trained.save_dir)]
    with pytest.raises(UserError, match=r"train_theirs.py', which is not beside common/"):
        train_mi.rescore(again)
    with pytest.raises(UserError, match="holds a policy, which ranks nothing"):
        train_mi.rescore([*again, "--script", "train_theirs.py"])
    seen = {}

    def opened(folder, **options):
        seen.update(options)
        raise UserError("enough")

    monkeypatch.setattr(train_mi, "open_policy", opened)
    with pytest.raises(UserError, match="enough"):
        train_mi.rescore([*again, "--plugins", "a.b", "c"])
    assert seen == {"script": None, "plugins": ["a.b", "c"]}


ORDER = "{right: observation.images.cam_right, head: observation.images.cam_head, left: observation.images.cam_left}"  # noqa: E501


@pytest.mark.parametrize(
    ("cameras", "shown"),
    [
        (ORDER, "{right: observation.images.cam_right, head: "),
        ("{head: observation.images.cam_left, left: observation.images.cam_head, "
         "right: observation.images.cam_right}", "{head: observation.images.cam_left, left: "),
        ("{top: observation.images.cam_head, left: observation.images.cam_left, "
         "right: observation.images.cam_right}", "{top: observation.images.cam_head, left: "),
        ("{head: observation.images.cam_head}", "{head: observation.images.cam_head}"),
    ],
    ids=["order", "keys", "names", "fewer"],
)  # fmt: skip
def test_a_run_keeps_its_cameras(trained, cameras, shown):
    with pytest.raises(UserError, match="trained with other cameras, or in another order") as e:
        trained.main("train.total_steps=3", f"data.cameras={cameras}")
    was = "{head: observation.images.cam_head, left: observation.images.cam_left, right: "
    assert f"data.cameras was {was}" in str(e.value)
    assert f"data.cameras is  {shown}" in str(e.value)


def test_evaluation_takes_the_cameras_in_the_order_of_training(experiment):
    exp = experiment()
    exp.main(f"data.cameras={ORDER}", "train.total_steps=1")
    policy, cfg = checkpoint.open_policy(exp.save_dir)
    assert policy.cameras == list(cfg.data.cameras) == ["right", "head", "left"]
    assert Robot.open(exp.save_dir, replan_steps=3).policy.cameras == policy.cameras


def component(state, name):
    return {key: value for key, value in state.items() if key.startswith(f"parts.{name}.")}


def chunks(policy, batch, hidden):
    """Chunks of a batch, where one camera is hidden from each sample."""
    mask = torch.tensor([[name == camera for camera in policy.cameras] for name in hidden])
    return policy.sample(policy.encode(batch, mask), torch.zeros(len(mask), 6, 4), 2)


@pytest.mark.parametrize("block", ["info_encoder", "mlp_info_encoder"])
def test_weights_follow_the_names_of_cameras_into_a_new_run(experiment, block, capsys):
    exp = experiment()
    again = experiment(name="again")
    mlp = {"dim": 16, "layers": 1, "state_dim": None, "proprio_history": None, "num_cameras": None}
    mlp = {"block": block, "args": mlp | {"visual_size": 32, "semantic_dim": 16}}
    for each in (exp, again):
        if block == "mlp_info_encoder":
            (each.folder / "info_embedder.yaml").write_text(yaml.safe_dump(mlp))
    exp.main("train.total_steps=3", "loss.camera_dropout=0.9")
    trained, _ = checkpoint.open_policy(exp.save_dir)
    moved = [
        f"train.load_dir={exp.save_dir}",
        f"data.cameras={ORDER}",
        "model.component_build_args={info_embedder: {freeze: true}}",
    ]
    again.main(*moved, "train.total_steps=1")
    policy = again.job.policy
    policy.load_state_dict(again.start)
    batch = to_device(exp.job.data.windows[[1, 20, 60]], "cpu")
    hidden = ["head", "left", "right"]
    expected = chunks(trained, batch, hidden)
    torch.testing.assert_close(chunks(policy.eval(), batch, hidden), expected)
    assert not torch.equal(expected, chunks(trained, batch, ["left", "right", "head"]))
    assert "notice: data.cameras" not in capsys.readouterr().out
    # Frozen weights that moved are no longer those of the file that they are from.
    again.main(*moved, "train.total_steps=2")
    resumed = component(again.job.policy.state_dict(), "info_embedder")
    for key, value in component(again.start, "info_embedder").items():
        assert torch.equal(value, resumed[key]), key
    opened, _ = checkpoint.open_policy(again.save_dir)
    for key, value in component(opened.state_dict(), "info_embedder").items():
        assert torch.equal(value, resumed[key]), key


def test_new_cameras_take_the_weights_of_those_that_are_gone(experiment, trained, capsys):
    again = experiment(name="again")
    cameras = "{top: observation.images.cam_head, head: observation.images.cam_left, x: observation.images.cam_right}"  # noqa: E501
    again.main(
        f"train.load_dir={trained.save_dir}", f"data.cameras={cameras}", "train.total_steps=1"
    )
    out = capsys.readouterr().out
    assert "data.cameras has ['top', 'x'] that" in out
    assert "and lacks ['left', 'right'] of it" in out
    assert "notice: ['top', 'x'] start from the weights of ['left', 'right'], in this order" in out
    saved = load_file(trained.save_dir / "step_2/info_embedder.safetensors")
    for now, was in ((0, 1), (1, 0), (2, 2)):
        key = "parts.info_embedder.block.bridge.visual.{}.1.weight"
        there = saved[key.format(was).removeprefix("parts.info_embedder.")]
        assert torch.equal(again.start[key.format(now)], there)


def test_a_latent_that_knew_another_first_camera_is_refused(experiment, capsys):
    exp = experiment("train_vfp")
    exp.main("train.total_steps=1")
    again = experiment("train_vfp", "again")
    load = f"train.load_dir={exp.save_dir}"
    with pytest.raises(UserError) as e:
        again.main(load, f"data.cameras={ORDER}")
    for name in ("vae_posterior", "vae_prior"):
        assert (
            f"'{name}' reads the first camera only, which was 'head' there and is 'right' in "
            "data.cameras"
        ) in str(e.value)
    again.main(load, f"data.cameras={ORDER}", *pasted(e.value), "train.total_steps=1")
    swapped = "{head: observation.images.cam_head, right: observation.images.cam_right, left: observation.images.cam_left}"  # noqa: E501
    third = experiment("train_vfp", "third")
    assert third.main(load, f"data.cameras={swapped}", "train.total_steps=1") == 0


def pasted(error):
    """The overrides that an error advises, as a shell would pass them on."""
    lines = [line.strip() for line in str(error).splitlines()]
    return [shlex.split(line)[0] for line in lines if line.startswith("'model.")]


def test_a_plugin_that_knows_of_no_order_is_named(experiment, trained, capsys, monkeypatch):
    for owner, name in ((MultimodalBridge, "reorder_inputs"),):
        monkeypatch.delattr(owner, name)
    again = experiment(name="again")
    again.main(f"train.load_dir={trained.save_dir}", f"data.cameras={ORDER}", "train.total_steps=1")
    out = capsys.readouterr().out
    assert "warning: 'info_embedder' gets the cameras in the order ['right', 'head', 'left']" in out
    assert out.count("gets the cameras in the order") == 1


def test_components_that_take_cameras_reorder_their_weights():
    torch.manual_seed(0)
    order = [2, 0, 1]
    sizes = {"dim": 8, "layers": 1, "latent_dim": 2, "state_dim": 3, "proprio_history": 2}
    sizes |= {"num_cameras": 3, "width": 8, "depths": [1]}
    encoder = StateEncoder(**sizes)
    proprio = torch.randn(2, 2, 3)
    images = [torch.rand(2, 3, 32, 32) for _ in range(3)]
    expected = encoder(proprio, images).mu
    encoder.reorder_inputs([], order)
    now = [images[i] for i in order]
    torch.testing.assert_close(encoder(proprio, now).mu, expected)
    decoder = StateDecoder(**sizes)
    z = torch.randn(2, 1, 2)
    _, expected = decoder(z)
    decoder.reorder_inputs([], order)
    torch.testing.assert_close(decoder(z)[1], expected[:, order])
    bridge = MultimodalBridge(4, 3, 2, 8, 5, extra_visual_dims=(6, 7))
    visual = [torch.randn(2, 1, size) for size in (8, 8, 6, 7)]
    semantic = [torch.randn(2, 1, 5) for _ in range(2)]
    mask = torch.rand(2, 4) < 0.5
    expected = bridge(proprio, visual, semantic, mask)
    order = [1, 0, 3, 2]
    bridge.reorder_inputs(order, [1, 0])
    tokens = bridge(proprio, [visual[i] for i in order], semantic[::-1], mask[:, order])
    torch.testing.assert_close(tokens, expected[:, [*order, 5, 4, 6, 7]])


def test_visual_inputs_are_matched_by_kind_and_camera():
    components = {"backbone", "a_hand_extractor", "b_hand_extractor", "da3"}
    was, now = (parts.visual_inputs(components, {}, cameras) for cameras in ("abc", "bca"))
    assert was == [(0, "a"), (0, "b"), (0, "c"), (1, "a"), (1, "b"), (2, "a")]
    assert parts.matched(was, now) == [1, 2, 0, 4, 3, 5]
    assert parts.matched("abc", "ab") is None
    assert parts.matched("abc", "xcb") == [0, 2, 1]


def test_all_components_that_do_not_fit_are_listed_with_what_to_paste(
    experiment, trained, tmp_path, capsys
):
    again = experiment(name="again it's")  # a path that a shell must have quoted
    for name in ("info_embedder", "action_decoder"):
        file = again.folder / f"{name}.yaml"
        file.write_text(file.read_text().replace("ff: 32", "ff: 48"))
    own = again.folder / "backbone.safetensors"
    shutil.copy(trained.save_dir / "step_2/backbone.safetensors", own)
    load = f"train.load_dir={trained.save_dir}"
    begun = (
        f"model.component_build_args={{backbone: {{init: {json.dumps(str(own))}, freeze: true}}, "
        "action_decoder: {freeze: true}}"
    )
    with pytest.raises(UserError) as e:
        again.main(load, begun)
    for name in ("info_embedder", "action_decoder"):
        file = trained.save_dir / f"step_2/{name}.safetensors"
        assert f"{file}: not the weights of component '{name}' as configured" in str(e.value)
    capsys.readouterr()
    (setting,) = pasted(e.value)
    assert yaml.safe_load(setting.partition("=")[2]) == {
        "backbone": {"init": str(own), "freeze": True},
        "action_decoder": {"init": "scratch", "freeze": True},
        "info_embedder": {"init": "scratch"},
    }
    assert again.main(load, setting, "train.total_steps=1") == 0
    assert f"backbone: weights from {own}" in capsys.readouterr().out
    assert again.job.policy.parts.frozen == {"backbone", "action_decoder"}


def test_what_to_paste_keeps_the_entries_that_are_there():
    given = {"other": parts.Part(same_as="own"), "plain": parts.Part()}
    model = parts.Model(component_config_paths={}, component_build_args=given)
    text = "model.component_build_args={other: {same_as: own}, own: {init: scratch}}"
    assert parts.from_scratch(model, ["own"]).endswith(f"    '{text}'")


def test_a_component_that_load_dir_lacks_starts_anew_and_says_so(experiment, trained, capsys):
    again = experiment("train_vfp", "again")
    own = "model.component_build_args={vae_prior: {init: scratch}}"
    with pytest.raises(UserError, match=r"missing block\.latent\.bias"):
        again.main(f"train.load_dir={trained.save_dir}", own)
    out = capsys.readouterr().out
    file = trained.save_dir / "step_2/vae_posterior.safetensors"
    assert f"NOTICE: vae_posterior starts with RANDOM weights: {file} does not exist" in out
    assert out.count("RANDOM") == 1  # the other one was asked for


def test_opening_a_checkpoint_is_quiet(trained, capsys):
    checkpoint.open_policy(trained.save_dir)
    assert capsys.readouterr().out == ""


def infinite(kind):
    """Ruin one number of a run, of a kind that a checkpoint holds; the name of its owner."""

    def ruin(job):
        policy = job.policy
        name = next(n for n in policy.state_dict() if n.startswith("parts.action_decoder."))
        p = dict(policy.named_parameters())[name]
        if kind == "weights":
            p.view(-1)[0] = torch.inf
        elif kind == "average":
            job.average.ema[name].view(-1)[0] = torch.nan
        elif kind == "optimizer":
            job.optimizers[0].state[p]["exp_avg_sq"].view(-1)[0] = torch.inf
        else:
            next(policy.slow_posterior.parameters()).view(-1)[0] = -torch.inf

    return ruin


def ruined_at(step, ruin, monkeypatch):
    end_step = run.Run.end_step

    def ends(job, model):
        if job.step == step:
            with torch.no_grad():
                ruin(job)
        end_step(job, model)

    monkeypatch.setattr(run.Run, "end_step", ends)


KINDS = {"weights": "action_decoder", "average": "action_decoder", "optimizer": "action_decoder"}


@pytest.mark.parametrize("kind", [*KINDS, "slow"])
def test_numbers_that_are_not_finite_are_not_saved(experiment, kind, monkeypatch, capsys):
    exp = experiment("train_flow_matching" if kind in KINDS else "train_cfg_vqvae")
    ruined_at(4, infinite(kind), monkeypatch)
    every = ["train.save_every_steps=2", "train.keep_last=1"]
    with pytest.raises(SystemExit) as stopped:
        run.cli(lambda: exp.main(*every, "train.total_steps=4"))
    assert stopped.value.code == 2
    owner = KINDS.get(kind, "slow_posterior")
    error = capsys.readouterr().err
    assert f"error: step 4: not finite after the optimizer's step: {owner}. This step" in error
    assert [path.name for path in exp.save_dir.glob("*_*")] == ["step_2"]
    monkeypatch.undo()
    assert exp.main(*every, "train.total_steps=4") == 0
    assert exp.job.step == 4


@pytest.mark.parametrize("kind", KINDS)
def test_an_old_checkpoint_that_is_not_finite_is_passed_over(experiment, kind, monkeypatch, capsys):
    exp = experiment()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "not_finite", lambda *_: [])
        ruined_at(4, infinite(kind), patch)
        exp.main("train.save_every_steps=2", "train.total_steps=4")
    assert evaluated(exp, "--nfe", "1") == 0
    warning = r"warning: .*/step_4/\S*\.safetensors: .*\w not finite; step_2 is taken instead"
    assert re.search(warning, capsys.readouterr().out)
    with pytest.raises(UserError, match="not finite; take another checkpoint of this run"):
        checkpoint.open_policy(exp.save_dir / "step_4")
    assert exp.main("train.total_steps=4") == 0
    assert "step_2 at step 2 of 4" in capsys.readouterr().out
    assert exp.job.step == 4


def test_buffers_may_be_infinite(experiment, monkeypatch):
    init = TinyCNN.__init__

    def with_mask(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.register_buffer("mask", torch.full((2,), -torch.inf))

    monkeypatch.setattr(TinyCNN, "__init__", functools.wraps(init)(with_mask))
    exp = experiment()
    exp.main("train.total_steps=1")
    exp.main("train.total_steps=2")
    assert exp.job.step == 2
    policy, _ = checkpoint.open_policy(exp.save_dir)
    assert policy.parts["backbone"].block.mask.isinf().all()


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_files_have_the_mode_that_the_user_s_umask_gives(experiment, mask):
    exp = experiment()
    before = os.umask(mask)
    try:
        exp.main("train.total_steps=1", "model.component_build_args={backbone: {freeze: true}}")
    finally:
        os.umask(before)
    files = [*exp.save_dir.glob("step_1/**/*"), *exp.save_dir.glob("frozen/*")]
    assert {file.name for file in files} > {"meta.json", "backbone.safetensors", "resume"}
    for file in files:
        wanted = (0o777 if file.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(file.stat().st_mode) == wanted, file


def at(path, value):
    """A change of meta.json: the value at a path of keys; ... removes it."""

    def change(meta):
        *above, last = path
        for key in above:
            meta = meta[key]
        if value is ...:
            del meta[last]
        else:
            meta[last] = value

    return change


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


FILES = ("files", "backbone.safetensors")
HOSTILE = {
    "no script": (at(["script"], ...), r"script: this key is required \(str: training script"),
    "script": (at(["script"], ["x"]), r'script: expected str, found \["x"\]'),
    "step": (at(["step"], "2"), r'step: expected int, found "2"'),
    "negative": (at(["epoch"], -1), "epoch: expected at least 0, found -1"),
    "bool": (at(["offset"], True), "offset: expected int, found true"),
    "huge": (at(["step"], 10**30), "step: expected at most 1000000000000000, found 10{30}"),
    "nan": (at(["threads"], float("nan")), "threads: expected int, found NaN"),
    "offset": (at(["offset"], 84), "offset: expected at most 83, the samples; found 84"),
    "component": (at(["components", "../x"], "block: gate"), r"components: '\.\./x' is no name"),
    "taken": (at(["components", "frozen"], "block: gate"), "components: 'frozen' is no name"),
    "stats": (at(["components", "dataset_stats"], "x"), "components: 'dataset_stats' is no name"),
    "alias": (at(["aliases"], {"backbone": "x"}), "aliases: expected some of "),
    "frozen": (at(["frozen"], {"x": {"path": "", "sha256": ""}}), "frozen: expected some of "),
    "frozen path": (
        at(["frozen"], {"backbone": {"path": 1, "sha256": ""}}),
        "frozen.backbone.path: expected str, found 1",
    ),
    "outside": (at(["files", "../x.safetensors"], [1, "x"]), r"files: '\.\./x.* is no file of"),
    "pickle": (at(["files", "x.pt"], [1, "x"]), r"files: 'x.pt' is no file of a checkpoint"),
    "size": (at(FILES, [-1, "x"]), r"files: .*: expected \[size, sha256\], found \[-1, \"x\"\]"),
    "no file": (at(FILES, ...), "files: backbone.safetensors is missing"),
    "schedule": (at(["schedules", "x"], "adamw"), r"schedules: expected \[.*\], found \[.*'x'\]"),
    "fact": (at(["facts", "state_dim"], 10**12), "facts: expected at most 1000000, found"),
    "width": (at(["facts", "state_dim"], 7), r"(?s)dataset_stats.*state_mean is \(5,\), .*\(7,\)"),
    "horizon": (at(["facts", "action_horizon"], 7), "facts.action_horizon: expected 6, found 7"),
    "no fact": (at(["facts", "action_dim"], ...), "facts.action_dim: expected a number, found n"),
    "config": (at(["config", "loss", "kl"], 1), "step_2/meta.json: config.loss.kl: unknown key"),
    "no config": (at(["config"], {}), "config.data.cameras: expected dict.str, str., found null"),
    "cameras": (
        at(["config", "data", "cameras", "head"], 1),
        "config.data.cameras.head: expected str, found 1",
    ),
    "block": (
        at(["components", "backbone"], "block: os.system"),
        r"step_2/meta.json:backbone:1: block: no block 'os.system'",
    ),
    "python": (
        at(["components", "backbone"], "block: !!python/name:os.system x"),
        "meta.json:backbone:1: block: .* is refused",
    ),
    "deep": (at(["versions"], nested(60)), "more than 40 lists and mappings in each other"),
    "nul": (at(["config", "data", "root"], "a\0"), r"'a\\x00' is no text"),
    "surrogate": (at(["script"], "\ud800.py"), r"'\\ud800.py' is no text"),
    "counters": (at(["optimizers"], [[{"k": -2}]]), "optimizers: expected numbers up to"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_field_that_is_not_what_it_should_be_is_named(trained, case, capsys):
    change, message = HOSTILE[case]
    rewrite_meta(trained.save_dir / "step_2", change)
    error = ending(lambda: evaluated(trained), capsys)
    assert re.search(message, error), error
    assert str(trained.save_dir / "step_2") in error


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "[]", "1" * 5000, "", "nul\0", '"\\ud800"'])
def test_a_manifest_that_is_none(trained, text, capsys):
    (trained.save_dir / "step_2/meta.json").write_text(text)
    for main in (lambda: evaluated(trained), lambda: trained.main("train.total_steps=3")):
        assert "meta.json is missing or has other content than was written" in ending(main, capsys)


def replaced(name, content):
    """A file of a checkpoint with other content (a function of its tensors), its hash renewed."""

    def change(folder):
        file = folder / name
        if callable(content):
            tensors = load_file(file)
            content(tensors)
            save_file(tensors, file)
        else:
            file.write_bytes(content)
        entry = [file.stat().st_size, checkpoint.sha256(file)]
        rewrite_meta(folder, at(["files", name], entry))

    return change


def another(key, make):
    return lambda tensors: tensors.update({key: make(tensors[key])})


BIAS = "block.keypoints.bias"
MOMENT = "parts.backbone.block.keypoints.bias/exp_avg"
RAW = "parts.backbone.block.keypoints.bias"
TENSORS = {  # file, change -> message when evaluated, when resumed
    "empty": ("backbone", b"", "backbone.safetensors: not a readable safetensors file"),
    "text": ("dataset_stats", b"{}", "dataset_stats.safetensors: not a readable safetensors file"),
    "dtype": (
        "backbone",
        another("block.keypoints.bias", lambda x: x.long()),
        "backbone' as configured: block.keypoints.bias is torch.int64, expected torch.float32",
    ),
    "missing": (
        "backbone",
        lambda x: x.pop("block.keypoints.bias"),
        "missing block.keypoints.bias",
    ),
    "more": ("backbone", lambda x: x.update(y=torch.ones(1)), "unexpected y"),
    "no mean": (
        "dataset_stats",
        lambda x: x.pop("state_mean"),
        "missing state_mean",
    ),
    "infinite": (
        "dataset_stats",
        another("state_std", lambda x: x / 0),
        "dataset_stats.safetensors: state_std not finite",
    ),
    "half": ("dataset_stats", another("state_q01", lambda x: x.half()), "expected numbers of floa"),
}
RESUMED = TENSORS | {
    "moment": (
        "resume/optimizer_0",
        another(MOMENT, lambda x: x[:1]),
        rf"(?s)not the state of AdamW .*{MOMENT} is \(1,\), expected \(8,\)",
    ),
    "no moment": ("resume/optimizer_0", lambda x: x.pop(MOMENT), f"missing {MOMENT}"),
    "double": (
        "resume/optimizer_0",
        another(MOMENT, lambda x: x.double()),
        f"{MOMENT} is of torch.float64, its weights are of torch.float32",
    ),
    "stranger": (
        "resume/optimizer_0",
        lambda x: x.update({"x/exp_avg": torch.ones(1)}),
        "optimizer_0.safetensors: x is no weight of this run",
    ),
    "raw": ("resume/raw", another(RAW, lambda x: x[:1]), rf"{RAW} is \(1,\), expected \(8,\)"),
    "raw name": ("resume/raw", lambda x: x.update(y=torch.ones(1)), "raw.safetensors holds y, whi"),
}


@pytest.mark.parametrize("case", RESUMED)
def test_tensors_that_do_not_fit_are_named(trained, case, capsys):
    name, content, message = RESUMED[case]
    replaced(f"{name}.safetensors", content)(trained.save_dir / "step_2")
    mains = [lambda: trained.main("train.total_steps=3")]
    if case in TENSORS:
        mains.append(lambda: evaluated(trained))
    for main in mains:
        error = ending(main, capsys)
        assert re.search(message, error), error


def test_groups_of_optimizers_that_are_not_those_of_the_run(trained, capsys):
    rewrite_meta(trained.save_dir / "step_2", at(["optimizers", 0], []))
    error = ending(lambda: trained.main("train.total_steps=3"), capsys)
    assert "groups of optimizers: [0] in the checkpoint, [6] configured" in error


@pytest.mark.parametrize("kind", ["fifo", "folder", "link", "loop"])
@pytest.mark.parametrize("name", ["meta.json", "backbone.safetensors"])
def test_what_is_no_file_is_not_read(trained, kind, name, capsys):
    file = trained.save_dir / "step_2" / name
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero" if kind == "link" else file)
    for main in (lambda: evaluated(trained), lambda: trained.main("train.total_steps=3")):
        assert re.search(rf"{name} is missing", ending(main, capsys, seconds=20))


def test_opening_a_checkpoint_asks_no_hub(trained, monkeypatch):
    block = "block: RadioV3\nargs: {weights: nvidia/C-RADIOv3-L, channels: [1024, 3072]}"
    graph = (
        "inputs: [image]\nparams: {w: org/name}\nblocks:\n"
        "  a: {block: RadioV3, in: [$image], args: {weights: $w}}\nreturn: $a"
    )
    for text in (block, graph):
        source = Yaml.parse(text, "meta.json")
        checkpoint._leave_out_hub_ids(source)
        assert "nvidia" not in str(source.data)
        assert "org/name" not in str(source.data)
    local = Yaml.parse(f"block: x\nargs: {{weights: {json.dumps(str(trained.file))}}}", "meta.json")
    checkpoint._leave_out_hub_ids(local)
    assert local.data["args"]["weights"] == str(trained.file)


def test_the_small_components_reorder_their_cameras():
    torch.manual_seed(0)
    block = Sum(4, 3, 2, num_cameras=3, visual_size=6, semantic_dim=5)
    nn.init.normal_(block.mask_token)
    proprio = torch.randn(8, 2, 3)
    visual = [torch.randn(8, 6) for _ in range(3)]
    semantic = [torch.randn(8, 1, 5) for _ in range(3)]
    mask = torch.rand(8, 3) < 0.5
    expected = block(proprio, visual, semantic, mask)
    order = [2, 0, 1]
    block.reorder_inputs(order, order)
    now = ([x[i] for i in order] for x in (visual, semantic))
    torch.testing.assert_close(block(proprio, *now, mask[:, order]), expected)


def test_files_of_a_full_size_run_may_be_large(trained):
    folder = trained.save_dir / "step_2"
    rewrite_meta(folder, at(FILES, [20 * 2**30, "x"]))
    assert "bytes, 21474836480 were written" in checkpoint.damage(folder)
    rewrite_meta(folder, at(["optimizers"], [[{"k": 10**12, "weight_sum": 1e12}] * 6]))
    assert checkpoint.read_meta(folder)["optimizers"][0][0]["k"] == 10**12
