"""Files that are there whole or not at all, also on a disk that is full."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import av

from common.config import UserError


class WriteError(UserError):
    """A file that could not be written."""


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary file of the same suffix to write to; afterwards it takes the place of `path`.

    Raises WriteError with path and free space if the disk or the encoder refuses. Whatever ends the
    block early, nothing half-written is left, and an older file stays as it was.
    """
    unfinished = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    try:
        yield unfinished
        unfinished.replace(path)
    except (OSError, av.FFmpegError) as e:
        problem = e.strerror or e
        free = free_space(path.parent)
        raise WriteError(f"{path}: could not be written: {problem}{free}") from e
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def require_writable(folder: Path, option: str) -> None:
    """Create a folder and try to write there. Raises WriteError that names the option."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(bytes(4096))
    except OSError as e:
        free = free_space(folder)
        raise WriteError(f"{option}: {folder} cannot be written: {e.strerror}{free}") from e


def free_space(folder: Path) -> str:
    """The text " (12 MiB free)", or nothing where the disk does not tell."""
    try:
        return f" ({shutil.disk_usage(folder).free / 2**20:.0f} MiB free)"
    except OSError:
        return ""
