"""scores.parquet: the score of each episode, written by train_mi.py, read by the loader."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from common.config import DataError, UserError
from common.data.files import reading
from common.data.lerobot import LeRobotDataset
from common.files import whole_file

COLUMNS = ("episode", "transitions", "score", "quantile")
VALUES_KEY = b"values_key"  # in the file's metadata


def save_scores(table: pa.Table, file: Path, dataset: LeRobotDataset, **settings) -> None:
    """Write scores.parquet; its metadata holds the dataset's values_key and the settings.

    Raises WriteError if the disk refuses.
    """
    metadata = {VALUES_KEY: dataset.values_key}
    metadata |= {name: str(value) for name, value in settings.items()}
    with whole_file(file) as unfinished:
        pq.write_table(table.replace_schema_metadata(metadata), unfinished)


def scored_dataset(file: Path) -> str | None:
    """The values_key of the dataset whose episodes a scores.parquet ranks."""
    with reading(file):
        metadata = pq.read_schema(file).metadata or {}
    return metadata.get(VALUES_KEY, b"").decode() or None


def best_episodes(
    file: Path, share: float, dataset: LeRobotDataset, episodes: list[int]
) -> list[int]:
    """The best `share` of `episodes` by a scores.parquet; of each task at least its best one.

    Raises UserError if the file is missing, ranks another dataset, or lacks an episode.
    """
    score = read_scores(file, dataset)
    unscored = sorted(set(episodes) - set(score))
    if unscored:
        raise DataError(
            f"data.scores: {file} has no score for {len(unscored)} training episodes, the first of "
            f"them {unscored[:8]}: hold out what train_mi.py held out (data.val_episodes), or run "
            "it with data.val_episodes=0.0"
        )
    ranked = sorted(episodes, key=lambda number: (-score[number], number))
    kept = set(ranked[: round(share * len(ranked))])
    tasks = {episode.index: tuple(episode.tasks) for episode in dataset.episodes}
    best_of_task = {}
    for number in ranked:
        best_of_task.setdefault(tasks[number], number)
    added = set(best_of_task.values()) - kept
    kept |= added
    note = f", {len(added)} of them only because a task keeps its best one" if added else ""
    print(f"data.scores keeps {len(kept)} of {len(ranked)} training episodes{note}")
    return sorted(kept)


def read_scores(file: Path, dataset: LeRobotDataset) -> dict[int, float]:
    """episode -> score. Raises UserError unless the file is a scores.parquet of this dataset."""
    if not file.is_file():
        is_folder = (file / "scores.parquet").is_file()
        found = " is a folder, give its scores.parquet" if is_folder else ": no such file"
        raise UserError(f"data.scores: {file}{found}; train_mi.py writes it")
    with reading(file):
        table = pq.read_table(file)
    again = "run train_mi.py with this data.root"
    missing = sorted(set(COLUMNS) - set(table.column_names))
    if missing:
        raise DataError(f"data.scores: {file} has no column '{missing[0]}': {again}")
    found = scored_dataset(file)
    if found != dataset.values_key:
        raise DataError(
            f"data.scores: {file} is of another dataset than {dataset.root}, or that has changed "
            f"since (values key {found}, here {dataset.values_key}): {again}"
        )
    return dict(zip(table["episode"].to_pylist(), table["score"].to_pylist(), strict=True))
