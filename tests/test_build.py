"""Component YAML: what it computes, and one test per mistake."""

import copy
import functools
import sys

import pytest
import torch
from fuzz import limited
from torch import nn

from common import build as module
from common.build import GraphModel, UnknownBlock, block, build, import_plugins
from common.config import ConfigError, Yaml

torch.set_num_threads(1)
CALLS = []


@block("test_scale")
def scale(x, *, by):
    CALLS.append("scale")
    return x * by


@block("test_pair")
class Pair(nn.Module):
    def __init__(self, dim, weights=None, sizes=(1,)):
        super().__init__()
        if dim <= 0:
            raise ValueError("dim must be positive")
        self.linear, self.weights, self.sizes = nn.Linear(dim, dim), weights, sizes

    def forward(self, x):
        CALLS.append("pair")
        return self.linear(x), -x


@block("test_attend")
class Attend(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.keys, self.query = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x, memory):
        return self.query(x) * self.keys(memory)


@block("test_decoder")
class Decoder(nn.Module):
    """Has a context of its own, which projects the memory once."""

    def __init__(self, dim):
        super().__init__()
        self.keys, self.query = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def context(self, memory, z=None):
        CALLS.append("keys")
        context = (self.keys(memory), None)
        return context if z is None else self.with_latent(context, z)

    def with_latent(self, context, z):
        return context[0], z

    def forward(self, x_t, t, context, prefix_mask=None):
        keys, z = context
        return self.query(x_t) * keys + t + (0 if z is None else z)


@block("test_anything")
class Anything(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, **inputs):
        return sum(inputs.values())


@pytest.fixture(autouse=True)
def clear_calls():
    CALLS.clear()


def parse(text, **facts):
    return build(Yaml.parse(text, "dir/part.yaml"), facts or None)


LONG = """\
inputs: [xt, memory]
params: {dim: 4, factor: 2.0}
blocks:
  tokens: {block: nn.Linear, in: [$xt], args: {in_features: 3, out_features: $dim}}
  projected: {block: nn.Linear, in: {input: $memory}, args: {in_features: 5, out_features: $dim}}
  twice: {block: test_scale, in: [$projected], args: {by: $factor}}
  h: {block: test_attend, in: [$tokens, $twice], args: {dim: $dim}}
  both: {block: test_pair, in: $h, out: [a, b], \
args: {dim: $dim, weights: ./w.safetensors, sizes: [1, $dim]}}
return: {first: $a, second: [$b, $tokens]}
"""


def test_forward_is_what_the_modules_compute_by_hand():
    model = parse(LONG)
    xt, memory = torch.randn(2, 3), torch.randn(2, 5)
    result = model(xt=xt, memory=memory)
    tokens = model.tokens(xt)
    h = model.h.query(tokens) * model.h.keys(2.0 * model.projected(memory))
    assert torch.equal(result["first"], model.both.linear(h))
    assert torch.equal(result["second"][0], -h)
    assert torch.equal(result["second"][1], tokens)


def test_state_dict_names_are_the_blocks_names():
    assert {key.split(".")[0] for key in parse(LONG).state_dict()} == {
        "tokens",
        "projected",
        "h",
        "both",
    }
    assert list(
        parse("block: nn.Linear\nargs: {in_features: 2, out_features: 1}").state_dict()
    ) == [
        "block.weight",
        "block.bias",
    ]


def test_args_substitute_nested_params_and_resolve_weights_beside_the_yaml(tmp_path):
    (tmp_path / "part.yaml").write_text(LONG)
    model = build(tmp_path / "part.yaml")
    assert model.both.sizes == [1, 4]
    assert model.both.weights == str(tmp_path / "w.safetensors")


OWNER = """\
inputs: [x_t, t, context]
blocks:
  scaled: {block: test_scale, in: [$x_t], args: {by: 2.0}}
  v: {block: test_decoder, in: {x_t: $scaled, t: $t, context: $context}, args: {dim: 4}}
return: $v
"""
PASSING = """\
inputs: [x_t, t, memory, z]
blocks:
  h: {block: test_attend, in: [$x_t, $memory], args: {dim: 4}}
  v: {block: test_anything, in: {a: $h, b: $t, c: $z}}
return: $v
"""


