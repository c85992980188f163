"""train.yaml to dataclasses: YAML, dotted overrides, errors that name file, line and key."""

import argparse
import contextlib
import copy
import difflib
import json
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterable
from dataclasses import MISSING, asdict, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

Keys = tuple[str | int, ...]  # from the top of a YAML to one of its values


class UserError(Exception):
    """A user's mistake: scripts print it as one message and exit with code 2."""


class ConfigError(UserError, ValueError):
    """A mistake in a YAML file, an override or a component."""


class DataError(UserError, ValueError):
    """A mistake in a dataset."""


def nearest(name: Any, known: Iterable) -> str:
    """The text "; did you mean 'x'?" with the closest of the known names, or nothing."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], 1)
    return f"; did you mean '{close[0]}'?" if close else ""


def suggest(name: Any, known: Iterable) -> str:
    """The text of nearest(), or all known names if none is close."""
    return nearest(name, known) or f"; known: {', '.join(map(str, known)) or 'none'}"


def show(value: Any) -> str:
    """A value as it stands in YAML's flow style, shortened."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


# A YAML file above any of these limits is refused: no config comes near, and a few lines of anchors
# that contain each other could ask for more memory than any machine has.
MOST_CHARACTERS = 2**20
MOST_VALUES = 100_000  # with each anchor counted as often as it is used
MOST_LEVELS = 50
MOST_DIGITS = 100


class _Excess(yaml.MarkedYAMLError):
    """YAML above one of the limits."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1, in which 1e-4 is a number, up to MOST_LEVELS deep."""

    level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.level += 1
        if self.level > MOST_LEVELS:
            mark = self.peek_event().start_mark
            raise _Excess(problem=f"more than {MOST_LEVELS} levels deep", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.level -= 1
        return node


_TAG = "tag:yaml.org,2002:"
_SCALARS = [_TAG + kind for kind in ("null", "bool", "int", "float", "str")]
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+\Z")
_Loader.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))


