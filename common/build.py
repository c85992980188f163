"""Component YAML to GraphModel: named blocks, run in file order, checked before any allocation.

Arguments are checked by the annotations of a block's signature. In blocks of this project an `int`
is a size: at least 1, or 0 if that is its default. A Count may be 0, an Index also negative.

python -m common.build --list       # every block that YAML may name, with its arguments
"""

import argparse
import copy
import functools
import importlib
import inspect
import math
import os
import pkgutil
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import yaml
from torch import nn
from torch.nn.modules import module as registration

from common.config import UNIONS, ConfigError, UserError, Yaml, nearest, show, suggest, type_name

# Numbers of the dataset, which a component YAML takes by writing `null`.
FACTS = ("action_dim", "state_dim", "num_cameras", "action_horizon", "proprio_history")
LARGEST_INTEGER = 10**7  # among the arguments of a block
MOST_PIECES = 20_000  # modules and tensors of a block
Count = Annotated[int, 0]  # the annotation names the least value
Index = Annotated[int, -LARGEST_INTEGER]
_BLOCKS: dict[str, Callable] = {}


class UnknownBlock(ConfigError, KeyError):  # noqa: N818 (the name is an interface)
    """A `block:` that nothing registers."""

    __str__ = Exception.__str__  # KeyError would put the message in quotes


def block(name: str) -> Callable[[Callable], Callable]:
    """Decorator: YAML may name this nn.Module class, or function of tensors."""

    def register(made):
        here = f"{made.__module__}.{made.__qualname__}"
        if name in _BLOCKS:
            first = f"{_BLOCKS[name].__module__}.{_BLOCKS[name].__qualname__}"
            raise ConfigError(f"block '{name}' of {here} is already {first}: rename one")
        if isinstance(made, type) and not issubclass(made, nn.Module):
            raise ConfigError(f"block '{name}': {here} is no nn.Module and no function")
        _BLOCKS[name] = made
        return made

    return register


def import_plugins(names: Iterable[str]) -> None:
    """Import the modules that `plugins:` of train.yaml names, which register their blocks."""
    for name in names:
        if not all(word.isidentifier() for word in name.split(".")):
            raise ConfigError(f"plugins: {show(name)} is no module: write a name such as a.b")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as e:
            if not name.startswith(str(e.name)):
                raise  # the plugin was found, and misses a module itself
            raise ConfigError(
                f"cannot import plugin '{name}': {e}; is its folder on PYTHONPATH?"
            ) from e


@functools.cache
def _import_own_blocks() -> None:
    for module in pkgutil.iter_modules([str(Path(__file__).parent / "blocks")]):
        importlib.import_module(f"common.blocks.{module.name}")


class Step(NamedTuple):
    """A block's call: inputs by position (list) or by name (dict), nested as wanted.

    out: names of the items of a result that is a tuple; where: place in the YAML, for errors.
    """

    name: str
    inputs: list | dict
    out: list | None
    where: str


def _fill(template: Any, find: Callable[[Any], Any]) -> Any:
    """template with each text x in its lists and dicts replaced by find(x)."""
    if isinstance(template, dict):
        return {key: _fill(value, find) for key, value in template.items()}
    if isinstance(template, list):
        return [_fill(value, find) for value in template]
    return find(template)