def decoder_inputs():
    return {name: torch.randn(2, 4) for name in ("x_t", "t", "memory", "z")}


@pytest.mark.parametrize("text", ["block: test_decoder\nargs: {dim: 4}", OWNER])
def test_the_context_is_that_of_the_block_that_has_one(text):
    model, inputs = parse(text), decoder_inputs()
    made = model.block if text != OWNER else model.v
    x_t = inputs["x_t"] if text != OWNER else 2 * inputs["x_t"]
    expected = made.query(x_t) * made.keys(inputs["memory"]) + inputs["t"] + inputs["z"]
    noisy = {"x_t": inputs["x_t"], "t": inputs["t"]}
    context = model.context(memory=inputs["memory"], z=inputs["z"])
    later = model.with_latent(model.context(memory=inputs["memory"]), z=inputs["z"])
    CALLS.clear()
    for found in (context, later):
        assert torch.equal(model(**noisy, context=found, prefix_mask=None), expected)
    assert "keys" not in CALLS


def test_a_decoder_without_a_context_of_its_own_gets_its_inputs_at_each_call():
    model, inputs = parse(PASSING), decoder_inputs()
    noisy = {"x_t": inputs["x_t"], "t": inputs["t"]}
    memory, z = inputs["memory"], inputs["z"]
    expected = model(**inputs)
    observed = model.context(memory=memory, z=None)
    assert observed.keys() == {"memory"}
    for context in (model.context(memory=memory, z=z), model.with_latent(observed, z=z)):
        assert torch.equal(model(**noisy, context=context, prefix_mask=None), expected)
    with pytest.raises(
        ConfigError, match=r"expected the inputs x_t, t, memory, z; found .*prefix_mask"
    ):
        model(**noisy, context=model.context(memory=memory, z=z), prefix_mask=z)
    with pytest.raises(
        ConfigError, match="expected the inputs x_t, t, memory, z; found x_t, t, memory"
    ):
        model(**noisy, context=observed)


def test_several_latents_of_each_observation_share_its_memory():
    model, inputs = parse(PASSING), decoder_inputs()
    z = torch.randn(4, 4)
    context = model.context(memory=inputs["memory"], z=z)
    assert torch.equal(context["memory"], torch.cat([inputs["memory"]] * 2))
    x_t, t = torch.randn(4, 4), torch.randn(4, 4)
    both = model(x_t=x_t, t=t, context=context)
    for rows in (slice(2), slice(2, None)):
        alone = model.context(memory=inputs["memory"], z=z[rows])
        torch.testing.assert_close(model(x_t=x_t[rows], t=t[rows], context=alone), both[rows])


def test_blocks_do_not_share_a_param_that_is_a_list():
    text = "inputs: [x]\nparams: {n: [1]}\nblocks:\n" + "".join(
        f"  {name}: {{block: test_anything, in: {{x: $x}}, args: {{sizes: $n}}}}\n" for name in "ab"
    )
    model = parse(text + "return: [$a, $b]")
    assert model.a.options == model.b.options
    assert model.a.options["sizes"] is not model.b.options["sizes"]


def test_short_form_takes_positional_and_named_inputs():
    model = parse("block: test_attend\nargs: {dim: 4}")
    x, memory = torch.randn(2, 4), torch.randn(2, 4)
    assert torch.equal(model(x, memory), model.block.query(x) * model.block.keys(memory))
    assert torch.equal(model(x, memory=memory), model(x=x, memory=memory))
    scaled = parse("block: test_scale\nargs: {by: 3.0}")
    assert torch.equal(scaled(x), 3 * x)


def test_return_forms():
    head = "inputs: [x]\nblocks:\n  a: {block: nn.Tanh, in: [$x]}\n"
    x = torch.randn(3)
    assert torch.equal(parse(head + "return: $a")(x=x), x.tanh())
    assert isinstance(parse(head + "return: [$a, $x]")(x=x), tuple)
    assert list(parse(head + "return: {y: $a}")(x=x)) == ["y"]


def test_nested_inputs_and_free_keywords():
    text = "inputs: [x]\nblocks:\n  a: {block: test_anything, in: {p: $x, q: $x}, args: {any: 1}}\n"
    assert torch.equal(parse(text + "return: $a")(x=torch.ones(2)), torch.full((2,), 2.0))


