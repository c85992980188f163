"""Component YAML to GraphModel: named blocks, run in file order, checked before any weight is allocated."""

import copy
import functools
import importlib
import inspect
import os
import pkgutil
from pathlib import Path
from typing import NamedTuple

import yaml
from torch import nn

from common.config import ConfigError, Yaml, nearest, show, suggest

FACTS = (
    "action_dim",
    "state_dim",
    "num_cameras",
    "action_horizon",
    "proprio_history",
)  # what `null` takes from the dataset
_BLOCKS = {}


class UnknownBlock(ConfigError, KeyError):  # noqa: N818 (the name is an interface)
    """A `block:` that nothing registers."""

    __str__ = Exception.__str__  # KeyError would put the message in quotes


def block(name):
    """Decorator: makes an nn.Module class, or a function of tensors with keyword arguments, known to YAML as name."""

    def register(made):
        if name in _BLOCKS:
            first = f"{_BLOCKS[name].__module__}.{_BLOCKS[name].__qualname__}"
            raise ConfigError(
                f"block '{name}' of {made.__module__}.{made.__qualname__} is already {first}: rename one"
            )
        if isinstance(made, type) and not issubclass(made, nn.Module):
            raise ConfigError(
                f"block '{name}': {made.__qualname__} is no nn.Module and no function"
            )
        _BLOCKS[name] = made
        return made

    return register


def import_plugins(names, source=None):
    """Import the modules that `plugins:` of train.yaml names, so that they register their blocks."""
    for i, name in enumerate(names):
        try:
            importlib.import_module(name)
        except ImportError as e:
            message = f"cannot import plugin '{name}': {e}; is its folder on PYTHONPATH?"
            raise source.error(("plugins", i), message) if source else ConfigError(message) from e


@functools.cache
def _import_own_blocks():
    for module in pkgutil.iter_modules([str(Path(__file__).parent / "blocks")]):
        importlib.import_module(f"common.blocks.{module.name}")


class Step(NamedTuple):
    """One block's call. inputs: list (positional) or dict of names, nested as wanted; out: names of a tuple's items."""

    name: str
    inputs: list | dict
    out: list | None
    where: str


def _fill(template, find):
    """template with each text x in its lists and dicts replaced by find(x)."""
    if isinstance(template, dict):
        return {key: _fill(value, find) for key, value in template.items()}
    if isinstance(template, list):
        return [_fill(value, find) for value in template]
    return find(template)


def _names(template):
    """Every text in the lists and dicts of template."""
    names = []
    _fill(template, names.append)
    return names


class GraphModel(nn.Module):
    """Blocks run in order. Modules are attributes under their names; functions are too, outside of the state_dict.

    inputs: names, or None for the short form: one block called `block`, which gets whatever the graph gets.
    """

    def __init__(self, inputs, steps, result):
        super().__init__()
        self._inputs, self._steps, self._result = inputs, steps, result

    def forward(self, *args, **inputs):
        """The component's result: a value, a tuple or a dict, as `return:` says."""
        if self._inputs is None:
            return self.block(*args, **inputs)
        if args:
            raise TypeError(f"inputs go by name: {', '.join(self._inputs)}")
        self._expect(inputs, self._inputs)
        return self._run([(step, getattr(self, step.name)) for step in self._steps], inputs)

    def bind(self, **inputs):
        """Run once what depends on these inputs only; returns callable(**the other inputs) -> the result of forward.

        A block with a bind(**known) -> callable(**rest) of its own is bound where all that its bind requires is known.
        """
        if self._inputs is None:
            return (
                self.block.bind(**inputs)
                if hasattr(self.block, "bind")
                else Bound(self, None, inputs)
            )
        self._expect(inputs, [name for name in self._inputs if name in inputs])
        values, later = dict(inputs), []
        for step in self._steps:
            function = getattr(self, step.name)
            if values.keys() >= set(_names(step.inputs)):
                self._call(step, function, values)
                continue
            takes = inspect.signature(function.bind).parameters if hasattr(function, "bind") else {}
            known = {
                k
                for k in takes
                if k in step.inputs and values.keys() >= set(_names(step.inputs[k]))
            }
            if known and all(k in known or p.default is not p.empty for k, p in takes.items()):
                function = function.bind(
                    **{k: _fill(step.inputs[k], values.__getitem__) for k in known}
                )
                step = step._replace(
                    inputs={k: t for k, t in step.inputs.items() if k not in known}
                )
            later.append((step, function))
        return Bound(self, later, values)

    def _expect(self, given, names):
        if given.keys() != set(names):
            raise TypeError(
                f"expected the inputs {', '.join(names) or 'none'}; found {', '.join(given) or 'none'}"
            )

    def _call(self, step, function, values):
        inputs = _fill(step.inputs, values.__getitem__)
        result = function(**inputs) if isinstance(inputs, dict) else function(*inputs)
        if step.out is None:
            values[step.name] = result
            return
        if not isinstance(result, tuple | list) or len(result) != len(step.out):
            found = (
                f"{len(result)} results"
                if isinstance(result, tuple | list)
                else f"one {type(result).__name__}"
            )
            raise ConfigError(
                f"{step.where}: `out` names {len(step.out)} results, the block returned {found}"
            )
        values.update(zip(step.out, result, strict=True))

    def _run(self, calls, values):
        for step, function in calls:
            self._call(step, function, values)
        result = _fill(self._result, values.__getitem__)
        return tuple(result) if isinstance(result, list) else result


