"""train.yaml and overrides to dataclasses, and one test per mistake."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from common.config import (
    ConfigError,
    DataError,
    UserError,
    Yaml,
    describe,
    from_dict,
    key,
    load,
    nearest,
    to_dict,
)
from common.schema import Augment, Data, FlowLoss, Model, Sinkhorn, Train


@dataclass
class Term:
    weight: float = key(0.1, "how much of this term", low=0)


@dataclass
class Loss:
    kl: float = key(1.0, "weight of the KL term")
    cond_drop_prob: float = key(0.1, "probability")
    extra: Term | None = key(None, "null: not computed")
    sinkhorn: Sinkhorn | None = key(None, "K-OT")


@dataclass
class Config:
    model: Model = key(..., "the components")
    data: Data = key(..., "the demonstrations")
    train: Train = key(..., "the run")
    loss: Loss = key(Loss(), "terms of the objective")
    plugins: list[str] = key([], "modules")
    seed: int = key(0, "of everything")


TEXT = """\
seed: 1
model:
  component_config_paths:
    head_backbone: ./head.yaml
    left_backbone: ./head.yaml
    decoder: configs/decoder.yaml
  component_build_args:
    head_backbone: {freeze: true}
    left_backbone:
      same_as: head_backbone
  component_optims:
    decoder: {peak_lr: 2e-4}
data:
  root: tabletop
  HZ: 20
  augment: null
  val_episodes: [1, 2]