def test_deepcopy_is_independent():
    model = parse(LONG)
    twin, inputs = copy.deepcopy(model), {"xt": torch.randn(2, 3), "memory": torch.randn(2, 5)}
    nn.init.zeros_(model.both.linear.weight)
    nn.init.zeros_(model.both.linear.bias)
    assert model(**inputs)["first"].abs().sum() == 0
    assert twin(**inputs)["first"].abs().sum() > 0


def test_compiles_without_graph_breaks():
    text = LONG.replace(
        "test_scale, in: [$projected], args: {by: $factor}",
        "nn.Softplus, in: [$projected], args: {beta: $factor}",
    )
    text = text.replace(
        "test_attend, in: [$tokens, $twice], args: {dim: $dim}",
        "nn.Bilinear, in: [$tokens, $twice], "
        "args: {in1_features: $dim, in2_features: $dim, out_features: $dim}",
    )
    text = text.replace(
        "test_pair, in: $h, out: [a, b], "
        "args: {dim: $dim, weights: ./w.safetensors, sizes: [1, $dim]}",
        "nn.Linear, in: $h, args: {in_features: $dim, out_features: $dim}",
    ).replace("$a, second: [$b, ", "$both, second: [")
    model, inputs = parse(text), {"xt": torch.randn(2, 3), "memory": torch.randn(2, 5)}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(**inputs)["first"], model(**inputs)["first"])


def test_meta_device_allocates_nothing():
    huge = "block: nn.Linear\nargs: {in_features: 10000000, out_features: 10000000}"
    with torch.device("meta"):
        model = parse(huge)
    assert model.block.weight.is_meta


def test_nothing_is_made_before_everything_is_checked(monkeypatch):
    made = []
    monkeypatch.setattr(
        Pair, "__init__", functools.wraps(Pair.__init__)(lambda *a, **k: made.append(1))
    )
    with pytest.raises(ConfigError):
        parse(LONG.replace("$a, second", "$nothing, second"))
    assert not made


FACTS = """\
inputs: [x]
params:
  action_dim: null
blocks:
  v: {block: nn.Linear, in: [$x], args: {in_features: 2, out_features: $action_dim}}
return: $v
"""


def test_facts_fill_null_params():
    assert parse(FACTS, action_dim=6).v.out_features == 6
    assert parse(
        "block: test_anything\nargs: {state_dim: null, other: null}", state_dim=9
    ).block.options == {
        "state_dim": 9,
        "other": None,
    }


@pytest.mark.parametrize(
    ("text", "facts", "message"),
    [
        (FACTS, {}, "part.yaml:3: params.action_dim: null is filled from a dataset"),
        (FACTS, {"state_dim": 3}, "part.yaml:3: params.action_dim: null is filled from a dataset"),
        (
            FACTS.replace("null", "24"),
            {"action_dim": 6},
            "part.yaml:3: params.action_dim: 24 here, but the dataset has 6",
        ),
        (
            "block: test_anything\nargs:\n  num_cameras: 3",
            {"num_cameras": 2},
            "part.yaml:3: args.num_cameras: 3 here, ",
        ),
    ],
)
def test_facts_that_are_missing_or_contradicted(text, facts, message):
    with pytest.raises(ConfigError, match=message):
        parse(text, **facts)


def graph(blocks, inputs="[x]", params="{}", result="$a"):
    return f"inputs: {inputs}\nparams: {params}\nblocks:\n  {blocks}\nreturn: {result}\n"