class GraphModel(nn.Module):
    """Blocks run in order. Modules are attributes under their names, and so are functions.

    inputs: names, or None for the short form: a single block called `block`, which gets whatever
    the graph gets.
    """

    def __init__(self, inputs: list[str] | None, steps: list[Step], result: Any):
        super().__init__()
        self._inputs = inputs
        self._steps = steps
        self._result = result

    def forward(self, *args, **inputs) -> Any:
        """The component's result: a value, a tuple or a dict, as `return:` says.

        In the long form inputs go by name. A context that only passes inputs through is opened, and
        an input of None that the graph does not declare is left out.
        """
        if self._inputs is None:
            return self.block(*args, **inputs)
        if args:
            raise TypeError(f"inputs go by name: {', '.join(self._inputs)}")
        if "context" not in self._inputs:
            inputs |= inputs.pop("context", {})
        values = {k: v for k, v in inputs.items() if v is not None or k in self._inputs}
        if values.keys() != set(self._inputs):
            expected = ", ".join(self._inputs) or "none"
            found = ", ".join(values) or "none"
            raise ConfigError(f"expected the inputs {expected}; found {found}")
        for step in self._steps:
            self._call(step, values)
        result = _fill(self._result, values.__getitem__)
        return tuple(result) if isinstance(result, list) else result

    def context(self, **inputs) -> Any:
        """All that does not depend on t: the context of the block that has one, else the inputs.

        A decoder in the long form either declares `context` among its inputs, for the one block
        that computes it, or the inputs themselves (memory, z), which it gets at each call.
        """
        owner = self._context_owner()
        if owner is not None:
            return owner.context(**inputs)
        given = {name: value for name, value in inputs.items() if value is not None}
        rows = max(len(value) for value in given.values())
        # Several latents of each observation: all observations with the first, then with the next.
        return {k: v.repeat(rows // len(v), *[1] * (v.ndim - 1)) for k, v in given.items()}

    def with_latent(self, context: Any, **latent) -> Any:
        """Add a latent, z=..., to a context that was computed without."""
        owner = self._context_owner()
        if owner is not None:
            return owner.with_latent(context, **latent)
        return self.context(**context, **latent)

    def _context_owner(self) -> nn.Module | None:
        return next((made for made in self.children() if hasattr(made, "context")), None)

    def _call(self, step: Step, values: dict[str, Any]) -> None:
        function = getattr(self, step.name)
        inputs = _fill(step.inputs, values.__getitem__)
        result = function(**inputs) if isinstance(inputs, dict) else function(*inputs)
        if step.out is None:
            values[step.name] = result
            return
        several = isinstance(result, tuple | list)
        if not several or len(result) != len(step.out):
            found = f"{len(result)} results" if several else f"one {type(result).__name__}"
            raise ConfigError(
                f"{step.where}: `out` names {len(step.out)} results, the block returned {found}"
            )
        values.update(zip(step.out, result, strict=True))


class _Checked:
    """One component YAML, checked: its blocks, names, references and arguments. Allocates nothing.

    makers: block name -> (class or function, arguments, place); results: block name -> names of its
    results; values: names that $ may name so far; used: those that something names. final: whether
    all facts are there that there will be; otherwise any number stands for a fact that is missing.
    """

    def __init__(self, source: Yaml, facts: dict[str, int] | None, final: bool = True):
        self.source = source
        self.facts = facts or {}
        self.final = final
        self.error = source.error
        self.inputs: list[str] | None = None
        self.steps: list[Step] = []
        self.result: Any = None
        self.makers: dict[str, tuple] = {}
        self.results: dict[str, list] = {}
        self.params: dict[str, Any] = {}
        self.names: list[str] = []
        self.values: list[str] = []
        self.used: set[str] = set()
        data = source.data
        if "block" in data:
            self.mapping(data, (), ("block", "args"))
            args = self.filled(self.optional(data, "args", ()), ("args",))
            self.add("block", {**data, "args": args}, ())
        else:
            required = ("inputs", "blocks", "return")
            self.mapping(data, (), (*required, "params"), required)
            self.graph(data["inputs"], self.optional(data, "params", ()), data["blocks"])

    def graph(self, inputs, params, blocks):
        """The long form."""
        if not isinstance(inputs, list):
            raise self.error(("inputs",), f"expected a list of names, found {show(inputs)}")
        self.inputs = inputs
        self.params = self.filled(params, ("params",))
        for name in inputs:
            self.claim(name, ("inputs",))
        self.values = list(inputs)
        for name, entry in self.mapping(blocks, ("blocks",)).items():
            self.mapping(entry, ("blocks", name), ("block", "in", "args", "out"), ("block", "in"))
            self.results[name] = entry.get("out", [name])
            if not isinstance(self.results[name], list):
                raise self.error(
                    ("blocks", name, "out"), f"expected a list of names, found {show(entry['out'])}"
                )
        for name, entry in blocks.items():
            here = ("blocks", name)
            inputs = self.references(entry["in"], (*here, "in"))
            if not isinstance(inputs, list | dict):
                inputs = [inputs]
            self.add(name, entry, here, inputs)
        self.result = self.references(self.source.data["return"], ("return",))
        owners = [name for name, (maker, *_) in self.makers.items() if hasattr(maker, "context")]
        if owners and "context" not in self.inputs:
            message = f"block '{owners[0]}' computes a context: declare `context`, and pass it on"
            raise self.error(("inputs",), message)
        if len(owners) > 1:
            raise self.error(("blocks", owners[1]), f"'{owners[0]}' computes the context already")
        for step in self.steps:
            if not self.used.intersection(self.results[step.name]):
                raise self.error(
                    ("blocks", step.name), "nothing uses its result: drop the block, or return it"
                )
        for name in self.inputs:
            if name not in self.used:
                raise self.error(("inputs",), f"nothing uses '{name}'")
        for name in params:
            if name not in self.used:
                raise self.error(("params", name), f"nothing uses '{name}'")

    def add(self, name, entry, here, inputs=None):
        """Check one block against its signatures, and note how to make and to call it."""
        maker = self.resolve(entry["block"], (*here, "block"))
        args = self.args(self.optional(entry, "args", here), (*here, "args"))
        title = f"block '{entry['block']}'"
        parameters = list(inspect.signature(maker).parameters.values())
        if isinstance(maker, type):
            self.fit(title, parameters, (*here, "args"), {}, args)
            # pyrefly: ignore[missing-attribute]  # of an nn.Module
            forward = list(inspect.signature(maker.forward).parameters.values())[1:]
            self.fit(title, forward, (*here, "in"), inputs, {})
        else:
            self.fit(title, parameters, (*here, "args"), inputs, args)
        self.values_fit(maker, args, (*here, "args"))
        self.makers[name] = maker, args, (*here, "block")
        if inputs is None:
            return
        if hasattr(GraphModel([], [], None), name):
            raise self.error(here, f"torch modules have an attribute '{name}': choose another name")
        for result in [name, *entry.get("out", [])]:
            self.claim(result, here)
        self.values += self.results[name]
        self.steps.append(Step(name, inputs, entry.get("out"), str(self.error((*here, "out"), ""))))

    def fit(self, title, parameters, here, inputs, args):
        """Check a call against a signature's parameters.

        inputs: list by position, dict by name, None not known yet.
        """
        known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        by_name = inputs if isinstance(inputs, dict) else {}
        for section, names in (("in", by_name), ("args", args)):
            for name in names:
                if name not in known and not takes_any:
                    hint = f"{nearest(name, known)}\n    known: {', '.join(known) or 'none'}"
                    where = (*here[:-1], section, name)
                    raise self.error(where, f"{title} takes no '{name}'{hint}")
        signature = inspect.Signature(parameters)
        by_position = inputs if isinstance(inputs, list) else ()
        try:
            fits = signature.bind if inputs is not None else signature.bind_partial
            fits(*by_position, **by_name, **args)
        except TypeError as e:
            raise self.error(here, f"{title}: {e}") from e

    def values_fit(self, maker, args, here):
        """Check arguments against the annotations of a block."""
        try:
            kinds = typing.get_type_hints(_signature_owner(maker), include_extras=True)
        except NameError:  # annotations that only a type checker can read
            kinds = {}
        for name, parameter in inspect.signature(maker).parameters.items():
            required = parameter.default is parameter.empty
            least = -LARGEST_INTEGER
            if _is_ours(maker):
                least = 0 if parameter.default == 0 else 1
            elif _is_of_torch(maker) and required and kinds.get(name) is int:
                least = 1  # such as in_features
            for value in _numbers_of(args.get(name)):
                if abs(value) > LARGEST_INTEGER and isinstance(value, int):
                    problem = f"expected at most {LARGEST_INTEGER}, found {show(args[name])}"
                    raise self.error((*here, name), problem)
            if name in args and name in kinds:
                problem = misfit(kinds[name], args[name], least)
                if problem:
                    raise self.error((*here, name), f"{problem}, found {show(args[name])}")

    def claim(self, name, here):
        if not isinstance(name, str) or not name.isidentifier():
            raise self.error(here, f"{show(name)} is no name: letters, digits and _ only")
        if name in self.names or name in self.params:
            raise self.error(here, f"the name '{name}' is taken: names are never reused")
        self.names.append(name)

    def mapping(self, value, here, known=None, required=()):
        """value, if it is a mapping with the keys it may and must have."""
        if not isinstance(value, dict):
            raise self.error(here, f"expected a mapping, found {show(value)}")
        for key in value:
            if known and key not in known:
                raise self.error((*here, key), f"unknown key{suggest(key, known)}")
        for key in required:
            if key not in value:
                raise self.error(here, f"'{key}' is missing")
        return value

    def optional(self, data, key, here):
        """The mapping data[key]; an empty one if it is missing or null."""
        value = data.get(key)
        return {} if value is None else self.mapping(value, (*here, key))

    def filled(self, values, here):
        """params (or the short form's args) with null replaced by the dataset's fact."""
        filled = dict(values)
        for name in FACTS:
            if name not in values:
                continue
            value = values[name]
            fact = self.facts.get(name)
            if value is None and fact is None and not self.final:
                fact = 1
            if value is None and fact is None:
                message = "null is filled from a dataset, and none gives it: write the number"
                raise self.error((*here, name), message)
            if fact is not None and value not in (None, fact):
                message = f"{show(value)} here, but the dataset has {fact}: write null"
                raise self.error((*here, name), message)
            filled[name] = fact if value is None else value
        return filled

    def resolve(self, name, here) -> Any:
        """The class or function of a `block:`."""
        _import_own_blocks()
        known = dict(_BLOCKS)
        for kind, made in vars(nn).items():
            if isinstance(made, type) and issubclass(made, nn.Module):
                known[f"nn.{kind}"] = made
        if not isinstance(name, str) or name not in known:
            near = nearest(name, known) or f"; known: {', '.join(sorted(_BLOCKS))}, nn.*"
            message = (
                f"no block '{name}'{near}\n    `python -m common.build --list` describes all; "
            )
            message += "`plugins` in train.yaml names the modules of blocks of your own"
            raise UnknownBlock(str(self.error(here, message)))
        return known[name]

    def args(self, values, here):
        """Arguments with each $param replaced; a relative `weights` starts beside the YAML."""

        def find(value, here):
            if not isinstance(value, str) or not value.startswith("$"):
                return value
            if value[1:] not in self.params:
                raise self.error(here, f"no param '{value[1:]}'{suggest(value[1:], self.params)}")
            self.used.add(value[1:])
            return copy.deepcopy(self.params[value[1:]])

        values = {
            name: _fill(value, functools.partial(find, here=(*here, name)))
            for name, value in values.items()
        }
        weights = values.get("weights")
        if isinstance(weights, str) and weights.split("/")[0] in (".", "..", "~"):
            path = os.path.join(self.source.path.parent, os.path.expanduser(weights))
            values["weights"] = os.path.abspath(path)
        return values

    def references(self, template, here):
        """template with each "$name" replaced by the name of an input or an earlier block."""

        def find(value):
            name = value[1:] if isinstance(value, str) and value.startswith("$") else None
            if name in self.values:
                self.used.add(name)
                return name
            if name is None:
                problem = f"expected $name, found {show(value)}; constants go under `args`"
            elif name in self.params:
                problem = f"'{name}' is a param, not a tensor: params go under `args`"
            elif name in self.names:
                problem = f"'{name}' has several results: use a name of its `out`"
            elif any(name in (block, *results) for block, results in self.results.items()):
                problem = f"'{name}' is not there yet: a reference may only look back"
            else:
                problem = f"nothing is called '{name}'{suggest(name, self.values)}"
            raise self.error(here, problem)

        return _fill(template, find)


def check(source: Yaml, facts: dict[str, int]) -> None:
    """Raise ConfigError for what is wrong with a component YAML whatever its other facts are."""
    _Checked(source, facts, final=False)


def build(source: Yaml | Path | str, facts: dict[str, int] | None = None) -> GraphModel:
    """GraphModel of a component YAML. facts: the dataset's numbers, of FACTS, for `null` params.

    Everything is checked before anything is allocated; raises ConfigError with file, line and key.
    """
    checked = _Checked(source if isinstance(source, Yaml) else Yaml.read(source), facts)
    model = GraphModel(checked.inputs, checked.steps, checked.result)
    for name, (maker, args, here) in checked.makers.items():
        try:
            made = _made(maker, args)
        except Exception as e:
            # A plugin refuses an argument by ValueError; anything else is a mistake in its code.
            known = _is_ours(maker) or _is_of_torch(maker)
            problem = checked.error(here, f"{maker.__name__} refuses its arguments: {e}")
            if known or isinstance(e, ValueError):
                raise problem from e
            print(problem, file=sys.stderr)
            raise
        setattr(model, name, made)
    return model


def _is_ours(maker: Callable) -> bool:
    return maker.__module__.startswith("common.")


def _is_of_torch(maker: Callable) -> bool:
    return maker.__module__.startswith("torch.")


def _made(maker: Callable, args: dict[str, Any]) -> Any:
    """The block. A module of this project or of torch is made without memory first."""
    if not isinstance(maker, type):
        return functools.partial(maker, **args)
    if _is_ours(maker) or _is_of_torch(maker):
        with limited_size(), torch.device("meta"), torch.random.fork_rng(devices=[]):
            try:
                maker(**copy.deepcopy(args))
            except (UserError, SizeError):
                raise
            except Exception:
                pass  # some constructors compute with tensors: the real one tells what is wrong
    with limited_size():
        return maker(**args)


class SizeError(ValueError):
    """A block is larger than this machine."""


@contextmanager
def limited_size() -> Iterator[None]:
    """Raise SizeError as soon as modules that are made have too many tensors, or too large ones."""
    if torch.get_default_device().type == "meta":
        yield  # nothing is allocated
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    pieces = 0
    size = 0

    def count(owner, name, made):
        nonlocal pieces, size
        pieces += 1
        if isinstance(made, torch.Tensor):
            size += made.numel() * made.element_size()
        if size > memory:
            found = f"{memory / 2**30:.1f} GiB"
            raise SizeError(f"the weights take more than the {found} of memory of this machine")
        if pieces > MOST_PIECES:
            raise SizeError(f"it has more than {MOST_PIECES:,} layers and tensors")

    handles = [
        registration.register_module_module_registration_hook(count),
        registration.register_module_parameter_registration_hook(count),
        registration.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _signature_owner(maker: Callable) -> Callable:
    # pyrefly: ignore[missing-attribute]  # of an nn.Module
    return maker.__init__ if isinstance(maker, type) else maker


def _numbers_of(value: Any) -> Iterator[int | float]:
    """All numbers in nested lists and mappings."""
    if isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers_of(item)
    elif isinstance(value, int | float):
        yield value


def misfit(kind: Any, value: Any, least: int = -LARGEST_INTEGER) -> str:
    """The text "expected ..." if the value of an argument does not fit its annotation, or nothing.

    least: of an int; Count and Index bring their own. A list fits a tuple. Annotations that no YAML
    value can have, such as a module, take anything.
    """
    origin = typing.get_origin(kind) or kind
    inner = typing.get_args(kind)
    if origin is Annotated:
        return misfit(inner[0], value, inner[1])
    if origin in UNIONS:
        problems = [misfit(one, value, least) for one in inner]
        ranges = [problem for problem in problems if "least" in problem]
        return "" if "" in problems else [*ranges, f"expected {type_name(kind)}"][0]
    if origin is typing.Literal:
        fits = value in inner
    elif origin is float:
        fits = type(value) in (int, float) and math.isfinite(value)
    elif origin is int and type(value) is int:
        return "" if value >= least else f"expected at least {least}"
    elif origin in (int, bool, str, dict, type(None)):
        fits = type(value) is origin
    elif isinstance(origin, type) and issubclass(origin, Sequence):
        fits = isinstance(value, list)
        if fits and origin is tuple and inner and inner[-1] is not Ellipsis:
            fits = len(value) == len(inner)
        elif fits and inner:
            problems = [misfit(inner[0], item, least) for item in value]
            return next(filter(None, problems), "")
    else:
        fits = True
    return "" if fits else f"expected {type_name(kind)}"


def completed(source: Yaml, model: GraphModel) -> Yaml:
    """A component YAML with the `sizes` that its blocks took from a weights file filled in."""
    data = copy.deepcopy(source.data)
    for name, made in model.named_children():
        sizes = getattr(made, "sizes", {})
        if sizes:
            entry = data if "block" in data else data["blocks"][name]
            args = entry.get("args") or {}
            missing = {key: value for key, value in sizes.items() if args.get(key) is None}
            entry["args"] = {**args, **missing}
    if data == source.data:
        return source
    return Yaml.parse(yaml.safe_dump(data, sort_keys=False), source.path)


def argument_meanings(made: Callable) -> dict[str, str]:
    """Argument -> meaning, from the `Args:` of a block's docstring, or of its base class's."""
    for owner in getattr(made, "__mro__", (made,)):
        _, found, section = inspect.cleandoc(owner.__doc__ or "").partition("\nArgs:\n")
        if found:
            entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section, flags=re.M)
            return {name: re.sub(r"\s+", " ", meaning) for name, meaning in entries}
    return {}


def describe_blocks() -> str:
    """Every registered block: its first sentence, and its arguments with default and meaning."""
    _import_own_blocks()
    lines = []
    for made in dict.fromkeys(_BLOCKS[name] for name in sorted(_BLOCKS)):
        names = ", ".join(name for name in _BLOCKS if _BLOCKS[name] is made)
        lines += ["", names, f"  {inspect.cleandoc(made.__doc__ or '').splitlines()[0]}"]
        meanings = argument_meanings(made)
        for parameter in inspect.signature(made).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                continue
            default = ""
            if parameter.default is not parameter.empty:
                default = f" ({show(parameter.default)})"
            lines.append(f"    {parameter.name}{default}: {meanings.get(parameter.name, '')}")
    return "\n".join(lines[1:])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Describe the blocks that a component YAML may name."
    )
    parser.add_argument("--list", action="store_true", required=True, help="print every block")
    parser.parse_args(argv)
    print(describe_blocks())


if __name__ == "__main__":
    # Blocks register with common.build as it is imported, not with this run of the file.
    importlib.import_module("common.build").main()
