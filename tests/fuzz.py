"""Seeded mutations of plain values and of files, and a check of what they do to a command.

Whatever a file holds, a command ends in one of two ways: it works, or it prints one message and
exits with 2. It never ends in a traceback, and never hangs.
"""

import copy
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from common import run

NASTY = (
    *(None, True, -1, 0, 7, 10**30, 0.5, -1e300, float("nan"), float("inf")),
    *("", "x", "../x", "/dev/null", "a/b", "a.b", "\x00", "{x}", "{0}", "9" * 500),
    *([], {}, [None], [[1]], {"x": {}}, [1, "x"]),
)


class Hang(BaseException):
    """The command used more processor time than it was given."""


def places(value, container=None, key=None) -> Iterator[tuple]:
    """(container, key) of everything inside nested dicts and lists."""
    if container is not None:
        yield container, key
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for name, one in list(inner):
            yield from places(one, value, name)


def mutated(value, rng: np.random.Generator):
    """A copy of nested dicts and lists with one place replaced, removed, renamed or doubled."""
    value = copy.deepcopy(value)
    found = list(places(value))
    container, key = found[rng.integers(len(found))]
    kind = rng.choice(["replace", "replace", "scale", "remove", "rename", "copy"])
    here = container[key]
    if kind == "scale" and isinstance(here, int | float):
        container[key] = here * float(rng.choice([-1, 0, 1000, 1e-9, 1e12]))
        if isinstance(here, int) and not isinstance(here, bool):
            container[key] = int(container[key])
    elif kind == "remove":
        del container[key]
    elif kind == "rename" and isinstance(container, dict):
        container[str(key) + "x"] = container.pop(key)
    elif kind == "copy":
        other, place = found[rng.integers(len(found))]
        container[key] = copy.deepcopy(other[place])
    else:
        container[key] = copy.deepcopy(NASTY[rng.integers(len(NASTY))])
    return value


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """A file's content cut short, with bytes changed, doubled, or replaced altogether."""
    kind = rng.choice(["cut", "flip", "zero", "empty", "double", "text", "pointer"])
    where = int(rng.integers(max(len(data), 1)))
    if kind == "cut":
        return data[:where]
    if kind == "flip" and data:
        changed = bytearray(data)
        for place in rng.integers(len(data), size=8):
            changed[place] ^= 1 << int(rng.integers(8))
        return bytes(changed)
    if kind == "zero":
        return data[:where] + bytes(min(64, len(data) - where)) + data[where + 64 :]
    if kind == "double":
        return data + data
    if kind == "text":
        return json.dumps(NASTY[rng.integers(len(NASTY))]).encode()
    if kind == "pointer":
        return b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    return b""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise Hang after so many seconds of processor time: other work on the machine costs none."""

    def stop(number, frame):
        raise Hang

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def ending(command: Callable[[], int], capsys, seconds: float = 60.0) -> str:
    """The error message of a command, or nothing if it worked.

    Raises AssertionError unless it ends with 0, or with 2 and one message on stderr.
    """
    capsys.readouterr()
    code = None
    with limited(seconds):
        try:
            run.cli(command)
        except SystemExit as stopped:
            code = stopped.code
    error = capsys.readouterr().err
    assert code in (0, 2), f"exit {code}: {error}"
    assert "Traceback" not in error
    if code == 0:
        return ""
    messages = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, error
    return error[error.index("error: ") :]