TANH = "a: {block: nn.Tanh, in: [$x]}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "block: nn.Linaer",
            r"part.yaml:1: block: no block 'nn.Linaer'; did you mean 'nn.Linear'\?\n.*plugins",
        ),
        ("block: nn.functional", "part.yaml:1: block: no block 'nn.functional'"),
        ("block: nn.Parameter", "part.yaml:1: block: no block 'nn.Parameter'"),
        ("block: 3", "part.yaml:1: block: no block '3'"),
        ("blok: nn.Tanh", "part.yaml:1: blok: unknown key; did you mean 'blocks'"),
        ("block: nn.Tanh\nargs: []\nin: [x]", "part.yaml:3: in: unknown key"),
        ("block: nn.Tanh\nargs: [1]", r"part.yaml:2: args: expected a mapping, found \[1\]"),
        (
            "block: nn.Linear\nargs:\n  in_feature: 1",
            "part.yaml:3: args.in_feature: block 'nn.Linear' takes no 'in_feature'; "
            "did you mean 'in_features'\\?\n    known: in_features, ",
        ),
        (
            "block: nn.Linear\nargs: {in_features: 1}",
            "part.yaml:2: args: .*missing a required argument: 'out_features'",
        ),
        (
            "block: test_pair\nargs: {dim: $dim}",
            "part.yaml:2: args.dim: no param 'dim'; known: none",
        ),
        (
            "block: test_pair\nargs: {dim: 0}",
            "part.yaml:1: block: Pair refuses its arguments: dim must be positive",
        ),
        (
            "block: nn.Linear\nargs: {in_features: x, out_features: 2}",
            'part.yaml:2: args.in_features: expected int, found "x"',
        ),
        (graph(TANH).replace("return: $a\n", ""), "part.yaml:1: 'return' is missing"),
        (graph(TANH).replace("inputs: [x]\n", ""), "part.yaml:1: 'inputs' is missing"),
        (graph(TANH, inputs="x"), 'part.yaml:1: inputs: expected a list of names, found "x"'),
        (graph(TANH, inputs="[x, y]"), "part.yaml:1: inputs: nothing uses 'y'"),
        (graph(TANH, inputs="[x, x]"), "part.yaml:1: inputs: the name 'x' is taken"),
        (graph(TANH, inputs="[x, 1y]"), 'part.yaml:1: inputs: "1y" is no name'),
        (graph(TANH, params="{dim: 3}"), "part.yaml:2: params.dim: nothing uses 'dim'"),
        (graph("a: nn.Tanh"), "part.yaml:4: blocks.a: expected a mapping"),
        (graph("a: {in: [$x]}"), "part.yaml:4: blocks.a: 'block' is missing"),
        (graph("a: {block: nn.Tanh}"), "part.yaml:4: blocks.a: 'in' is missing"),
        (
            graph("a: {block: nn.Tanh, inn: [$x]}"),
            "part.yaml:4: blocks.a.inn: unknown key; did you mean 'in'",
        ),
        (
            graph("a: {block: nn.Tan, in: [$x]}"),
            "part.yaml:4: blocks.a.block: no block 'nn.Tan'; did you mean 'nn.Tanh'",
        ),
        (
            graph("a: {block: nn.Tanh, in: [x]}"),
            'part.yaml:4: blocks.a.in: expected \\$name, found "x"',
        ),
        (
            graph("a: {block: nn.Tanh, in: [$y]}"),
            "part.yaml:4: blocks.a.in: nothing is called 'y'; known: x",
        ),
        (
            graph("a: {block: nn.Tanh, in: [$a]}"),
            "part.yaml:4: blocks.a.in: 'a' is not there yet: .* only look back",
        ),
        (
            graph("a: {block: nn.Tanh, in: [$b]}\n  b: {block: nn.Tanh, in: [$a]}"),
            "part.yaml:4: .*'b' is not there yet",
        ),
        (
            graph("a: {block: nn.Tanh, in: [$d]}", params="{d: 3}"),
            "part.yaml:4: .*'d' is a param, not a tensor",
        ),
        (
            graph("a: {block: test_pair, in: [$x], args: {dim: 2}, out: [b, c]}"),
            "'a' has several results",
        ),
        (
            graph("a: {block: nn.Tanh, in: [$x, $x]}"),
            "part.yaml:4: blocks.a.in: block 'nn.Tanh': too many positional",
        ),
        (
            graph("a: {block: nn.Tanh, in: {y: $x}}"),
            "part.yaml:4: blocks.a.in.y: .*takes no 'y'\n    known: input",
        ),
        (
            graph("a: {block: test_attend, in: [$x], args: {dim: 2}}"),
            "part.yaml:4: .*missing a required argument: 'memory'",
        ),
        (graph("a: {block: test_scale, in: [$x]}"), "part.yaml:4: .*missing a required .*'by'"),
        (
            graph("a: {block: test_scale, in: [$x], args: {bye: 1}}"),
            "part.yaml:4: blocks.a.args.bye: .*did you mean 'by'",
        ),
        (
            graph("a: {block: test_scale, in: [$x], args: {by: 1, x: 1}}"),
            "part.yaml:4: .*multiple values for argument 'x'",
        ),
        (
            graph("a: {block: test_scale, in: [$x], args: {by: $c}}", params="{b: 3}"),
            "blocks.a.args.by: no param 'c'; known: b",
        ),
        (
            graph(TANH + "\n  b: {block: nn.Tanh, in: [$x]}"),
            "part.yaml:5: blocks.b: nothing uses its result",
        ),
        (graph("x: {block: nn.Tanh, in: [$x]}"), "part.yaml:4: blocks.x: the name 'x' is taken"),
        (
            graph("a: {block: nn.Tanh, in: [$x]}", params="{a: 3}"),
            "part.yaml:4: .*the name 'a' is taken",
        ),
        (
            graph("a: {block: nn.Tanh, in: [$x], out: [x]}"),
            "part.yaml:4: blocks.a: the name 'x' is taken",
        ),
        (
            graph("a: {block: nn.Tanh, in: [$x], out: b}"),
            "part.yaml:4: blocks.a.out: expected a list of names",
        ),
        (
            graph("train: {block: nn.Tanh, in: [$x]}"),
            "part.yaml:4: blocks.train: torch modules have an attribute 'train'",
        ),
        (
            graph("context: {block: nn.Tanh, in: [$x]}"),
            "torch modules have an attribute 'context'",
        ),
        (
            graph("training: {block: nn.Tanh, in: [$x]}"),
            "torch modules have an attribute 'training'",
        ),
        (graph("a-b: {block: nn.Tanh, in: [$x]}"), 'part.yaml:4: blocks.a-b: "a-b" is no name'),
        (graph(TANH, result="$c"), "part.yaml:5: return: nothing is called 'c'"),
        (graph(TANH, result="a"), 'part.yaml:5: return: expected \\$name, found "a"'),
    ],
)
def test_mistakes(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        (
            "{block: test_pair, in: [$x], args: {dim: 2}, out: [a, b, c]}",
            "the block returned 2 results",
        ),
        ("{block: nn.Tanh, in: [$x], out: [a, b, c]}", "the block returned one Tensor"),
    ],
)
def test_arity_of_out(entry, found):
    model = parse(graph(f"p: {entry}", result="[$a, $b, $c]"))
    with pytest.raises(
        ConfigError, match=f"part.yaml:4: blocks.p.out: `out` names 3 results, {found}"
    ):
        model(x=torch.randn(1, 2))


