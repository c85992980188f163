"""Which code a checkpoint may have run: that of the project, and what the user names.

Nothing of a checkpoint is run to find that out.
"""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import ModuleType

from common.config import UserError

ROOT = Path(__file__).resolve().parents[1]


def load_script(folder: Path, recorded: str, given: Path | None = None) -> ModuleType:
    """The training script of the checkpoint in `folder` as a module.

    recorded: its name in meta.json, which is run only if it is that of a file beside common/.
    given: the script that the user names instead. Raises UserError for any other.
    """
    if given is not None:
        file = given.expanduser().resolve()
        if not file.is_file():
            raise UserError(f"--script: no such file: {file}")
        return _as_module(file)
    file = ROOT / recorded
    if Path(recorded).name != recorded or file.resolve().parent != ROOT:
        raise UserError(
            f"{folder}: trained by the script {recorded!r}, which is not beside common/ and is "
            "not run for a checkpoint's sake. If you trust it: --script PATH"
        )
    if not file.is_file():
        raise UserError(
            f"{file}: the script that trained this checkpoint is gone; --script PATH names it "
            "elsewhere"
        )
    return _as_module(file)


def _as_module(file):
    module = sys.modules.get(file.stem)
    if module is None or getattr(module, "__file__", None) != str(file):
        spec = importlib.util.spec_from_file_location(file.stem, file)
        if spec is None or spec.loader is None:
            raise UserError(f"{file}: not a Python file")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    if not is_dataclass(getattr(module, "Config", None)) or not hasattr(module, "Policy"):
        raise UserError(f"{file}: not a training script: it has no Config and Policy")
    return module


def check_plugins(folder: Path, recorded: Sequence[str], trusted: Sequence[str]) -> None:
    """Raise UserError unless each plugin of a checkpoint is the project's, or named by the user."""
    foreign = [name for name in recorded if name not in trusted and not _of_project(name, folder)]
    if foreign:
        raise UserError(
            f"{folder}: needs the plugins {foreign}, which are not the project's and are not "
            f"imported for a checkpoint's sake. If you trust them: --plugins {' '.join(foreign)}"
        )


def _of_project(name, folder):
    """Whether a module is found below ROOT, but not where the checkpoint is. Imports nothing.

    Nothing in the folder beside common/ that a checkpoint lies in is the project's, by the path as
    it was given and by what its links lead to.
    """
    search = [str(ROOT)]
    words = name.split(".")
    if not all(word.isidentifier() for word in words):
        return False
    around = [ROOT / words[0], (ROOT / words[0]).resolve()]
    for place in (folder.absolute(), folder.resolve()):
        if any(place.is_relative_to(package) for package in around):
            return False
    for word in words:
        spec = importlib.machinery.PathFinder.find_spec(word, search)
        if spec is None:
            return False
        search = list(spec.submodule_search_locations or [])
        for path in [spec.origin] if spec.origin else search:
            file = Path(path).resolve()
            if not file.is_relative_to(ROOT):
                return False
    return True
