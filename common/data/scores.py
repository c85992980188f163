"""scores.parquet: which episodes of a dataset are worth keeping, as train_mi.py writes and the loader reads it."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from common.config import DataError, UserError
from common.data.lerobot import reading

COLUMNS = ("episode", "transitions", "score", "quantile")
OF = b"values_key"


def save(table: pa.Table, file: Path, dataset, **made_by):
    """Write scores.parquet; in its metadata the dataset's values_key, and what else is to be known of it."""
    unfinished = file.with_suffix(f".{os.getpid()}.tmp")
    made_by = {name: str(value) for name, value in made_by.items()}
    pq.write_table(table.replace_schema_metadata({OF: dataset.values_key, **made_by}), unfinished)
    unfinished.replace(file)


def key_of(file: Path) -> str | None:
    """The values_key of the dataset that a scores.parquet is of."""
    with reading(file):
        return (pq.read_schema(file).metadata or {}).get(OF, b"").decode() or None


def keep(file: Path, share: float, dataset, episodes) -> list[int]:
    """The best `share` of `episodes` by a scores.parquet; of each task at least its best one.

    Raises UserError where the file is gone, of another dataset, or lacks an episode.
    """
    if not file.is_file():
        found = (
            " is a folder, give its scores.parquet"
            if (file / "scores.parquet").is_file()
            else ": no such file"
        )
        raise UserError(f"data.scores: {file}{found}; train_mi.py writes it")
    with reading(file):
        table = pq.read_table(file)
    again = "run train_mi.py with this data.root"
    if missing := set(COLUMNS) - set(table.column_names):
        raise DataError(f"data.scores: {file} has no column '{sorted(missing)[0]}': {again}")
    if (found := key_of(file)) != dataset.values_key:
        raise DataError(
            f"data.scores: {file} is of another dataset than {dataset.root}, or that has changed since (values key "
            f"{found}, here {dataset.values_key}): {again}"
        )
    score = dict(zip(table["episode"].to_pylist(), table["score"].to_pylist(), strict=True))
    if missing := sorted(set(episodes) - set(score)):
        raise DataError(
            f"data.scores: {file} has no score for {len(missing)} training episodes, the first of them {missing[:8]}: "
            "hold out what train_mi.py held out (data.val_episodes), or run it with data.val_episodes=0.0"
        )
    ranked = sorted(episodes, key=lambda number: (-score[number], number))
    kept = set(ranked[: round(share * len(ranked))])
    tasks = {episode.index: tuple(episode.tasks) for episode in dataset.episodes}
    best = {}
    for number in ranked:
        best.setdefault(tasks[number], number)
    more = set(best.values()) - kept
    print(
        f"data.scores keeps {len(kept | more)} of {len(ranked)} training episodes"
        + (f", {len(more)} of them only because a task keeps its best one" if more else "")
    )
    return sorted(kept | more)