class Yaml:
    """One parsed YAML file that knows where each key stands.

    data: plain values (anchors copied). path: as the user wrote it. text: the file's text.
    places: path of keys -> its line, or the text of the command-line override that set it. Raises
    ConfigError for what is not YAML, is above a limit, or is neither mapping, list, number, boolean
    nor text.
    """

    def __init__(self, text: str, path: Path | str):
        self.text = text
        self.path = Path(path)
        self.places: dict[Keys, int | str] = {(): 1}
        self._count = 0
        if len(text) > MOST_CHARACTERS:
            raise self.error((), f"more than {MOST_CHARACTERS:,} characters: this is no config")
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
        except yaml.YAMLError as e:
            mark = getattr(e, "problem_mark", None)
            line = mark.line if mark else text.count("\n", 0, getattr(e, "position", 0))
            self.places[()] = line + 1
            problem = getattr(e, "problem", None) or getattr(e, "reason", e)
            kind = "" if isinstance(e, _Excess) else "not YAML: "
            raise self.error((), f"{kind}{problem}") from e
        self.data: Any = self._value(loader, node, (), ()) if node else None

    @classmethod
    def read(cls, path: Path | str) -> "Yaml":
        """The mapping in a file. Raises ConfigError if there is none."""
        try:
            with Path(path).open(encoding="utf-8") as file:
                text = file.read(MOST_CHARACTERS + 1)
            return cls.parse(text, path)
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"{path}: {getattr(e, 'strerror', 'not UTF-8 text')}") from e

    @classmethod
    def parse(cls, text: str, path: Path | str) -> "Yaml":
        """The mapping in text; errors name path."""
        source = cls(text, path)
        if not isinstance(source.data, dict):
            found = "nothing: the file is empty" if source.data is None else show(source.data)
            raise source.error((), f"expected a mapping, found {found}")
        return source

    def _value(self, loader, node, keys, above) -> Any:
        """Plain value of a node. Tags and anchors inside themselves are refused."""
        self.places.setdefault(keys, node.start_mark.line + 1)
        self._count += 1
        if self._count > MOST_VALUES:
            problem = "each anchor counts as often as it is used"
            raise self.error(keys, f"more than {MOST_VALUES:,} values: {problem}")
        if node in above:
            raise self.error(keys, "an anchor must not contain itself")
        above = (*above, node)
        if len(above) > MOST_LEVELS:
            raise self.error(keys, f"more than {MOST_LEVELS} levels deep")
        if node.tag == _TAG + "seq" and isinstance(node, yaml.SequenceNode):
            items = enumerate(node.value)
            return [self._value(loader, item, (*keys, i), above) for i, item in items]
        if node.tag == _TAG + "map" and isinstance(node, yaml.MappingNode):
            return self._mapping(loader, node, keys, above)
        if node.tag in _SCALARS and isinstance(node, yaml.ScalarNode):
            return self._scalar(loader, node, keys)
        raise self.error(
            keys,
            f"{node.tag.replace(_TAG, '!!')} is refused: only mappings, lists, numbers, booleans "
            "and (quoted) text are read",
        )

    def _scalar(self, loader, node, keys) -> Any:
        """A number, a boolean, null or text."""
        kind = node.tag.removeprefix(_TAG)
        if kind in ("int", "float") and len(node.value) > MOST_DIGITS:
            found = f"a number of {len(node.value)} characters"
            raise self.error(keys, f"expected at most {MOST_DIGITS} digits, found {found}")
        if kind == "str":
            return self._text(node, keys)
        try:
            return loader.construct_object(node)
        except (ValueError, LookupError) as e:
            raise self.error(keys, f"!!{kind} is refused: {show(node.value)} is no {kind}") from e

    def _text(self, node, keys) -> str:
        """The text of a node. NUL and lone surrogates are refused: no file name can hold them."""
        text = node.value
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise self.error(keys, f"text that no file name can hold: {json.dumps(text)[:60]}")
        return text

    def _mapping(self, loader, node, keys, above) -> dict:
        """Plain dict of a mapping node, with `<<` merged. Duplicate keys are refused."""
        data = {}
        merged = []
        for key, item in node.value:
            if key.tag == _TAG + "merge":
                for one in item.value if isinstance(item, yaml.SequenceNode) else [item]:
                    value = self._value(loader, one, keys, above)
                    if not isinstance(value, dict):
                        raise self.error(keys, f"'<<' merges a mapping, found {show(value)}")
                    merged.append(value)
                continue
            if not isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                raise self.error(keys, f"a key must be text, found a {key.id} on line {line}")
            here = (*keys, self._text(key, keys))
            first = self.places.get(here)
            self.places[here] = key.start_mark.line + 1
            if here[-1] in data:
                raise self.error(here, f"duplicate key, already on line {first}")
            data[here[-1]] = self._value(loader, item, here, above)
        filled = {}
        for value in reversed(merged):  # of several, the first one counts
            filled.update(value)
        return {**filled, **data}

    def override(self, text: str) -> None:
        """Apply one `a.b=yaml` of the command line; it replaces whatever is there."""
        name, _, value = text.partition("=")
        keys = tuple(name.strip().split("."))
        if len(keys) > MOST_LEVELS:
            raise ConfigError(f"command line: {show(text)}: more than {MOST_LEVELS} levels deep")
        data = self.data
        for i, key in enumerate(keys[:-1], 1):
            if data.get(key) is None:
                data[key] = {}
                self.places[keys[:i]] = text
            data = data[key]
            if not isinstance(data, dict):
                parent = ".".join(keys[:i])
                raise ConfigError(f"command line: {text}: {parent} is {show(data)}, not a mapping")
        try:
            data[keys[-1]] = Yaml(value, "value").data
        except ConfigError as e:
            raise ConfigError(f"command line: {text}: {e}") from e
        for place in [place for place in self.places if place[: len(keys)] == keys]:
            del self.places[place]
        self.places[keys] = text

    def place(self, keys: Keys) -> tuple[int | str, int]:
        """(line or override text, number of its keys) of the longest known start of keys."""
        known = next(n for n in range(len(keys), -1, -1) if tuple(keys[:n]) in self.places)
        return self.places[tuple(keys[:known])], known

    def error(self, keys: Keys, message: str) -> ConfigError:
        """ConfigError "path/file.yaml:14: a.b.c: message", or "command line: a.b=1: message"."""
        place, known = self.place(keys)
        where = f"{self.path}:{place}"
        if isinstance(place, str):
            where = f"command line: {place}"
            keys = keys[known:]
        return ConfigError(": ".join(filter(None, [where, ".".join(map(str, keys)), message])))


