"""Files that are there whole or not at all, also on a disk that is full."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av

from common.config import UserError


class WriteError(UserError):
    """A file that could not be written."""


@contextlib.contextmanager
def writing(path: Path, advice: str = "") -> Iterator[None]:
    """Turn the refusal of the disk or of an encoder into a WriteError with path and free space."""
    try:
        yield
    except (OSError, av.FFmpegError) as e:
        # Arrow and FFmpeg put more than the reason into their texts.
        reason = os.strerror(e.errno) if e.errno in errno.errorcode else str(e)
        hint = f"; {advice}" if advice else ""
        free = free_space(path)
        raise WriteError(f"{path}: could not be written: {reason}{free}{hint}") from e


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary file of the same suffix to write to; afterwards it takes the place of `path`.

    Raises WriteError. Whatever ends the block early, nothing half-written is left, and an older
    file stays as it was.
    """
    unfinished = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    try:
        with writing(path):
            yield unfinished
            unfinished.replace(path)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def write_json(values: Any, path: Path) -> None:
    """A JSON file, whole or as it was before. Raises WriteError."""
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(values, indent=1))


def require_writable(folder: Path, option: str) -> None:
    """Create a folder and try to write there. Raises WriteError that names the option."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(bytes(4096))
    except OSError as e:
        free = free_space(folder)
        raise WriteError(f"{option}: {folder} cannot be written: {e.strerror}{free}") from e


def free_space(path: Path) -> str:
    """The text " (12 MiB free)" of the disk of a path, or nothing where it does not tell."""
    folder = next((place for place in (path, *path.absolute().parents) if place.is_dir()), path)
    try:
        return f" ({shutil.disk_usage(folder).free / 2**20:.0f} MiB free)"
    except OSError:
        return ""