@pytest.mark.parametrize("inputs", [{}, {"x": 1}, {"xt": 1, "memory": 1, "more": 1}])
def test_forward_refuses_other_inputs(inputs):
    with pytest.raises(ConfigError, match="expected the inputs xt, memory; found"):
        parse(LONG)(**inputs)


def test_inputs_of_the_long_form_go_by_name():
    with pytest.raises(TypeError, match="inputs go by name: xt, memory"):
        parse(LONG)(torch.randn(2, 3), memory=torch.randn(2, 5))


def test_unknown_block_is_a_config_error_and_a_key_error_without_quotes():
    with pytest.raises(UnknownBlock) as caught:
        parse("block: nn.Linaer")
    assert isinstance(caught.value, ConfigError)
    assert isinstance(caught.value, KeyError)
    assert str(caught.value).startswith("dir/part.yaml:1: ")


def test_a_constructor_error_keeps_its_cause():
    with pytest.raises(ConfigError) as caught:
        parse("block: test_pair\nargs: {dim: 0}")
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_name_registers_once():
    with pytest.raises(ConfigError, match=r"'test_scale' .* is already .*scale: rename one"):
        block("test_scale")(lambda x: x)
    with pytest.raises(ConfigError, match="is no nn\\.Module"):
        block("test_other")(dict)
    assert "test_other" not in module._BLOCKS


def test_own_blocks_need_no_plugins():
    assert isinstance(parse("block: tiny_cnn"), GraphModel)