LARGEST = 10**9  # of numbers whose key sets no bound of its own
NAME = re.compile(r"\w{1,60}")  # names files and attributes, too


def key(default: Any, meaning: str, **bounds) -> Any:
    """A field of a schema.

    default: ... if the key is required. meaning: for --help. bounds: of a number, or of each number
    of a list, low and high (at least, at most) or above and below (more than, less than); without
    an upper one, LARGEST. Of a list: size, or least, numbers of its entries; unique, for no entry
    twice. names: true if the keys of a mapping are names, of letters, digits and _.
    """
    made: dict[str, Any] = {"kw_only": True, "metadata": {"meaning": meaning, **bounds}}
    if default is not ...:
        made["default_factory"] = lambda: copy.deepcopy(default)
    return field(**made)


RENAMED = {  # keys of earlier versions
    "loss.null": "loss.cond_drop_prob",
    "loss.null_from": "loss.cond_drop_from",
    "loss.smoothing": "loss.label_smoothing",
    "loss.kl_ramp": "loss.kl_warmup",
}
MOVED = {  # keys of `loss` that the first version's train_vfp.py had, too
    "train_vfp_moe.py": ("top_k", "sigma", "load_balance", "router_z"),
    "train_cfg_vqvae.py or train_vfp_moe.py": ("commitment", "posterior_ema", "revive_every"),
}
UNIONS = (typing.Union, types.UnionType)


