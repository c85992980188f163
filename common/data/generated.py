"""Datasets written on first use, by generators that are registered under a name."""

from pathlib import Path
from pkgutil import resolve_name

from common.config import DataError, suggest
from common.data.files import locked
from common.data.lerobot import cache_folder, fetch

_entry_points: dict[str, str] = {}


def register(name: str, entry_point: str) -> None:
    """Make `name` a value of data.root: the dataset that the function at `entry_point` writes.

    entry_point: "package.module:function", called with the folder to create. Its module is imported
    only when the dataset has to be written.
    """
    _entry_points[name] = entry_point


def names() -> list[str]:
    """The registered names."""
    return list(_entry_points)


def locate(root: str) -> Path:
    """The folder of data.root: `root` itself, fetched from the Hub, or generated into the cache."""
    if root not in _entry_points:
        if "/" not in root:
            hint = suggest(root, names())
            raise DataError(
                f"data.root: no folder '{root}', and no generated set of that name{hint}"
            )
        return fetch(root)
    folder = cache_folder() / root
    with locked(folder.with_name(f"{root}.lock")):
        if not folder.exists():
            print(f"writing the demonstrations of {root} to {folder}, once")
            generate = resolve_name(_entry_points[root])
            generate(folder)
    return folder
