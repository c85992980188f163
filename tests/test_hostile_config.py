"""What a config may hold: every number has a range, and nonsense ends in one message."""

import copy
import importlib
import typing
from dataclasses import fields, is_dataclass

import huggingface_hub.constants
import numpy as np
import pytest
import yaml
from conftest import POLICIES, Experiment, forget_accelerator
from fuzz import NASTY, damaged, ending, limited, mutated, places

from common.config import ConfigError, Yaml, from_dict, load, to_dict
from common.schema import Optim

SCRIPTS = sorted({name.partition(":")[0] for name in POLICIES})


def number_keys(schema, above=()):
    """(keys, kind, bounds) of every number, and list of numbers, that a schema knows."""
    kinds = typing.get_type_hints(schema)
    for entry in fields(schema):
        kind, keys = kinds[entry.name], (*above, entry.name)
        inner = [kind, *typing.get_args(kind)]
        for section in filter(is_dataclass, inner):
            if typing.get_origin(kind) is not dict:
                yield from number_keys(section, keys)
        if {int, float, list[int], list[float]}.intersection(inner):
            yield keys, kind, entry.metadata


def config_class(script):
    return importlib.import_module(script).Config


def written(kind, bounds, value):
    """A YAML value for a key of this kind."""
    only_lists = {int, float}.isdisjoint([kind, *typing.get_args(kind)])
    if only_lists or typing.get_origin(kind) is list:
        return f"[{', '.join([value] * bounds.get('size', 1))}]"
    return value


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_has_a_range_and_a_line_of_help(script, capsys):
    found = list(number_keys(config_class(script)))
    assert len(found) > 40
    for keys, _, bounds in found:
        assert {"low", "above"}.intersection(bounds), keys
    with pytest.raises(SystemExit) as stopped:
        load(config_class(script), f"{script}.py", ["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for keys, _, _ in found:
        assert f" {'.'.join(keys)} (" in text


@pytest.fixture
def refused(experiment):
    """refused(script)(override): the error of an override, or None if it is accepted."""

    def of_script(script):
        exp = experiment(script)
        source = Yaml.read(exp.file)
        schema = config_class(script)

        def message(override):
            changed = copy.deepcopy(source)
            try:
                changed.override(override)
                from_dict(schema, changed.data, changed, f"{script}.py")
            except ConfigError as e:
                return str(e)
            return None

        assert message("seed=1") is None
        return message

    return of_script


NONSENSE = (".nan", ".inf", "-.inf", "-1e30", "1e30", str(10**30), str(-(10**30)), "true", "x")


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_number_may_be_nonsense(script, refused):
    message = refused(script)
    for keys, kind, bounds in number_keys(config_class(script)):
        for value in NONSENSE:
            override = f"{'.'.join(keys)}={written(kind, bounds, value)}"
            problem = message(override)
            assert problem, override
            assert problem.startswith(f"command line: {override}: "), problem
            assert "expected" in problem


def test_the_optimizer_of_a_component_has_the_ranges_of_all(refused):
    message = refused("train_vfp")
    here = "model.component_optims.action_decoder"
    for keys, kind, bounds in number_keys(Optim):
        for value in NONSENSE:
            for override in (
                f"{here}.{keys[0]}={written(kind, bounds, value)}",
                f"{here}={{{keys[0]}: {written(kind, bounds, value)}}}",
            ):
                assert "expected" in (message(override) or ""), override
    assert "expected 2 numbers, found [0.9]" in message(f"{here}.betas=[0.9]")
    assert "expected less than 1, found [0.9, 1.0]" in message(f"{here}.betas=[0.9, 1]")
    assert message(f"{here}.betas=[0.9, 0.95]") is None


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.ema=1.5", "expected less than 1, found 1.5"),
        ("train.clip=0", "expected more than 0, found 0.0"),
        ("loss.kl=-5", "expected at least 0, found -5.0"),
        ("loss.kl_warmup=-1", "expected at least 0, found -1.0"),
        ("loss.kl_warmup=2", "expected at most 1, found 2.0"),
        ("loss.kl=2e9", "expected at most 1000000000, found 2000000000.0"),
        ("seed=-1", "expected at least 0, found -1"),
        (f"seed={2**63}", f"expected at most {2**63 - 1}, found {2**63}"),
        (f"seed={'9' * 5000}", "expected at most 100 digits, found a number of 5000 characters"),
        (f"data.HZ=0x{'f' * 5000}", "expected at most 100 digits, found a number of 5002 char"),
        (f"data.HZ={'9' * 90}", "expected at most 1000, found 1e+90"),
        ("data.state_keys=[]", "expected 1 or more entries, found []"),
        ("data.state_keys=[a, a]", 'expected no entry twice, found ["a", "a"]'),
        ("data.episodes=[]", "expected 1 or more entries, found []"),
        ("data.val_episodes=[1, 1]", "expected no entry twice, found [1, 1]"),
        ("data.image_size=[100000, 100000]", "expected at most 4096, found [100000, 100000]"),
        ("data.augment={blur: 1.5}", "blur: expected at most 1, found 1.5"),
        ("data.augment={shift: 32}", "expected less than a side of data.image_size, found 32"),
        ("data.cameras={a/b: x}", 'a/b: "a/b" is no name: up to 60 letters, digits and _ only'),
        ("data.cameras={'': x}", '"" is no name'),
        ("model.component_config_paths={a/b: x}", '"a/b" is no name'),
        ("model.component_config_paths={../x: x}", '"../x" is no name'),
        ("model.component_config_paths={'a{0}': x}", '"a{0}" is no name'),
        ("model.component_config_paths={train: x}", "the name 'train' is taken: choose another"),
        ("model.component_config_paths={frozen: x}", "the name 'frozen' is taken"),
        ("model.component_config_paths={pop: x}", "the name 'pop' is taken"),
        ("model.component_config_paths={dataset_stats: x}", "the name 'dataset_stats' is taken"),
        (f"model.component_config_paths.action_decoder={'9' * 500}x", "no such file"),
        (".".join(["data.cameras"] + ["a"] * 5000) + "=1", "more than 50 levels deep"),
    ],
)
def test_what_was_accepted_and_made_no_sense(refused, override, problem):
    assert problem in (refused("train_vfp")(override) or "")