class Reader:
    """Turns plain values into the types of a schema.

    A schema class may define check(reader, keys) for rules that types cannot express. It runs if a
    source is given.
    """

    def __init__(self, source: Yaml | None, script: Path | str | None):
        self.given = source is not None
        self.source = source or Yaml("", "config")
        self.folder = Path(script).resolve().parent if script else Path.cwd()
        self.error = self.source.error

    def path(self, text: str, keys: Keys) -> Path:
        """Absolute path of text.

        ./ and ../ start beside the YAML (of an override: in the current folder), all other relative
        paths in the script's folder.
        """
        folder = self.folder
        if text.split("/")[0] in (".", ".."):
            folder = "" if isinstance(self.source.place(keys)[0], str) else self.source.path.parent
        return Path(os.path.abspath(os.path.join(folder, os.path.expanduser(text))))

    def read(self, kind: Any, value: Any, keys: Keys) -> Any:
        """value as the type kind; raises ConfigError with the value found and the type expected."""
        origin = typing.get_origin(kind)
        args = typing.get_args(kind)
        if value is None and type(None) in args:
            return None
        if origin in UNIONS:
            kinds = [k for k in args if k is not type(None)]
            if len(kinds) == 1:
                return self.read(kinds[0], value, keys)
            for one in kinds:
                with contextlib.suppress(ConfigError):
                    return self.read(one, value, keys)
        elif is_dataclass(kind) and isinstance(value, dict):
            return self.section(kind, value, keys)
        elif origin is Literal and value in args:
            return value
        elif origin is list and isinstance(value, list):
            return [self.read(args[0], item, (*keys, i)) for i, item in enumerate(value)]
        elif origin is dict and isinstance(value, dict):
            return {name: self.read(args[1], item, (*keys, name)) for name, item in value.items()}
        elif kind is Path and isinstance(value, str):
            return self.path(value, keys)
        elif kind is float and type(value) in (int, float):
            if not -sys.float_info.max <= value <= sys.float_info.max:
                raise self.error(keys, f"expected a finite number, found {show(value)}")
            return float(value)
        elif type(value) is kind:
            return value
        problem = f"expected {type_name(kind)}, found {show(value)}{nearest(value, args)}"
        raise self.error(keys, problem)

    def section(self, schema: type, mapping: dict, keys: Keys) -> Any:
        """The dataclass schema from a mapping."""
        kinds = typing.get_type_hints(schema)
        given = dict(mapping)
        for entry in fields(schema):
            if entry.name in given or entry.default_factory is not MISSING:
                continue
            kind = kinds[entry.name]
            if not is_dataclass(kind):
                self._known_keys(schema, mapping, keys)
                what = f"{type_name(kind)}: {entry.metadata['meaning']}"
                raise self.error((*keys, entry.name), f"this key is required ({what})")
            given[entry.name] = {}
        section = schema(**self.changes(schema, given, keys))
        if self.given and hasattr(section, "check"):
            section.check(self, keys)
        return section

    def changes(self, schema: type, mapping: dict, keys: Keys) -> dict:
        """Some keys of the dataclass schema, each read as section() reads it."""
        kinds = typing.get_type_hints(schema)
        values = {}
        for name, entry in self._known_keys(schema, mapping, keys).items():
            if name in mapping:
                here = (*keys, name)
                values[name] = self.read(kinds[name], mapping[name], here)
                self._check_bounds(values[name], here, **entry.metadata)
        return values

    def _known_keys(self, schema, mapping, keys):
        """Fields of schema by name; raises ConfigError if mapping has others."""
        known = {entry.name: entry for entry in fields(schema)}
        for name in mapping:
            if name not in known:
                raise self._unknown_key((*keys, name), known)
        return known

    def _unknown_key(self, keys, known):
        now = RENAMED.get(".".join(map(str, keys)), "")
        if now.rpartition(".")[2] in known:
            return self.error(keys, f"is called {now} now")
        for script, names in MOVED.items():
            if keys[0] == "loss" and keys[-1] in names:
                return self.error(keys, f"is a key of {script} now")
        return self.error(keys, f"unknown key{suggest(keys[-1], known)}")

    def _check_bounds(
        self,
        value,
        keys,
        meaning,
        low=None,
        above=None,
        high=LARGEST,
        below=None,
        size=None,
        least=0,
        unique=False,
        names=False,
    ):
        """Raise ConfigError for a value out of the bounds of its key, see key()."""
        for name in value if names else ():
            if not NAME.fullmatch(name):
                problem = f"{show(name)} is no name: up to 60 letters, digits and _ only"
                raise self.error((*keys, name), problem)
        if isinstance(value, dict):
            value = list(value.values())
        items = value if isinstance(value, list) else [value]
        numbers = [x for x in items if isinstance(x, int | float)]
        expected = None
        if low is not None and any(x < low for x in numbers):
            expected = f"at least {low}"
        elif above is not None and any(x <= above for x in numbers):
            expected = f"more than {above}"
        elif below is not None and any(x >= below for x in numbers):
            expected = f"less than {below}"
        elif any(x > high for x in numbers):
            expected = f"at most {high}"
        elif size not in (None, len(items)):
            expected = f"{size} numbers"
        elif isinstance(value, list) and len(items) < least:
            expected = f"{least} or more entries"
        elif unique and len(set(items)) < len(items):
            expected = "no entry twice"
        if expected:
            raise self.error(keys, f"expected {expected}, found {show(value)}")


def type_name(kind: Any) -> str:
    """A type as --help and errors print it."""
    if typing.get_origin(kind) is typing.Annotated:
        return type_name(typing.get_args(kind)[0])
    inner = [x if isinstance(x, str) else type_name(x) for x in typing.get_args(kind)]
    if typing.get_origin(kind) in (Literal, *UNIONS):
        return " | ".join(inner)
    if kind is type(None):
        return "null"
    name = "mapping" if is_dataclass(kind) else getattr(kind, "__name__", "...").lower()
    return f"{name}[{', '.join(inner)}]" if inner else name


def from_dict(
    schema: type, mapping: dict, source: Yaml | None = None, script: Path | str | None = None
) -> Any:
    """The dataclass schema, filled from a mapping; raises ConfigError.

    source: the Yaml of the mapping, for line numbers. With it, files and names are checked too.
    script: the file beside which relative paths start; without it, the current folder.
    """
    return Reader(source, script).read(schema, mapping, ())