class Bound:
    """A GraphModel with some inputs given: the calls that are left (None: its forward) and the values known so far."""

    def __init__(self, model, calls, values):
        self.model, self.calls, self.values = model, calls, values

    def __call__(self, **rest):
        if self.calls is None:
            return self.model(**self.values, **rest)
        self.model._expect(rest, [name for name in self.model._inputs if name not in self.values])
        return self.model._run(self.calls, {**self.values, **rest})

    def detach(self):
        """The same without gradient to anything that is known; a block's own bound callable brings its detach()."""

        def cut(value):
            return value.detach() if hasattr(value, "detach") else value

        calls = self.calls and [(step, cut(function)) for step, function in self.calls]
        return Bound(self.model, calls, _fill(self.values, cut))


class _Checked:
    """One component YAML, checked: its blocks, names, references and arguments. Allocates nothing."""

    def __init__(self, source, facts):
        self.source, self.facts, self.error = source, facts or {}, source.error
        self.inputs, self.steps, self.result = None, [], None
        self.makers, self.results = (
            {},
            {},
        )  # block name -> (class or function, arguments, place); names of results
        self.params, self.names, self.values, self.used = (
            {},
            [],
            [],
            set(),
        )  # values: what $ may name so far
        data = source.data
        if "block" in data:
            self.mapping(data, (), ("block", "args"))
            args = self.filled(self.mapping(data.get("args") or {}, ("args",)), ("args",))
            self.add("block", {**data, "args": args}, ())
        else:
            self.mapping(
                data, (), ("inputs", "params", "blocks", "return"), ("inputs", "blocks", "return")
            )
            self.graph(data["inputs"], data.get("params") or {}, data["blocks"])

    def graph(self, inputs, params, blocks):
        """The long form."""
        if not isinstance(inputs, list):
            raise self.error(("inputs",), f"expected a list of names, found {show(inputs)}")
        self.inputs, self.params = (
            inputs,
            self.filled(self.mapping(params, ("params",)), ("params",)),
        )
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
            template = self.references(entry["in"], (*here, "in"))
            self.add(
                name, entry, here, template if isinstance(template, list | dict) else [template]
            )
        self.result = self.references(self.source.data["return"], ("return",))
        for step in self.steps:
            if not self.used.intersection(self.results[step.name]):
                raise self.error(
                    ("blocks", step.name), "nothing uses its result: drop the block, or return it"
                )
        for name in inputs + list(params):
            if name not in self.used:
                raise self.error(
                    ("params", name) if name in params else ("inputs",), f"nothing uses '{name}'"
                )

    def add(self, name, entry, here, inputs=None):
        """Check one block against its signatures, and note how to make and to call it."""
        maker = self.resolve(entry["block"], (*here, "block"))
        args = self.args(self.mapping(entry.get("args") or {}, (*here, "args")), (*here, "args"))
        title = f"block '{entry['block']}'"
        parameters = list(inspect.signature(maker).parameters.values())
        if isinstance(maker, type):
            self.fit(title, parameters, (*here, "args"), {}, args)
            forward = list(inspect.signature(maker.forward).parameters.values())[1:]
            self.fit(title, forward, (*here, "in"), inputs, {})
            if hasattr(maker, "bind") and isinstance(inputs, list):
                inputs = dict(zip([p.name for p in forward], inputs, strict=False))
        else:
            self.fit(title, parameters, (*here, "args"), inputs, args)
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
        """Check inputs (list: positional, dict: by name, None: unknown) and args against a signature's parameters."""
        known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        by_name = inputs if isinstance(inputs, dict) else {}
        for where in [*(("in", name) for name in by_name), *(("args", name) for name in args)]:
            if where[1] not in known and not any(p.kind is p.VAR_KEYWORD for p in parameters):
                hint = f"{nearest(where[1], known)}\n    known: {', '.join(known) or 'none'}"
                raise self.error((*here[:-1], *where), f"{title} takes no '{where[1]}'{hint}")
        signature = inspect.Signature(parameters)
        try:
            fits = signature.bind if inputs is not None else signature.bind_partial
            fits(*(inputs if isinstance(inputs, list) else ()), **by_name, **args)
        except TypeError as e:
            raise self.error(here, f"{title}: {e}") from e

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

    def filled(self, values, here):
        """params (or the short form's args) with null replaced by the dataset's fact of that name."""
        for name in [n for n in FACTS if n in values]:
            value, fact = values[name], self.facts.get(name)
            if value is None and fact is None:
                raise self.error(
                    (*here, name),
                    "null is filled from a dataset, and none gives it: write the number",
                )
            if None not in (value, fact) and value != fact:
                raise self.error(
                    (*here, name), f"{value} here, but the dataset has {fact}: write null"
                )
        return {
            name: self.facts[name] if v is None and name in FACTS else v
            for name, v in values.items()
        }

    def resolve(self, name, here):
        """The class or function of a `block:`."""
        _import_own_blocks()
        modules = {
            f"nn.{k}": v
            for k, v in vars(nn).items()
            if isinstance(v, type) and issubclass(v, nn.Module)
        }
        known = modules | _BLOCKS
        if not isinstance(name, str) or name not in known:
            near = nearest(name, known) or f"; known: {', '.join(sorted(_BLOCKS))}, nn.*"
            message = f"no block '{name}'{near}\n    `plugins` in train.yaml names the modules of blocks of your own"
            raise UnknownBlock(str(self.error(here, message)))
        return known[name]

    def args(self, values, here):
        """Arguments with each $param replaced, and a relative `weights` starting beside the YAML."""

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
        """template with each "$name" replaced by the name, which an input or an earlier block must have."""

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


