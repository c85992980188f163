"""Files of datasets and caches: what goes wrong on reading one becomes a DataError."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pyarrow as pa
from filelock import FileLock

from common.config import DataError
from common.files import writing

POINTER = b"version https://git-lfs.github.com/spec/"


@contextlib.contextmanager
def reading(path: Path, place: str = "") -> Iterator[None]:
    """Turn an error while a file is read into a DataError that names the file."""
    try:
        yield
    except (pa.ArrowException, av.FFmpegError, OSError, IndexError, UnicodeError) as error:
        raise unreadable(path, place, error) from error


def unreadable(path: Path, place: str, error: Exception) -> DataError:
    """The DataError for a file that a library cannot read."""
    if is_pointer(path):
        return DataError(
            f"{path}: is only a Git LFS pointer to a file{place}; run `git lfs pull` in its folder"
        )
    hint = "missing, or cut short while it was copied or recorded?"
    return DataError(f"{path}: cannot be read{place}; {hint} ({type(error).__name__}: {error})")


def is_pointer(path: Path) -> bool:
    """Whether a file is the small text that Git LFS leaves in place of a large file."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(POINTER)) == POINTER


def parse_json(text: str, path: Path, place: str = "") -> Any:
    """The value in a file's text. Raises DataError."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # halves of characters cannot be printed
        return value
    except (ValueError, RecursionError) as error:  # no JSON, a huge number, or nested too deep
        raise unreadable(path, place, error) from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the other processes that hold this lock file. Its folder is made if need be."""
    lock = FileLock(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