def test_two_names_may_share_a_camera(refused):
    assert refused("train_vfp")("data.cameras={a: x, b: x}") is None
    assert refused("train_vfp")("data.val_episodes=[]") is None


def nested(first, line):
    """YAML of anchors a0 to a9, each made of the one before."""
    return f"a0: &a0 {first}\n" + "".join(
        line.format(i=i, nine=", ".join([f"*a{i - 1}"] * 9), before=f"*a{i - 1}")
        for i in range(1, 10)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + 5000 * "[", "f.yaml:1: more than 50 levels deep"),
        ("a: " + 5000 * "[" + 5000 * "]", "f.yaml:1: more than 50 levels deep"),
        (3000 * "{", "f.yaml:1: more than 50 levels deep"),
        ("a:\n" + 3000 * "- ", "f.yaml:2: more than 50 levels deep"),
        ("".join(f"{i * ' '}a:\n" for i in range(300)), "f.yaml:50: more than 50 levels deep"),
        (nested("[x]", "a{i}: &a{i} [[[[[[[{before}]]]]]]]\n"), "more than 50 levels deep"),
        (nested("[x]", "a{i}: &a{i} [{nine}]\n"), "f.yaml:1: a5.* more than 100,000 values: each"),
        (nested("{x: 1}", "a{i}: &a{i} {{<<: [{nine}]}}\n"), "more than 100,000 values: each"),
        ("a: " + 2**20 * "x", "f.yaml:1: more than 1,048,576 characters: this is no config"),
        ("a: 1" + 100_000 * ":1", "f.yaml:1: a: expected at most 100 digits, found a number of 20"),
        ("a:\n  !!int ''", "f.yaml:1: a: !!int is refused: \"\" is no int"),
        ("a: !!float ''", "a: !!float is refused: \"\" is no float"),
        ("a: !!bool 3", "a: !!bool is refused: \"3\" is no bool"),
        ("a: !!int [1]", "a: !!int is refused: only mappings, lists, numbers"),
        ("a: !!str {=: 1}", "a: !!str is refused: only mappings, lists, numbers"),
        ("a: !!binary aGk=", "a: !!binary is refused"),
        ("a: !!set {x}", "a: !!set is refused"),
        ("a: {<<: [1]}", "a: '<<' merges a mapping, found 1"),
        ("a:\n  [b, c]: d", "f.yaml:1: a: a key must be text, found a sequence on line 2"),
        ("? {a: 1}\n: b", "f.yaml:1: a key must be text, found a mapping on line 1"),
        ('a: "\\0"', 'f.yaml:1: a: text that no file name can hold: "\\\\u0000"'),
        ('a: "\\ud800"', "f.yaml:1: a: text that no file name can hold"),
        ('"\\0": 1', "f.yaml:1: text that no file name can hold"),
        ("a: \x07", "f.yaml:1: not YAML: special characters are not allowed"),
        ("a: *b", "f.yaml:1: not YAML: found undefined alias 'b'"),
    ],
)  # fmt: skip
def test_yaml_that_asks_for_too_much_or_is_nothing_plain(text, message):
    with limited(20), pytest.raises(ConfigError, match=message):
        Yaml.parse(text, "f.yaml")