def build(source, facts=None):
    """GraphModel of a component YAML (a path, or a Yaml). facts: the dataset's numbers, of FACTS, for `null` params.

    Everything is checked before anything is allocated; raises ConfigError with file, line and key.
    """
    checked = _Checked(source if isinstance(source, Yaml) else Yaml.read(source), facts)
    model = GraphModel(checked.inputs, checked.steps, checked.result)
    for name, (maker, args, here) in checked.makers.items():
        try:
            made = maker(**args) if isinstance(maker, type) else functools.partial(maker, **args)
        except (TypeError, ValueError, AssertionError) as e:
            raise checked.error(here, f"{maker.__name__} refuses its arguments: {e}") from e
        setattr(model, name, made)
    return model


def completed(source: Yaml, model: GraphModel) -> Yaml:
    """A component YAML with the `sizes` that its blocks took from a weights file, which it no longer needs."""
    data = copy.deepcopy(source.data)
    for name, made in model.named_children():
        entry, sizes = data if "block" in data else data["blocks"][name], getattr(made, "sizes", {})
        args = entry.get("args") or {}
        if sizes:
            entry["args"] = args | {
                key: value for key, value in sizes.items() if args.get(key) is None
            }
    return (
        source
        if data == source.data
        else Yaml.parse(yaml.safe_dump(data, sort_keys=False), source.path)
    )
