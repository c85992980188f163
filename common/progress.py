"""Progress of long loops: a bar on a terminal, now and then a line in a file."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SECONDS = 30.0  # between lines


class Lines(tqdm):
    """A tqdm that writes a whole line every half minute; a short loop writes nothing."""

    monitor_interval = 0  # its thread would write a line beside ours

    def __init__(self, iterable: Iterable | None = None, **options: Any):
        options |= {"mininterval": SECONDS, "maxinterval": SECONDS, "delay": SECONDS}
        options |= {"leave": False, "ascii": True}
        options["bar_format"] = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
        super().__init__(iterable, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        text = str(self) if msg is None else msg
        if text:
            self.fp.write(f"{text}\n")
            self.fp.flush()


def progress(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """tqdm(iterable, **options) on a terminal, else Lines: a bar would fill the log of a job."""
    kind = tqdm if sys.stderr.isatty() else Lines
    return kind(iterable, **options)
