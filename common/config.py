"""train.yaml to dataclasses: a YAML file, dotted overrides, and errors that say file, line and key."""

import argparse
import contextlib
import copy
import difflib
import json
import os
import re
import textwrap
import types
import typing
from dataclasses import MISSING, asdict, field, fields, is_dataclass
from pathlib import Path
from typing import Literal

import yaml


class UserError(Exception):
    """A user's mistake: scripts print it as one message and exit with code 2."""


class ConfigError(UserError, ValueError):
    """A mistake in a YAML file, an override or a component."""


class DataError(UserError, ValueError):
    """A mistake in a dataset."""


def nearest(name, known):
    """The text "; did you mean 'x'?" for the closest of the known names, empty where none is close."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], 1)
    return f"; did you mean '{close[0]}'?" if close else ""


def suggest(name, known):
    """What nearest() says, or all known names where none is close."""
    return nearest(name, known) or f"; known: {', '.join(map(str, known)) or 'none'}"


def show(value):
    """A value as it stands in YAML's flow style, shortened."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


class _Loader(yaml.SafeLoader):
    """YAML 1.1, in which 1e-4 is a number."""


_UNIONS, _TAG = (typing.Union, types.UnionType), "tag:yaml.org,2002:"
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+\Z")
_Loader.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))


class Yaml:
    """One parsed YAML file that knows where each key stands.

    data: plain values (anchors copied), path as the user wrote it, text, and places: path of keys -> the line it
    stands on, or the text of the command-line override that set it.
    """

    def __init__(self, text, path):
        self.text, self.path, self.places = text, Path(path), {(): 1}
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
        except yaml.YAMLError as e:
            mark = getattr(e, "problem_mark", None)
            self.places[()] = (
                mark.line if mark else text.count("\n", 0, getattr(e, "position", 0))
            ) + 1
            raise self.error(
                (), f"not YAML: {getattr(e, 'problem', None) or getattr(e, 'reason', e)}"
            ) from e
        self.data = self._value(loader, node, (), ()) if node else None

    @classmethod
    def read(cls, path):
        """The mapping in a file."""
        try:
            return cls.parse(Path(path).read_text(encoding="utf-8"), path)
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"{path}: {getattr(e, 'strerror', 'not UTF-8 text')}") from e

    @classmethod
    def parse(cls, text, path):
        """The mapping in text; errors name path."""
        source = cls(text, path)
        if not isinstance(source.data, dict):
            found = "nothing: the file is empty" if source.data is None else show(source.data)
            raise source.error((), f"expected a mapping, found {found}")
        return source

    def _value(self, loader, node, keys, above):
        """Plain value of a node. Duplicate keys, tags and anchors inside themselves are refused."""
        self.places.setdefault(keys, node.start_mark.line + 1)
        if node in above:
            raise self.error(keys, "an anchor must not contain itself")
        if node.tag == _TAG + "seq" and isinstance(node, yaml.SequenceNode):
            return [
                self._value(loader, item, (*keys, i), (*above, node))
                for i, item in enumerate(node.value)
            ]
        if node.tag == _TAG + "map" and isinstance(node, yaml.MappingNode):
            data, merged, lines = {}, {}, {}
            for key, item in node.value:
                if key.tag == _TAG + "merge":
                    for one in item.value if isinstance(item, yaml.SequenceNode) else [item]:
                        value = self._value(loader, one, keys, (*above, node))
                        if not isinstance(value, dict):
                            raise self.error(keys, f"'<<' merges a mapping, found {show(value)}")
                        merged = {**value, **merged}
                    continue
                name, line = str(key.value), key.start_mark.line + 1
                self.places[(*keys, name)] = line
                if name in data:
                    raise self.error((*keys, name), f"duplicate key, already on line {lines[name]}")
                data[name], lines[name] = (
                    self._value(loader, item, (*keys, name), (*above, node)),
                    line,
                )
            return {**merged, **data}
        if node.tag in [_TAG + kind for kind in ("null", "bool", "int", "float", "str")]:
            with contextlib.suppress(ValueError, KeyError):
                return loader.construct_object(node)
        tag = node.tag.replace(_TAG, "!!")
        raise self.error(
            keys,
            f"{tag} is refused: only mappings, lists, numbers, booleans and (quoted) text are read",
        )

    def override(self, text):
        """Apply one `a.b=yaml` of the command line; it replaces whatever is there."""
        name, _, value = text.partition("=")
        keys, data = tuple(name.strip().split(".")), self.data
        for i, key in enumerate(keys[:-1], 1):
            if data.get(key) is None:
                data[key], self.places[keys[:i]] = {}, text
            if not isinstance(data[key], dict):
                raise ConfigError(
                    f"command line: {text}: {'.'.join(keys[:i])} is {show(data[key])}, not a mapping"
                )
            data = data[key]
        try:
            data[keys[-1]] = Yaml(value, "value").data
        except ConfigError as e:
            raise ConfigError(f"command line: {text}: {e}") from e
        self.places = {p: place for p, place in self.places.items() if p[: len(keys)] != keys} | {
            keys: text
        }

    def place(self, keys):
        """(line or override text, number of leading keys it stands for) of the longest known start of keys."""
        known = next(n for n in range(len(keys), -1, -1) if tuple(keys[:n]) in self.places)
        return self.places[tuple(keys[:known])], known

    def error(self, keys, message):
        """ConfigError to raise: "path/file.yaml:14: a.b.c: message", or "command line: a.b=1: message"."""
        place, known = self.place(keys)
        where = f"{self.path}:{place}"
        if isinstance(place, str):
            where, keys = f"command line: {place}", keys[known:]
        return ConfigError(": ".join(filter(None, [where, ".".join(map(str, keys)), message])))