def test_plugins_register_blocks_or_say_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "plugin_of_test.py").write_text(
        "from common.build import block\n@block('from_plugin')\n"
        "def shift(x, *, by):\n    return x + by\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "_BLOCKS", dict(module._BLOCKS))
    import_plugins(["plugin_of_test"])
    assert parse("block: from_plugin\nargs: {by: 1}")(torch.zeros(1)) == 1
    del sys.modules["plugin_of_test"]
    with pytest.raises(ConfigError, match=r"cannot import plugin 'no_such_module'.*PYTHONPATH"):
        import_plugins(["no_such_module"])
    (tmp_path / "plugin_with_a_typo.py").write_text("from common.build import blocc\n")
    with pytest.raises(ImportError, match="blocc"):  # a mistake in code
        import_plugins(["plugin_with_a_typo"])


def test_a_mistake_in_a_plugin_block_keeps_its_traceback(capsys, monkeypatch):
    monkeypatch.setattr(module, "_BLOCKS", dict(module._BLOCKS))

    @block("test_mistaken")
    class Mistaken(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.size = len(dim)

    with pytest.raises(TypeError, match="has no len"):
        parse("block: test_mistaken\nargs: {dim: 2}")
    assert "part.yaml:1: block: Mistaken refuses its arguments" in capsys.readouterr().err


def test_a_graph_around_a_decoder_declares_its_context():
    decoder = "{block: mlp_action_decoder, in: {x_t: $x, t: $t, context: $c}, args: {dim: 8, "
    decoder += "layers: 1, memory_dim: 4, action_dim: 2, action_horizon: 3}}"
    with pytest.raises(ConfigError, match=r"part.yaml:1: inputs: block 'a' computes a context"):
        parse(graph(f"a: {decoder}", inputs="[x, t, c]"))


def decoder(**changed):
    args = {"dim": 16, "heads": 2, "ff": 32, "layers": 1, "action_dim": 4, **changed}
    lines = "".join(f"  {name}: {value}\n" for name, value in args.items())
    return f"block: vfp_single_action_decoder\nargs:\n{lines}"


@pytest.mark.parametrize("name", ["dim", "heads", "ff", "layers", "latent_dim"])
@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (0, "at least 1, found 0"),
        (-2, "at least 1, found -2"),
        ("true", r"int( \| null)?, found true"),
        ("x", r'int( \| null)?, found "x"'),
        (16.0, r"int( \| null)?, found 16.0"),
        (".nan", r"int( \| null)?, found NaN"),
        ("[16]", r"int( \| null)?, found \[16\]"),
        (10**8, "at most 10000000, found 100000000"),
        ("{a: [1, 100000000]}", "at most 10000000, found"),
    ],
)
def test_sizes_that_are_none(name, value, problem):
    with pytest.raises(ConfigError, match=rf"part.yaml:\d: args.{name}: expected {problem}"):
        parse(decoder(**{name: value}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (decoder(dropout=".inf"), "part.yaml:8: args.dropout: expected float, found Infinity"),
        (decoder(dropout="true"), "args.dropout: expected float, found true"),
        (decoder(causal=1), "args.causal: expected bool, found 1"),
        ("block: nn.Linear\nargs: {in_features: -1, out_features: 1}", "at least 1, found -1"),
        ("block: nn.Linear\nargs: {in_features: true, out_features: 1}", "int, found true"),
        ("block: nn.Conv2d\nargs: {in_channels: 1, out_channels: 0, kernel_size: 1}", "at least 1"),
        (
            "block: nn.AdaptiveAvgPool2d\nargs: {output_size: x}",
            r"args.output_size: expected int \| null \| tuple",
        ),
        ("block: da3\nargs: {layers: [x], depth: 2, embed_dim: 8}", "layers: expected int, found"),
        ("block: da3\nargs: {layers: [0], depth: 2, embed_dim: 0}", "embed_dim: expected at"),
        ("block: tiny_cnn\nargs: false", "part.yaml:2: args: expected a mapping, found false"),
        (
            "block: resnet_state_encoder\nargs: {dim: 8, layers: 1, latent_dim: 2, state_dim: 2, "
            "proprio_history: 1, num_cameras: 1, depths: [1, 0]}",
            r"part.yaml:2: args.depths: expected at least 1, found \[1, 0\]",
        ),
        (
            graph("a: {block: nn.Linear, in: [$x], args: {in_features: $n, out_features: 1}}",
                  params="{n: 0}"),
            "part.yaml:4: blocks.a.args.in_features: expected at least 1, found 0",
        ),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_their_annotations(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)


def test_arguments_that_do_fit():
    parse(decoder(dropout=0, latent_dim="null", prefix="true"))
    parse("block: nn.Flatten\nargs: {start_dim: -2}")
    parse("block: nn.AdaptiveAvgPool2d\nargs: {output_size: [4, null]}")
    parse("block: nn.Conv2d\nargs: {in_channels: 3, out_channels: 1, kernel_size: [1, 2]}")
    parse("block: nn.LayerNorm\nargs: {normalized_shape: [2, 3], eps: 1}")
    parse("block: nn.ZeroPad2d\nargs: {padding: [-1, 0, 1, 0]}")
    parse("block: da3\nargs: {layers: [-1, 0], depth: 2, embed_dim: 8, alt_start: -1}")
    parse("block: multimodal_bridge\nargs: {dim: 8, state_dim: 2, num_cameras: 0, visual_dim: 1, "
          "semantic_dim: 1, extra_visual_dims: [3]}")  # fmt: skip
    with pytest.raises(ConfigError, match="num_cameras: expected at least 0, found -1"):
        parse("block: multimodal_bridge\nargs: {dim: 8, state_dim: 2, num_cameras: -1, "
              "visual_dim: 1, semantic_dim: 1}")  # fmt: skip
    # A plugin's numbers are its own.
    assert parse("block: test_anything\nargs: {x: -1, y: 1e300}").block.options["x"] == -1


@pytest.mark.parametrize(
    "text",
    [
        "block: nn.Linear\nargs: {in_features: 10000000, out_features: 10000000}",
        decoder(dim=10**6),
        "block: vq_codebook\nargs: {num_codes: 10000000, latent_dim: 10000000}",
    ],
)
def test_weights_that_no_machine_holds(text, monkeypatch):
    random = torch.get_rng_state()
    made = []
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda x, *a, **k: made.append(x) or x)
    with pytest.raises(
        ConfigError,
        match=r"part.yaml:1: block: \w+ refuses its arguments: the weights take more than the "
        r"[\d.]+ GiB of memory of this machine",
    ):
        parse(text)
    assert all(x.is_meta for x in made)
    assert torch.equal(torch.get_rng_state(), random)


def test_layers_without_end(monkeypatch):
    monkeypatch.setattr(module, "MOST_PIECES", 1000)
    chunks = "latent_dim: 1, action_dim: 1, action_horizon: 1"
    for text in (
        decoder(layers=10**7),
        f"block: chunk_encoder\nargs: {{dim: 1, layers: 10000000, {chunks}}}",
        "block: da3\nargs: {layers: [-1], embed_dim: 8, depth: 10000000}",
    ):
        with (
            limited(20),
            pytest.raises(
                ConfigError, match=r"part.yaml:1: .*: it has more than 1,000 layers and tensors"
            ),
        ):
            parse(text)
    assert parse(decoder()).block is not None


def test_a_plugins_weights_are_counted_as_it_makes_them(monkeypatch):
    made = []
    monkeypatch.setattr(module, "_BLOCKS", dict(module._BLOCKS))
    monkeypatch.setattr(module, "MOST_PIECES", 100)

    @block("test_endless")
    class Endless(nn.Module):
        def __init__(self, count):
            super().__init__()
            for i in range(count):
                made.append(i)
                self.register_buffer(f"b{i}", torch.zeros(1))

    with pytest.raises(ConfigError, match="Endless refuses its arguments: it has more than 100"):
        parse("block: test_endless\nargs: {count: 1000}")
    assert len(made) == 101
    made.clear()
    parse("block: test_endless\nargs: {count: 9}")
    assert len(made) == 9  # a plugin's constructor runs once


def test_the_first_try_without_memory_draws_nothing():
    torch.manual_seed(0)
    made = parse(decoder()).state_dict()
    torch.manual_seed(0)
    by_hand = GraphModel(None, [], None)
    by_hand.block = module._BLOCKS["vfp_single_action_decoder"](16, 2, 32, 1, 4)
    assert all(torch.equal(made[name], x) for name, x in by_hand.state_dict().items())


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".x", "a..b", "a b"])
def test_names_of_plugins_that_are_no_modules(name):
    with pytest.raises(ConfigError, match=r"plugins: .* is no module: write a name such as a.b"):
        import_plugins([name])