def test_yaml_within_the_limits(tmp_path):
    assert Yaml.parse("a: " + 48 * "[" + 48 * "]", "f.yaml").data["a"]
    assert Yaml.parse("1: x\nnull: y\n\u00e4: z", "f.yaml").data == {
        "1": "x",
        "null": "y",
        "\u00e4": "z",
    }
    merges = ", ".join(f"{{k{i}: {i}, k: {i}}}" for i in range(2000))
    with limited(20):
        merged = Yaml.parse(f"a: {{<<: [{merges}], k4: x}}", "f.yaml").data["a"]
    assert len(merged) == 2001
    assert (merged["k"], merged["k4"], merged["k7"]) == (0, "x", 7)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_files_of_another_encoding(tmp_path, encoding):
    file = tmp_path / "f.yaml"
    file.write_bytes("a: \u00e4\n".encode(encoding))
    with pytest.raises(ConfigError, match=r"f\.yaml(: not UTF-8 text|:1: not YAML: special chara)"):
        Yaml.read(file)
    file.write_bytes("a: \u00e4\n".encode("utf-8-sig"))
    assert Yaml.read(file).data == {"a": "\u00e4"}


def test_no_file_is_read_further_than_the_limit():
    with limited(20), pytest.raises(ConfigError, match="/dev/zero:1: more than 1,048,576 char"):
        Yaml.read("/dev/zero")


GRAPH = """\
inputs: [image]
params: {dim: 8, size: [1, 1]}
blocks:
  stem: {block: nn.Conv2d, in: [$image], args: {in_channels: 3, out_channels: $dim, kernel_size: 8,
    stride: 8}}
  grid: {block: nn.GELU, in: {input: $stem}, args: {approximate: none}}
  pool: {block: nn.AdaptiveAvgPool2d, in: [$grid], args: {output_size: $size}}
  flat: {block: nn.Flatten, in: $pool}
  summary: {block: nn.Linear, in: [$flat], args: {in_features: $dim, out_features: 16}}
return: [$grid, $summary]
"""


def as_override(config, rng):
    """`a.b.c=yaml` that replaces some value of a config by another."""
    found = list(places(config))
    container, key = found[rng.integers(len(found))]
    here = path_to(config, container, key)
    value = NASTY[rng.integers(len(NASTY))]
    if rng.integers(2):
        other, place = found[rng.integers(len(found))]
        value = other[place]
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9)
    return f"{'.'.join(here)}={text.removesuffix('...' + chr(10)).strip()}"


def path_to(config, container, key, above=()):
    """Keys of the innermost mapping entry that holds container[key]."""
    for name, value in config.items():
        here = (*above, str(name))
        if config is container and name == key:
            return here
        if value is container and isinstance(value, list):
            return here
        if isinstance(value, dict) and (found := path_to(value, container, key, here)):
            return found
    return None


def fill_in(exp):
    """Write every key that a config may have, and a graph of blocks as the backbone."""
    schema = config_class(exp.script)
    exp.config["data"] |= {"augment": {"blur": 0.5, "shift": 2}, "episodes": [0, 1, 2, 3, 5]}
    first, second, *_ = POLICIES[exp.policy]
    optim = {"peak_lr": 1e-3, "betas": [0.9, 0.99], "type": "adamw_onecycle"}
    exp.config["model"] |= {
        "component_optims": {first: optim},
        "component_build_args": {second: {"freeze": True}},
    }
    if "sinkhorn" in typing.get_type_hints(typing.get_type_hints(schema)["loss"]):
        exp.config.setdefault("loss", {})["sinkhorn"] = {"iterations": 9}
    exp.write()
    source = Yaml.read(exp.file)
    exp.config = to_dict(from_dict(schema, source.data, source, exp.script))
    exp.write()
    if "backbone" in POLICIES[exp.policy]:
        (exp.folder / "backbone.yaml").write_text(GRAPH)


