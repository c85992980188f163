"""The shape of a checkpoint's meta.json: what may stand in it, checked before anything uses it."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from common.config import ConfigError, Keys, Reader, key, show
from common.parts import Parts

NAME = r"[^./\\\s]{1,100}"  # of a component, which is an attribute of Parts and a file
MAX_DEPTH = 40  # of lists and mappings in each other
MAX_COUNT = 10**15  # of steps, samples, bytes
FILE = rf"(resume/)?{NAME}\.safetensors"
STATS = "dataset_stats.safetensors"


@dataclass
class Frozen:
    path: str = key(..., "its file: below the run folder, or absolute")
    sha256: str = key(..., "hash of that file")


@dataclass
class Dataset:
    root: str = key(..., "its folder at that time")
    content_key: str = key(..., "hash of info.json and of all files' names, sizes and times")


@dataclass
class Meta:
    """Fields of meta.json. Others, of later versions and of forks, are left alone."""

    script: str = key(..., "training script: its name beside common/, or its path")
    step: int = key(..., "finished optimizer steps", low=0, high=MAX_COUNT)
    epoch: int = key(..., "finished epochs", low=0, high=MAX_COUNT)
    offset: int = key(..., "samples of the epoch under way", low=0, high=MAX_COUNT)
    processes: int = key(..., "number of processes", low=1, high=MAX_COUNT)
    threads: int = key(..., "threads of each process", low=1, high=MAX_COUNT)
    batch_size: int = key(..., "samples per optimizer step", low=1, high=MAX_COUNT)
    samples: int = key(..., "training samples", low=1, high=MAX_COUNT)
    versions: dict[str, str] = key(..., "versions of libraries")
    mixed_precision: str = key("no", "precision of training")
    facts: dict[str, int] = key(..., "numbers of the dataset", low=0, high=10**6)
    columns: dict[str, int] = key({}, "numbers in a row of each column", low=0, high=10**6)
    names: dict[str, list[str]] = key({}, "names of the dimensions of state and action")
    dataset: Dataset | None = key(None, "the dataset that was trained on")
    episode_hashes: dict[str, str] = key({}, "episode -> hash of its rows")
    components: dict[str, str] = key(..., "YAML of each component")
    aliases: dict[str, str] = key(..., "component -> the one whose module it shares")
    frozen: dict[str, Frozen] = key(..., "frozen component -> its file")
    schedules: dict[str, str] = key(..., "trained component -> its schedule")
    optimizers: list[list[dict[str, bool | int | float]]] = key(..., "counters of their groups")
    episodes: dict[str, list[int]] = key(..., "trained on, and held out")
    files: dict[str, list[int | str]] = key(..., "file -> its size and hash")
    config: dict = key(..., "train.yaml")

    def check(self, reader: Reader, keys: Keys) -> None:
        def require(fits: bool, name: str, problem: str) -> None:
            if not fits:
                raise reader.error((name,), problem)

        own = self.components.keys() - self.aliases.keys()
        trained = own - self.frozen.keys()
        for name in self.components:
            taken = name == Path(STATS).stem or hasattr(Parts({}), name)
            named = re.fullmatch(NAME, name) and not taken
            require(bool(named), "components", f"{name!r} is no name of a component")
        shared = self.aliases.keys() <= self.components.keys() and own >= {*self.aliases.values()}
        require(shared, "aliases", f"expected some of {sorted(own)}, found {show(self.aliases)}")
        require(self.frozen.keys() <= own, "frozen", f"expected some of {sorted(own)}")
        found = f"expected {sorted(trained)}, found {sorted(self.schedules)}"
        require(self.schedules.keys() == trained, "schedules", found)
        in_epoch = f"expected at most {self.samples}, the samples; found {self.offset}"
        require(self.offset <= self.samples, "offset", in_epoch)
        for name in ("trained on", "held out"):
            require(name in self.episodes, "episodes", f"'{name}' is missing")
        numbers = [x for groups in self.optimizers for group in groups for x in group.values()]
        fits = all((-1 if isinstance(x, float) else 0) <= x <= MAX_COUNT for x in numbers)
        require(fits, "optimizers", f"expected numbers up to {MAX_COUNT:g}, found {show(numbers)}")
        self._check_files(require, trained)
        data = self.config.get("data")
        cameras = data.get("cameras") if isinstance(data, dict) else None
        reader.read(dict[str, str], cameras, ("config", "data", "cameras"))

    def _check_files(self, require, trained):
        for name, entry in self.files.items():
            require(bool(re.fullmatch(FILE, name)), "files", f"{name!r} is no file of a checkpoint")
            kinds = [type(x) for x in entry]
            fits = kinds == [int, str] and 0 <= int(entry[0]) <= MAX_COUNT
            require(fits, "files", f"{name}: expected [size, sha256], found {show(entry)}")
        needed = [f"{name}.safetensors" for name in sorted(trained)]
        needed += [STATS]
        needed += [f"resume/optimizer_{i}.safetensors" for i in range(len(self.optimizers))]
        for name in needed:
            require(name in self.files, "files", f"{name} is missing")


def check(meta: dict, file: Path) -> None:
    """Raise ConfigError with file, field, what was found and expected, unless meta is whole."""
    level: list[Any] = [meta]
    for _ in range(MAX_DEPTH):
        inner = []
        for value in level:
            if isinstance(value, dict):
                inner += [*value, *value.values()]
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str) and not _is_text(value):
                raise ConfigError(f"{file}: {value[:60]!r} is no text")
        level = inner
    if level:
        raise ConfigError(f"{file}: more than {MAX_DEPTH} lists and mappings in each other")
    known = {entry.name for entry in fields(Meta)}
    reader = json_reader(file)
    reader.given = True  # rules that types cannot express are checked, too
    reader.read(Meta, {name: value for name, value in meta.items() if name in known}, ())


def _is_text(value):
    """Whether files and terminals take it: no NUL, no half of a surrogate pair."""
    return "\0" not in value and value.encode("utf-8", "ignore").decode() == value


def json_reader(file: Path, *above: str) -> Reader:
    """A Reader whose errors name a JSON file and the keys above, in place of a line of a YAML."""

    def error(keys: Keys, message: str) -> ConfigError:
        place = ".".join(map(str, (*above, *keys)))
        return ConfigError(": ".join(filter(None, [str(file), place, message])))

    reader = Reader(None, None)
    reader.error = error
    return reader