def key(default, meaning, **bounds):
    """A field of a schema. default: ... if required. meaning: what --help prints. bounds: low, high, size of a list."""
    made = {} if default is ... else {"default_factory": lambda: copy.deepcopy(default)}
    return field(kw_only=True, metadata={"meaning": meaning, **bounds}, **made)


class Reader:
    """Turns plain values into the types of a schema.

    A schema class may define check(reader, keys) for what types can't say; it runs where a source is given.
    """

    def __init__(self, source, script):
        self.given, self.source = source is not None, source or Yaml("", "config")
        self.folder = Path(script).resolve().parent if script else Path.cwd()
        self.error = self.source.error

    def path(self, text, keys):
        """Absolute path: ./ and ../ start beside the YAML (an override's: here), others in the script's folder."""
        folder = self.folder
        if text.split("/")[0] in (".", ".."):
            folder = "" if isinstance(self.source.place(keys)[0], str) else self.source.path.parent
        return Path(os.path.abspath(os.path.join(folder, os.path.expanduser(text))))

    def read(self, kind, value, keys):
        """value as the type kind; raises ConfigError with what was found and what is expected."""
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if value is None and type(None) in args:
            return None
        if origin in _UNIONS:
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
        elif type(value) is kind or (kind is float and type(value) is int):
            return kind(value)
        raise self.error(
            keys, f"expected {type_name(kind)}, found {show(value)}{nearest(value, args)}"
        )

    def section(self, schema, mapping, keys):
        """The dataclass schema from a mapping."""
        hints, known, values = (
            typing.get_type_hints(schema),
            {f.name: f for f in fields(schema)},
            {},
        )
        for name in [n for n in mapping if n not in known]:
            raise self.error((*keys, name), f"unknown key{suggest(name, known)}")
        for name, entry in known.items():
            here, kind, required = (
                (*keys, name),
                hints[name],
                entry.default is entry.default_factory is MISSING,
            )
            if name not in mapping and not required:
                continue
            if name not in mapping and not is_dataclass(kind):
                raise self.error(
                    here,
                    f"this key is required ({type_name(kind)}: {entry.metadata.get('meaning', '')})",
                )
            value = values[name] = self.read(kind, mapping.get(name, {}), here)
            low, high, size = map(entry.metadata.get, ("low", "high", "size"))
            items = value if isinstance(value, list) else [value]
            if low is not None and any(x < low for x in items if x is not None):
                raise self.error(here, f"expected at least {low}, found {show(value)}")
            if high is not None and any(x > high for x in items if x is not None):
                raise self.error(here, f"expected at most {high}, found {show(value)}")
            if size not in (None, len(items)):
                raise self.error(here, f"expected {size} numbers, found {show(value)}")
        made = schema(**values)
        if self.given and hasattr(made, "check"):
            made.check(self, keys)
        return made


def type_name(kind):
    """A type as --help and errors print it."""
    inner = [x if isinstance(x, str) else type_name(x) for x in typing.get_args(kind)]
    if typing.get_origin(kind) in (Literal, *_UNIONS):
        return " | ".join(inner)
    name = (
        "null" if kind is type(None) else "mapping" if is_dataclass(kind) else kind.__name__.lower()
    )
    return f"{name}[{', '.join(inner)}]" if inner else name


def from_dict(schema, mapping, source=None, script=None):
    """The dataclass schema, filled from a mapping; raises ConfigError.

    source: the Yaml that mapping is from, for line numbers; with it, what files and names say is checked too.
    script: the file beside which relative paths start; without it, the current folder.
    """
    return Reader(source, script).read(schema, mapping, ())


def to_dict(cfg):
    """Plain values, for YAML or JSON: from_dict(type(cfg), to_dict(cfg)) == cfg."""
    return json.loads(json.dumps(asdict(cfg), default=str))


def describe(schema, prefix=""):
    """Every key of a schema with type, default and meaning, one paragraph each."""
    lines, hints = [], typing.get_type_hints(schema)
    for entry in sorted(fields(schema), key=lambda f: is_dataclass(hints[f.name])):
        kind, name, meaning = (
            hints[entry.name],
            prefix + entry.name,
            entry.metadata.get("meaning", ""),
        )
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        given = "required" if default is MISSING else f"default {show(default)}"
        title = f"\n{name}" if is_dataclass(kind) else f"  {name} ({type_name(kind)}; {given})"
        lines.append(
            textwrap.fill(
                f"{title}: {meaning}", 110, subsequent_indent=" " * 6, replace_whitespace=False
            )
        )
        for inner in filter(is_dataclass, (kind, *typing.get_args(kind))):
            lines += describe(
                inner, f"{name}.NAME." if typing.get_origin(kind) is dict else f"{name}."
            )
    return lines


def load(schema, script, argv=None, description=""):
    """(the schema filled, options with .config and .dry_run) from `--config FILE [--dry_run] [a.b=yaml ...]`.

    script: its __file__. A wrong command line exits with 2; anything wrong in the file raises ConfigError.
    """
    usage, keys = (
        "%(prog)s --config FILE [--dry_run] [key=value ...]",
        "\n".join(["keys of FILE:", *describe(schema)]),
    )
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(Path(script).name, usage, description, keys, **style)
    parser.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="train.yaml of an experiment"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="build, run one batch, print what there is, and stop"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="replaces a key: data.batch_size=8"
    )
    options = parser.parse_intermixed_args(argv)
    source = Yaml.read(options.config)
    for text in options.overrides:
        if "=" not in text:
            parser.error(f"'{text}' is no override: write key=value, such as data.batch_size=8")
        source.override(text)
    return from_dict(schema, source.data, source, script), options