def mutate(exp, rng):
    """Change one thing about an experiment: its files on disk, or the overrides, which it returns.

    The first item says what was changed.
    """
    kind = rng.choice(["train", "train", "component", "component", "override", "bytes", "swap"])
    name, other = rng.choice(list(POLICIES[exp.policy]), 2)
    part = exp.folder / f"{name}.yaml"
    if kind == "override":
        override = as_override(exp.config, rng)
        return override, [override]
    if kind == "train":
        exp.config = mutated(exp.config, rng)
        exp.write()
        return exp.file.read_text(), []
    if kind == "component":
        part.write_text(yaml.safe_dump(mutated(yaml.safe_load(part.read_text()), rng)))
    elif kind == "swap":
        part.write_text((exp.folder / f"{other}.yaml").read_text())
    else:
        part = exp.file if rng.integers(2) else part
        part.write_bytes(damaged(part.read_bytes(), rng))
    return f"{part.name}: {part.read_bytes()}", []


def try_one(seed, folder, demos, capsys):
    """A dry run of one mutated experiment ends well, or with one message."""
    rng = np.random.default_rng(seed)
    policy = rng.choice(list(POLICIES))
    exp = Experiment(folder / f"{seed}", demos, policy)
    exp.policy = policy
    if rng.integers(2):
        fill_in(exp)
    what, overrides = mutate(exp, rng)
    try:
        return ending(lambda: exp.main("--dry_run", *overrides), capsys)
    except BaseException as e:
        e.add_note(f"seed {seed}, {policy}: {what}")
        raise
    finally:
        forget_accelerator()


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No dataset is looked for on the Hub, and relative paths are in tmp_path."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def test_a_mutated_experiment_ends_with_one_message(tmp_path, demos, capsys, offline):
    messages = [try_one(seed, tmp_path, demos, capsys) for seed in range(25)]
    assert len(list(filter(None, messages))) > 8


@pytest.mark.slow
def test_many_mutated_experiments_end_with_one_message(tmp_path, demos, capsys, offline):
    for seed in range(100, 400):
        try_one(seed, tmp_path, demos, capsys)


@pytest.mark.parametrize(
    ("script", "component", "other", "message"),
    [
        ("train_vfp", "info_embedder", "vae_posterior", "does not take these inputs: is it the"),
        ("train_vfp", "action_decoder", "vae_prior", "does not take these inputs: is it the file"),
        ("train_vfp", "vae_prior", "action_decoder", "does not take these inputs: is it the file"),
        (
            "train_cfg_vqvae",
            "vqvae_codebook",
            "backbone",
            "needs a block with `codes`, TinyCNN",
        ),
        ("train_vfp_moe", "gate", "backbone", "gate: this policy needs a block with `experts`, "),
        ("train_vfp_moe", "moe_action_decoder", "vqvae_codebook", "needs a block with `experts`"),
        (
            "train_mi",
            "action_decoder",
            "state_resnet34_decoder",
            "action_decoder must return a Tensor, it returns a tuple: is it the file of another",
        ),
        (
            "train_mi",
            "state_resnet34_decoder",
            "action_decoder",
            "state_resnet34_decoder must return a tuple, it returns a Tensor",
        ),
        ("train_mi", "action_encoder", "action_decoder", "does not take these inputs"),
    ],
)
def test_the_file_of_another_component(experiment, capsys, script, component, other, message):
    exp = experiment(script)
    path = f"model.component_config_paths.{component}={exp.folder / other}.yaml"
    assert message in ending(lambda: exp.main("--dry_run", path), capsys)


def test_pictures_smaller_than_a_backbone_needs(experiment, capsys):
    exp = experiment()
    error = ending(lambda: exp.main("--dry_run", "data.image_size=[15, 32]"), capsys)
    assert "backbone.yaml): pictures of 15 x 32 are too small, it needs 16 x 16" in error


def test_pictures_of_another_size_than_a_model_of_timm_takes(experiment, capsys):
    exp = experiment()
    args = {"name": "vit_tiny_patch16_224", "depth": 1, "embed_dim": 8, "num_heads": 1}
    backbone = {"block": "timm_backbone", "args": args}
    (exp.folder / "backbone.yaml").write_text(yaml.safe_dump(backbone))
    error = ending(lambda: exp.main("--dry_run"), capsys)
    assert "backbone.yaml): timm's 'vit_tiny_patch16_224' refuses the pictures: Input h" in error