def to_dict(cfg: Any) -> dict:
    """Plain values, for YAML or JSON: from_dict(type(cfg), to_dict(cfg)) == cfg."""
    return json.loads(json.dumps(asdict(cfg), default=str))


def describe(schema: type, prefix: str = "") -> list[str]:
    """Every key of a schema with type, default and meaning, one paragraph each."""
    kinds = typing.get_type_hints(schema)
    lines = []
    for entry in sorted(fields(schema), key=lambda f: is_dataclass(kinds[f.name])):
        kind = kinds[entry.name]
        name = prefix + entry.name
        title = f"\n{name}"
        if not is_dataclass(kind):
            default = "required"
            if entry.default_factory is not MISSING:
                default = f"default {show(entry.default_factory())}"
            title = f"  {name} ({type_name(kind)}; {default})"
        text = f"{title}: {entry.metadata['meaning']}"
        indent = " " * 6
        lines.append(textwrap.fill(text, 100, subsequent_indent=indent, replace_whitespace=False))
        below = f"{name}.NAME." if typing.get_origin(kind) is dict else f"{name}."
        for inner in filter(is_dataclass, (kind, *typing.get_args(kind))):
            lines += describe(inner, below)
    return lines


SCRIPTS = {  # script -> components that tell its configs; the first with a listed one counts
    "train_mi.py": ("state_resnet34_encoder", "state_resnet34_decoder", "action_encoder"),
    "train_vfp_moe.py": ("gate", "moe_action_decoder"),
    "train_cfg_vqvae.py": ("vqvae_posterior", "vqvae_codebook", "vqvae_prior"),
    "train_vfp.py": ("vae_posterior", "vae_prior"),
    "train_flow_matching.py": ("action_decoder",),
}


def refuse_config_of_another_script(schema: type, script: Path | str, source: Yaml) -> None:
    """Raise ConfigError if the listed components are those of another script's policy.

    `components: ClassVar[tuple[str, ...]]` of a script's Config declares the components that its
    policy may use beside backbones, hand extractors and da3. A fork adds its own: a declared
    component is never refused, and a script that declares nothing takes all.
    """
    declared = getattr(schema, "components", None)
    model = source.data.get("model")
    listed = model.get("component_config_paths") if isinstance(model, dict) else None
    if declared is None or not isinstance(listed, dict):
        return
    for owner, own in SCRIPTS.items():
        theirs = [name for name in own if name in listed]
        foreign = [repr(name) for name in theirs if name not in declared]
        ours = [name for name in SCRIPTS.get(Path(script).name, ()) if name in declared]
        problem = f"lists {' and '.join(foreign)}" if foreign else ""
        if ours and not any(name in listed for name in ours):
            problem = problem or f"lists no {' and no '.join(map(repr, ours))}"
        if theirs and problem:
            raise ConfigError(f"{source.path} {problem}: this is a config of {owner}")
        if theirs:
            return


def load(
    schema: type, script: Path | str, argv: list[str] | None = None, description: str = ""
) -> tuple[Any, argparse.Namespace]:
    """(the schema filled, options) from `--config FILE [--dry_run] [a.b=yaml ...]`.

    script: its __file__. options: config and dry_run. A wrong command line exits with 2, a mistake
    in the file raises ConfigError.
    """
    parser = argparse.ArgumentParser(
        prog=Path(script).name,
        usage="%(prog)s --config FILE [--dry_run] [key=value ...]",
        description=description,
        epilog="\n".join(["keys of FILE:", *describe(schema)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="FILE", help="train.yaml of an experiment")
    dry_run = "build everything, run one batch, print components, shapes and config, and stop"
    add("--dry_run", action="store_true", help=dry_run)
    override = "replaces the value of a key, for example data.batch_size=8"
    add("overrides", nargs="*", metavar="key=value", help=override)
    options = parser.parse_intermixed_args(argv)
    source = Yaml.read(options.config)
    for text in options.overrides:
        if "=" not in text:
            parser.error(f"'{text}' is no override: write key=value, such as data.batch_size=8")
        source.override(text)
    refuse_config_of_another_script(schema, script, source)
    return from_dict(schema, source.data, source, script), options