train:
  project_name: test
  save_dir: ~/runs/test
  optim:
    eps: 1e-10
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A script, a config folder with train.yaml, and another current folder."""
    for path in (
        "configs/exp/head.yaml",
        "configs/decoder.yaml",
        "here/mine.yaml",
        "here/head.yaml",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("block: nn.Tanh\n")
    (tmp_path / "configs/exp/train.yaml").write_text(TEXT)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def run(folder, *overrides, text=None):
    path = folder / "configs/exp/train.yaml"
    if text is not None:
        path.write_text(text)
    return load(Config, folder / "train_test.py", ["--config", str(path), *overrides])[0]


def test_a_config_is_filled_with_types_and_defaults(folder):
    cfg, options = load(
        Config,
        folder / "train_test.py",
        ["--config", str(folder / "configs/exp/train.yaml"), "--dry_run", "seed=2"],
    )
    assert options.dry_run
    assert options.config == folder / "configs/exp/train.yaml"
    assert cfg.seed == 2
    assert cfg.data.HZ == 20.0
    assert isinstance(cfg.data.HZ, float)
    assert cfg.data.val_episodes == [1, 2]
    assert cfg.train.optim.eps == 1e-10
    assert cfg.train.optim.betas == [0.9, 0.999]
    assert cfg.loss == Loss()
    assert cfg.model.component_build_args["left_backbone"].same_as == "head_backbone"
    assert cfg.model.component_optims == {"decoder": {"peak_lr": 2e-4}}
    assert Loss().extra is None
    assert Data(root="x", HZ=1.0).state_keys is not Data(root="x", HZ=1.0).state_keys


def test_paths_start_beside_the_yaml_or_the_script_or_at_home(folder):
    cfg = run(folder)
    paths = cfg.model.component_config_paths
    assert paths["head_backbone"] == folder / "configs/exp/head.yaml"
    assert paths["decoder"] == folder / "configs/decoder.yaml"
    assert cfg.train.save_dir == Path.home() / "runs/test"
    cfg = run(folder, "model.component_config_paths.decoder=./mine.yaml", "train.save_dir=../out")
    assert cfg.model.component_config_paths["decoder"] == folder / "here/mine.yaml"
    assert cfg.train.save_dir == folder / "out"
    cfg = run(folder, "model.component_config_paths.decoder=configs/exp/head.yaml")
    assert cfg.model.component_config_paths["decoder"] == folder / "configs/exp/head.yaml"


def test_root_is_a_folder_or_stays_a_name(folder):
    assert run(folder).data.root == "tabletop"
    assert run(folder, "data.root=lerobot/pusht").data.root == "lerobot/pusht"
    assert run(folder, "data.root=./mine").data.root == str(folder / "here/mine")
    assert run(folder, "data.root=~/mine").data.root == str(Path.home() / "mine")
    assert run(folder, "data.root=configs/exp").data.root == str(folder / "configs/exp")
    assert run(folder, text=TEXT.replace("tabletop", "../mine")).data.root == str(
        folder / "configs/mine"
    )


def test_init_is_scratch_or_a_file(folder):
    (folder / "w.safetensors").touch()
    args = "model.component_build_args.decoder.init="
    assert run(folder, args + "scratch").model.component_build_args["decoder"].init == "scratch"
    assert (
        run(folder, args + "w.safetensors").model.component_build_args["decoder"].init
        == folder / "w.safetensors"
    )


def test_overrides_replace_whole_mappings_and_fill_optional_sections(folder):
    cfg = run(
        folder,
        "data.augment.hue=0.05",
        "loss={extra: {weight: 2}}",
        "data.cameras={head: observation.images.head}",
    )
    assert cfg.data.augment == Augment(hue=0.05)
    assert cfg.loss == Loss(extra=Term(weight=2.0))
    assert cfg.data.cameras == {"head": "observation.images.head"}
    cfg = run(
        folder,
        "data.augment={hue: 0}",
        "data.augment={blur: 1}",
        "loss.extra.weight=1e-3",
        "train.ema=",
        "seed=7",
    )
    assert cfg.data.augment == Augment(blur=1.0)
    assert cfg.loss.extra.weight == 1e-3
    assert cfg.train.ema is None


def test_optimizer_overrides_have_the_types_of_optim(folder):
    changes = run(
        folder, "model.component_optims.decoder={peak_lr: 1, type: adamw_onecycle}"
    ).model.component_optims
    assert isinstance(changes["decoder"]["peak_lr"], float)


def test_anchors_and_merge_keys(folder):
    text = TEXT + "loss:\n  extra: &e {weight: 3}\nplugins: &p [a]\n"
    assert run(folder, text=text).plugins == ["a"]
    source = Yaml.parse(
        "a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\nc: {<<: [{x: 5}, *a]}\nd: *a\ne: {y: 7, <<: *a}",
        "f.yaml",
    )
    assert source.data["b"] == {"x": 1, "y": 3}
    assert source.data["c"] == {"x": 5, "y": 2}
    assert source.data["e"] == {"x": 1, "y": 7}
    source.data["d"]["x"] = 0
    assert source.data["a"]["x"] == 1
    assert str(source.error(("b", "y"), "m")) == "f.yaml:4: b.y: m"


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", "+1e-04", "0.1e-3", ".1e-3"])
def test_floats_without_a_point_are_floats(text):
    assert Yaml.parse(f"a: {text}", "f.yaml").data == {"a": 1e-4}


def test_to_dict_is_plain_and_reads_back(folder):
    cfg = run(folder, "data.augment={}", "loss.extra={}")
    plain = to_dict(cfg)
    assert from_dict(Config, plain) == cfg
    assert from_dict(Config, json.loads(json.dumps(plain))) == cfg
    assert from_dict(Config, Yaml.parse(yaml.safe_dump(plain), "config.yaml").data) == cfg


def test_a_mapping_without_a_source_needs_no_files_and_has_errors_without_lines(folder):
    plain = to_dict(run(folder))
    plain["model"]["component_config_paths"]["decoder"] = "/gone.yaml"
    assert from_dict(Config, plain).model.component_config_paths["decoder"] == Path("/gone.yaml")
    plain["data"]["HZ"] = "fast"
    with pytest.raises(ConfigError, match=r'data\.HZ: expected float, found "fast"'):
        from_dict(Config, plain)


def test_kinds_of_errors():
    assert issubclass(ConfigError, UserError)
    assert issubclass(ConfigError, ValueError)
    assert issubclass(DataError, UserError)
    assert nearest("hed", ["head", "left"]) == "; did you mean 'head'?"
    assert nearest("zzz", ["head"]) == ""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed: 1", "sed: 1", "1: sed: unknown key; did you mean 'seed'?"),
        ("seed: 1", "seed: 1.0", "1: seed: expected int, found 1.0"),
        ("seed: 1", "seed: true", "1: seed: expected int, found true"),
        ("seed: 1", "seed: [1]", "1: seed: expected int, found [1]"),
        ("seed: 1", "seed: 1\nseed: 2", "2: seed: duplicate key, already on line 1"),
        ("  HZ: 20", "  HZ: 20\n  HZ: 30", "16: data.HZ: duplicate key, already on line 15"),
        ("  HZ: 20", "  HZ: true", "15: data.HZ: expected float, found true"),
        ("  HZ: 20", "  HZ: '20'", '15: data.HZ: expected float, found "20"'),
        ("  HZ: 20", "  HZ: 0", "15: data.HZ: expected at least 0.01, found 0.0"),
        ("  HZ: 20", "  hz: 20", "15: data.hz: unknown key; "),
        ("  HZ: 20\n", "", "13: data.HZ: this key is required (float: "),
        ("  root: tabletop", "  root: 5", "14: data.root: expected str, found 5"),
        ("  root: tabletop", "  root: 2024-01-01", "14: data.root: !!timestamp is refused"),
        (
            "  augment: null",
            "  augment: {hu: 1}",
            "16: data.augment.hu: unknown key; did you mean 'hue'?",
        ),
        ("  augment: null", "  augment: 1", "16: data.augment: expected mapping, found 1"),
        (
            "  augment: null",
            "  cache: frame",
            '16: data.cache: expected none | frames | features, found "frame"; did',
        ),
        (
            "  augment: null",
            "  image_size: [96]",
            "16: data.image_size: expected 2 numbers, found [96]",
        ),
        (
            "  augment: null",
            "  image_size: [96, x]",
            '16: data.image_size.1: expected int, found "x"',
        ),
        (
            "  augment: null",
            "  image_size: [96, 0]",
            "16: data.image_size: expected at least 1, found [96, 0]",
        ),
        ("  augment: null", "  batch_size: 0", "16: data.batch_size: expected at least 1, found 0"),
        (
            "  augment: null",
            "  hold_keys: [grip]",
            "16: data.hold_keys: 'grip' is no state or action key",
        ),
        ("[1, 2]", "1", "17: data.val_episodes: expected a share below 1, or a list; found 1.0"),
        ("[1, 2]", "{}", "17: data.val_episodes: expected float | list[int], found {}"),
        ("[1, 2]", "[1, x]", '17: data.val_episodes: expected float | list[int], found [1, "x"]'),
        (
            "seed: 1",
            "loss: {null: 0.1}",
            "1: loss.null: is called loss.cond_drop_prob now",
        ),
        ("seed: 1", "loss: {smoothing: 0.1}", "1: loss.smoothing: unknown key; known: kl, "),
        ("seed: 1", "loss: {kl_ramp: 0.1}", "1: loss.kl_ramp: unknown key; "),
        (
            "  project_name: test",
            "  project_name: test\n  epoch: null",
            "20: train.epoch: null needs train.total_steps",
        ),
        (
            "seed: 1",
            "loss: {sinkhorn: {solver: exact, blur: 0.1}}",
            "1: loss.sinkhorn.blur: solver: exact does not use it",
        ),
        (
            "seed: 1",
            "loss: {sinkhorn: {solver: exact, iterations: 30}}",
            "1: loss.sinkhorn.iterations: solver: exact does not use it",
        ),
        ("  project_name: test", "", "18: train.project_name: this key is required (str: "),
        (
            "    eps: 1e-10",
            "    type: adam",
            "22: train.optim.type: expected adamw_warmup_cosine_decay | ",
        ),
        (
            "./head.yaml",
            "./heat.yaml",
            "4: model.component_config_paths.head_backbone: no such file: ",
        ),
        (
            "    head_backbone: {",
            "    head_backbon: {",
            "8: model.component_build_args.head_backbon: no such component; "
            "did you mean 'head_backbone'?",
        ),
        (
            "freeze: true",
            "frozen: true",
            "8: model.component_build_args.head_backbone.frozen: unknown key; ",
        ),
        (
            "freeze: true",
            "init: ./w",
            "8: model.component_build_args.head_backbone.init: no such file: ",
        ),
        (
            "same_as: head_backbone",
            "same_as: head",
            "10: model.component_build_args.left_backbone.same_as: "
            "no component 'head'; known: head_backbone, left_backbone, decoder",
        ),
        (
            "same_as: head_backbone",
            "same_as: left_backbone",
            "10: model.component_build_args.left_backbone.same_as: "
            "'left_backbone' is shared itself",
        ),
        (
            "freeze: true",
            "same_as: left_backbone",
            "8: model.component_build_args.head_backbone.same_as: 'left_backbone' is shared itself",
        ),
        (
            "same_as: head_backbone",
            "same_as: head_backbone\n      freeze: true",
            "9: model.component_build_args.left_backbone: "
            "init and freeze are those of 'head_backbone'",
        ),
        (
            "    decoder: {",
            "    decode: {",
            "12: model.component_optims.decode: no such component; did you",
        ),
        (
            "    decoder: {",
            "    head_backbone: {",
            "12: model.component_optims.head_backbone: "
            "'head_backbone' is frozen: it has no optimizer",
        ),
        (
            "    decoder: {",
            "    left_backbone: {",
            "12: model.component_optims.left_backbone: "
            "'left_backbone' is the same as 'head_backbone'",
        ),
        ("{peak_lr: 2e-4}", "{lr: 2e-4}", "12: model.component_optims.decoder.lr: unknown key; "),
        (
            "{peak_lr: 2e-4}",
            "{peak_lr: x}",
            '12: model.component_optims.decoder.peak_lr: expected float, found "x"',
        ),
        ("{peak_lr: 2e-4}", "3", "12: model.component_optims.decoder: expected dict, found 3"),
        ("  optim:", "\toptim:", "21: not YAML: found character '\\t'"),
        ("[1, 2]", "[1, 2", "18: not YAML: "),
        (
            "seed: 1",
            "seed: !!python/object/apply:os.system [exit 1]",
            "1: seed: !!python/object/apply:os.system is",
        ),
        ("seed: 1", "seed: !!int x", "1: seed: !!int is refused"),
        ("seed: 1", "seed: &a [*a]", "1: seed.0: an anchor must not contain itself"),
        ("seed: 1", "seed: {<<: 3}", "1: seed: '<<' merges a mapping, found 3"),
        (TEXT, "", "1: expected a mapping, found nothing: the file is empty"),
        (TEXT, "# nothing\n", "1: expected a mapping, found nothing: the file is empty"),
        (TEXT, "- a\n", '1: expected a mapping, found ["a"]'),
        (TEXT, "a: 1\n---\nb: 2\n", "2: not YAML: "),
        (TEXT, "a: 1\nb: \0\n", "2: not YAML: special characters are not allowed"),
        (
            TEXT,
            "seed: 1\n",
            "1: model.component_config_paths: this key is required (dict[str, path]: ",
        ),
    ],
)
def test_mistakes_in_the_file(folder, old, new, message):
    assert old in TEXT
    with pytest.raises(ConfigError, match=re.escape(f"train.yaml:{message}")):
        run(folder, text=TEXT.replace(old, new, 1))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.rot=x", "unknown key; did you mean 'root'?"),
        ("dat.root=x", "unknown key; did you mean 'data'?"),
        ("data.HZ=fast", 'expected float, found "fast"'),
        ("data.root.x=1", 'data.root is "tabletop", not a mapping'),
        ("data.augment.hu=1", "unknown key; did you mean 'hue'?"),
        ("data.augment={hu: 1}", "hu: unknown key; did you mean 'hue'?"),
        ("data={root: x}", "HZ: this key is required"),
        ("data.episodes=[1", "value:1: not YAML: "),
        ("seed=!!python/name:os.system", "value:1: !!python/name:os.system is refused"),
        ("loss=", "expected mapping, found null"),
        ("train.optim.type=adam", "expected adamw_warmup_cosine_decay | "),
        ("model.component_optims.head_backbone.peak_lr=1", "'head_backbone' is frozen"),
        ("model.component_config_paths.decoder=./no.yaml", "no such file"),
    ],
)
def test_mistakes_in_an_override(folder, override, message):
    with pytest.raises(ConfigError, match="^" + re.escape(f"command line: {override}: {message}")):
        run(folder, override)


def test_an_override_that_replaces_a_mapping_owns_its_lines(folder):
    with pytest.raises(
        ConfigError, match=r"^command line: data={root: x, HZ: a}: HZ: expected float"
    ):
        run(folder, "data.augment.hue=1", "data={root: x, HZ: a}")
    with pytest.raises(ConfigError, match=r"train.yaml:15: data.HZ: expected float"):
        run(folder, "data.augment.hue=1", text=TEXT.replace("20", "x"))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file or directory"):
        Yaml.read(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        Yaml.read(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: not UTF-8 text"):
        Yaml.read(tmp_path / "latin.yaml")


def test_nothing_is_executed(tmp_path):
    with pytest.raises(ConfigError, match="refused"):
        Yaml.parse(f"a: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']", "f.yaml")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: --config"),
        (["--config", "x.yaml", "--data.root=x"], "unrecognized arguments: --data.root=x"),
        (["--conf", "TRAIN"], "the following arguments are required: --config"),
        (["--config", "TRAIN", "data"], "'data' is no override: write key=value"),
    ],
)
def test_a_wrong_command_line_exits_with_2(folder, capsys, argv, message):
    argv = [str(folder / "configs/exp/train.yaml") if a == "TRAIN" else a for a in argv]
    with pytest.raises(SystemExit) as caught:
        load(Config, folder / "train_test.py", argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_prints_every_key_with_type_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as caught:
        load(Config, "train_test.py", ["--help"], "What this script does.")
    assert caught.value.code == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "usage: train_test.py --config FILE" in text
    assert "What this script does." in text
    for line in (
        "loss.kl (float; default 1.0): weight of the KL term",
        "loss.extra.weight (float; default 0.1): how much of this term",
        "data.root (str; required): a LeRobot folder",
        "data.image_size (list[int]; default [240, 320]): [height, width]",
        "data.augment.hue (float; default 0.1)",
        'data.normalize (mean_std | quantile; default "mean_std")',
        "model.component_config_paths (dict[str, path]; required)",
        "model.component_build_args.NAME.init (scratch | path | null; default null)",
        "train.optim.type "
        "(adamw_warmup_cosine_decay | adamw_onecycle | schedule_free_radam; default",
        "train: the run",
        "seed (int; default 0): of everything",
    ):
        assert line in text, line


def test_every_key_of_the_schema_has_a_meaning():
    for line in describe(Config):
        assert re.match(r"\s*[\w.]+( \(.*\))?: \S", line, re.DOTALL), line


def test_null_limits_nothing_and_never_comes(folder):
    never = ["train.epoch=null", "train.total_steps=9", "train.val_every=null"]
    cfg = run(folder, *never, "train.save_every=null", "loss.sinkhorn={solver: exact, blur: 0.05}")
    train = cfg.train
    assert (train.epoch, train.total_steps, train.val_every, train.save_every) == (
        None, 9, None, None
    )  # fmt: skip
    assert cfg.loss.sinkhorn.solver == "exact"


def test_the_loss_of_a_flow_policy_extends_that_of_all(folder):
    @dataclass
    class Mine(FlowLoss):
        camera_dropout: float = key(0.0, "another default", low=0, high=1)
        kl: float = key(1.0, "of its own")

    assert from_dict(Mine, {"draws": 2}) == Mine(draws=2, camera_dropout=0.0)
    assert [line.split()[0] for line in describe(Mine)] == [
        "target", "draws", "camera_dropout", "prefix", "kl",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="draws: expected at least 1, found 0"):
        from_dict(Mine, {"draws": 0})


NAIVE = ["info_embedder", "action_decoder"]
VFP = [*NAIVE, "vae_posterior", "vae_prior"]
CODES = ["info_encoder", "action_decoder", "vqvae_posterior", "vqvae_codebook", "vqvae_prior"]
EXPERTS = ["info_embedder", *CODES[2:], "gate", "moe_action_decoder"]
SCORER = ["state_resnet34_encoder", "state_resnet34_decoder", "action_encoder", "action_decoder"]
SHIPPED = {
    "train_flow_matching.py": NAIVE,
    "train_vfp.py": VFP,
    "train_cfg_vqvae.py": CODES,
    "train_vfp_moe.py": EXPERTS,
    "train_mi.py": SCORER,
}


def load_as(folder, script, declared, listed, head="", **more):
    """Load a config that lists components with a script whose Config declares components."""

    @dataclass
    class Declaring(Config):
        components: ClassVar[tuple[str, ...]] = declared

    paths = "".join(f"    {name}: ./head.yaml\n" for name in ["backbone", *listed])
    text = f"{head}model:\n  component_config_paths:\n{paths}" + TEXT[TEXT.index("data:") :]
    path = folder / "configs/exp/train.yaml"
    path.write_text(text)
    return load(Declaring, folder / script, ["--config", str(path)])


@pytest.mark.parametrize("script", SHIPPED)
@pytest.mark.parametrize("owner", SHIPPED)
def test_a_config_tells_its_script(folder, script, owner):
    if owner == script:
        load_as(folder, script, SHIPPED[script], SHIPPED[owner])
        return
    with pytest.raises(ConfigError, match=rf"train.yaml lists .*: this is a config of {owner}$"):
        load_as(folder, script, SHIPPED[script], SHIPPED[owner], "loss: {unknown: 1}\n")


def test_a_fork_takes_the_components_that_it_declares(folder):
    load_as(folder, "train_mine.py", [*VFP, "gate"], [*VFP, "gate", "judge"])
    load_as(folder, "train_mine.py", VFP, NAIVE)  # its latent is optional
    load_as(folder, "train_vfp.py", [*NAIVE, "my_posterior"], [*NAIVE, "my_posterior"])
    load_as(folder, "train_vfp.py", None, EXPERTS)
    with pytest.raises(ConfigError, match=r"lists 'gate': this is a config of train_vfp_moe.py$"):
        load_as(folder, "train_mine.py", VFP, [*VFP, "gate"])


EXPERIMENTS = sorted((Path(__file__).parents[1] / "configs").glob("*/exp*/train*.yaml"))


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: "/".join(file.parts[-3:-1]))
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_a_full_size_batch_divides_by_processes_and_micro_steps(file, processes):
    data = Yaml.read(file).data
    assert data["data"]["batch_size"] % (processes * data["train"].get("micro_steps", 1)) == 0


def test_there_are_full_size_experiments():
    assert len(EXPERIMENTS) == 8
