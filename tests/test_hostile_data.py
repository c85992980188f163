"""Datasets that contradict themselves, are damaged or were made to harm: one message, no traceback.

What a dataset holds comes from other people's programs. Whatever it is, training ends with one
error that names file, place and field, before anything is begun.
"""

import contextlib
import io
import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CAMERAS, Experiment, write_demos
from fuzz import POINTER, damaged, ending, mutated
from helpers import edit_table, write_v2
from PIL import Image

import train_flow_matching
from common import config
from common.data.loader import Data

LENGTHS = (5, 4, 6, 3)
DATA = "data/chunk-000/file-000.parquet"
TABLE = "meta/episodes/chunk-000/file-000.parquet"
LEFT = CAMERAS["left"]
VIDEO = f"videos/{LEFT}/chunk-000/file-000.mp4"
STATE = "observation.state"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Four short episodes, v3.0, and an experiment of one camera that reads them."""
    folder = tmp_path_factory.mktemp("small")
    exp = Experiment(folder / "exp", write_demos(folder / "v3", LENGTHS))
    exp.config["data"] |= {
        "cameras": {"left": LEFT},
        "val_episodes": 0.0,
        "batch_size": 4,
        "action_horizon": 3,
        "cache": "none",
    }
    exp.write()
    return exp


def picture(number):
    """A PNG of 8 x 8 pixels in struct<bytes, path>."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 10 * number, np.uint8)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"frame-{number}.png"}


def write_pictures(root, lengths=LENGTHS):
    """A v2.1 dataset whose camera is pictures in parquet."""
    rng = np.random.default_rng(0)
    tables = {}
    for episode, n in enumerate(lengths):
        tables[episode] = {
            STATE: rng.normal(size=(n, 5)).tolist(),
            "action": rng.normal(size=(n, 4)).tolist(),
            LEFT: pa.array([picture(k) for k in range(n)]),
            "timestamp": np.arange(n) / 10,
            "frame_index": np.arange(n),
            "episode_index": np.full(n, episode),
            "task_index": np.zeros(n, int),
        }
    features = {
        STATE: {"dtype": "float32", "shape": [5], "names": None},
        "action": {"dtype": "float32", "shape": [4], "names": list("abcd")},
        LEFT: {"dtype": "image", "shape": [8, 8, 3], "names": ["h", "w", "c"]},
    }
    totals = {"total_episodes": len(lengths), "total_frames": sum(lengths)}
    write_v2(root, tables, {"fps": 10, "features": features, "chunks_size": 1000, **totals})
    (root / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "move"}')
    return root


@pytest.fixture
def copied(small, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(small.config["data"]["root"], tmp_path / "set"))


def dry_run(exp, root, capsys, *overrides):
    """The error of a command that checks and reads everything, or nothing."""
    return ending(lambda: exp.main("--dry_run", f"data.root={root}", *overrides), capsys)


def info(*keys, value=None, remove=False):
    """A change of one place in info.json."""

    def change(root):
        path = root / "meta/info.json"
        found = json.loads(path.read_text())
        inner = found
        for key in keys[:-1]:
            inner = inner[key]
        if remove:
            del inner[keys[-1]]
        else:
            inner[keys[-1]] = value
        path.write_text(json.dumps(found))

    return change


def cell(row, key, value):
    """A change of one cell of the episode table."""

    def change(root):
        def edit(rows):
            rows[row][key] = value

        edit_table(root / TABLE, edit)

    return change


def column(key, values):
    """A change of a whole column of the episode table, of its type, too."""

    def change(root):
        table = pq.read_table(root / TABLE)
        array = values if isinstance(values, pa.Array) else pa.array(values)
        place = table.schema.get_field_index(key)
        pq.write_table(table.set_column(place, key, array), root / TABLE)

    return change


def data(key, make):
    """A change of a column of the data: make(values) -> an array."""

    def change(root):
        table = pq.read_table(root / DATA)
        place = table.schema.get_field_index(key)
        array = make(table[key].to_pylist())
        pq.write_table(table.set_column(place, key, pa.array(array)), root / DATA)

    return change


def put(values, row, value):
    values[row] = value
    return values


def text(file, content):
    return lambda root: (root / file).write_text(content)


def merged_without_offsets(root):
    """Two sets in one: the rows of the second count on, its frames begin at 0 again."""

    def edit(rows):
        for row in rows[2:]:
            for key in CAMERAS.values():
                for name in ("from_timestamp", "to_timestamp"):
                    row[f"videos/{key}/{name}"] -= sum(LENGTHS[:2]) / 10

    edit_table(root / TABLE, edit)


def listed_twice(root):
    edit_table(root / TABLE, lambda rows: rows.append(dict(rows[1])))


def shifted(root):
    def edit(rows):
        rows[2]["dataset_from_index"] -= 3
        rows[2]["dataset_to_index"] -= 3

    edit_table(root / TABLE, edit)


CONTRADICTIONS = {
    "listed twice": (
        listed_twice,
        rf"{TABLE}: row 4: episode_index 1 is taken, see .*{TABLE}: row 1",
    ),
    "merged without offsets": (
        merged_without_offsets,
        rf"{VIDEO}: episodes 0 and 2 share frames by the episode table: 0 to 5 and 0 to 6",
    ),
    "rows shared": (
        shifted,
        rf"{TABLE}: row 2: episodes 1 and 2 share rows: .* 5 to 9 and 6 to 12",
    ),
    "rows unlike length": (
        cell(3, "dataset_to_index", 17),
        rf"{TABLE}: row 3: episode 3: length is 3, but dataset_from_index 15 .* 17 are 2 rows",
    ),
    "frames unlike length": (
        cell(3, f"videos/{LEFT}/to_timestamp", 1.6),
        rf"row 3: episode 3: 3 rows, but from_timestamp 1.5 to .* 1.6 of {LEFT} are 1 frames",
    ),
    "more episodes than the total": (
        info("total_episodes", value=3),
        r"info.json: total_episodes is 3, but the episode table has 4",
    ),
    "more frames than the total": (
        info("total_frames", value=17),
        r"info.json: total_frames is 17, but the episode table has 18",
    ),
    "fewer frames than the total": (
        info("total_frames", value=19),
        r"info.json: total_frames is 19, but the episode table has 18",
    ),
    "rows of an episode that is elsewhere": (
        cell(2, "data/file_index", 7),
        rf"{DATA}: has rows of episode 2, which the episode table places in .*file-007.parquet",
    ),
    "declared, not stored": (
        lambda root: pq.write_table(pq.read_table(root / DATA).drop(["action"]), root / DATA),
        r"no numeric column 'action'(?s:.)*info.json declares it, but the data files lack it",
    ),
    "declared as text": (
        info("features", "action", "dtype", value="string"),
        r"info.json: features: dtype of 'action' is 'string', stored is fixed_size_list",
    ),
    "rows without an episode": (
        cell(3, "length", 0),
        rf"{DATA}: has rows of episode 3, of which the episode table says that it has none",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_tables_that_contradict_each_other_are_refused(name, small, copied, capsys):
    change, message = CONTRADICTIONS[name]
    change(copied)
    error = dry_run(small, copied, capsys)
    assert re.search(message, error), error


def test_all_contradictions_are_listed_at_once(small, copied, capsys):
    for name in ("merged without offsets", "listed twice", "more frames than the total"):
        CONTRADICTIONS[name][0](copied)
    error = dry_run(small, copied, capsys)
    for message in ("is taken", "share frames", "share rows", "total_frames"):
        assert message in error, error


def test_good_episodes_of_a_bad_merge_can_be_chosen(small, copied, capsys):
    cell(0, f"videos/{LEFT}/to_timestamp", 0.8)(copied)
    assert "episodes 0 and 1 share frames" in dry_run(small, copied, capsys)
    assert dry_run(small, copied, capsys, "data.episodes=[2, 3]") == ""


def without_frames_of_the_last(root):
    """As lerobot writes a part of a dataset: fewer rows in the table, the totals of the whole."""
    edit_table(root / TABLE, lambda rows: rows.pop())


def no_rows(root):
    table = pq.read_table(root / DATA)
    keep = np.flatnonzero(table["episode_index"].to_numpy() != 1)
    pq.write_table(table.take(keep), root / DATA)
    cell(1, "length", 0)(root)
    info("total_frames", value=14)(root)


def other_task(root):
    data("task_index", lambda values: put(values, 4, 3))(root)


WARNINGS = {
    "a part of a dataset": (
        without_frames_of_the_last,
        [
            "total_episodes is 4, but the episode table has 3: the rest is left out",
            "total_frames is 18, but the episode table has 15: the rest is left out",
            r"has rows of episodes \[3\], which are not in the episode table: left out",
        ],
    ),
    "an episode of no rows": (no_rows, [r"no rows in the listed episodes \[1\]: left out"]),
    "an unknown task": (other_task, [r"meta/tasks.parquet: has no task_index \[3\] of the rows"]),
    "no table of tasks": (text("meta/tasks.parquet", "x"), ["tasks.parquet: cannot be read"]),
    "whole numbers declared": (
        info("features", "action", "dtype", value="int64"),
        ["dtype of 'action' is 'int64', stored is fixed_size_list"],
    ),
    "a time is missing": (
        data("timestamp", lambda values: put(values, 7, None)),
        [r"timestamps are up to inf frames off k / fps \(episode 1,"],
    ),
    "more frames than rows": (
        cell(3, f"videos/{LEFT}/to_timestamp", 2.5),
        [rf"episodes \[3\] have more frames of {LEFT} than rows"],
    ),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_what_does_not_harm_is_a_warning(name, small, copied, capsys):
    change, messages = WARNINGS[name]
    change(copied)
    small.main("--dry_run", f"data.root={copied}", "data.HZ=30")
    out = capsys.readouterr().out
    for message in messages:
        assert re.search(f"warning: .*{message}", out), out


@pytest.mark.parametrize("file", [DATA, TABLE, VIDEO, "meta/info.json"])
def test_a_pointer_of_git_lfs_is_called_one(file, small, copied, capsys):
    (copied / file).write_bytes(POINTER)
    error = dry_run(small, copied, capsys)
    assert f"{copied / file}: is only a Git LFS pointer" in error
    assert "`git lfs pull`" in error
    assert "cannot be read" not in error


BAD_FIELDS = {
    "info list": (text("meta/info.json", "[1]"), r"info.json: needs a mapping of fields, found"),
    "info null": (text("meta/info.json", "null"), r"info.json: needs a mapping of fields, found"),
    "info deep": (text("meta/info.json", "[" * 10**5), r"info.json: cannot be read"),
    "info digits": (text("meta/info.json", "9" * 10**4), r"info.json: cannot be read"),
    "half a character": (info("robot_type", value="\ud800"), r"info.json: cannot be read"),
    "fps text": (info("fps", value="10"), r"info.json: needs 'fps', a number .*found \"10\""),
    "fps nan": (info("fps", value=np.nan), r"needs 'fps', .*found NaN"),
    "fps inf": (info("fps", value=np.inf), r"needs 'fps', .*found Infinity"),
    "fps 0": (info("fps", value=0), r"needs 'fps', .*found 0"),
    "fps bool": (info("fps", value=True), r"needs 'fps', .*found true"),
    "features list": (info("features", value=[1]), r"'features': needs a mapping"),
    "feature text": (info("features", "action", value="x"), r"features: \"action\": needs a map"),
    "dtype": (info("features", "action", "dtype", value=[]), r"\"action\": needs 'dtype', a text"),
    "names": (info("features", "action", "names", value=3), r"\"action\": needs 'names', a list"),
    "shape": (info("features", "action", "shape", value=4), r"\"action\": needs 'shape', a list"),
    "shape low": (info("features", "action", "shape", value=[-4]), r"'shape', .*found \[-4\]"),
    "shape high": (info("features", "action", "shape", value=[10**30]), r"needs 'shape'"),
    "template": (info("data_path", value=5), r"needs 'data_path', a text; found 5"),
    "no template": (info("data_path", remove=True), r"needs 'data_path', a text; found nothing"),
    "template field": (info("data_path", value="data/{x}"), r"'data_path', a path with no fields"),
    "template number": (info("data_path", value="data/{0}"), r"'data_path', a path with no fields"),
    "template brace": (info("data_path", value="data/{"), r"'data_path', a path with fields like"),
    "template attribute": (
        info("video_path", value="videos/{chunk_index.__class__}/{video_key}"),
        r"needs 'video_path', a path with no fields but episode_chunk, chunk_index",
    ),
    "template width": (
        info("data_path", value="data/{file_index:0999999999d}"),
        r"needs 'data_path', a path with no fields",
    ),
    "template outside": (
        info("data_path", value="data/../../file-{file_index:03d}.parquet"),
        r"info.json: 'data_path' leads out of the dataset's folder: \"data/../../file-000.parquet",
    ),
    "template absolute": (info("data_path", value="/etc/passwd"), r"leads out of the dataset's"),
    "chunks_size 0": (info("chunks_size", value=0), r"'chunks_size', a whole number from 1"),
    "chunks_size text": (info("chunks_size", value="x"), r"'chunks_size', a whole number from 1"),
    "file_index null": (
        cell(2, "data/file_index", None),
        rf"{TABLE}: row 2: needs 'data/file_index', a whole number from 0 to .*; found null",
    ),
    "file_index nan": (
        column("data/file_index", [0, 0, 0, np.nan]),
        rf"{TABLE}: row 3: needs 'data/file_index', a whole number from 0 to .*; found NaN",
    ),
    "chunk_index text": (
        column(f"videos/{LEFT}/chunk_index", list("0000")),
        rf"row 0: needs 'videos/{LEFT}/chunk_index', a whole number .*; found \"0\"",
    ),
    "chunk_index negative": (
        cell(1, "data/chunk_index", -1),
        r"row 1: needs 'data/chunk_index', a whole number .*; found -1",
    ),
    "from_timestamp null": (
        cell(1, f"videos/{LEFT}/from_timestamp", None),
        rf"row 1: needs 'videos/{LEFT}/from_timestamp', a number from 0 to .*; found null",
    ),
    "from_timestamp nan": (
        cell(1, f"videos/{LEFT}/from_timestamp", np.nan),
        rf"row 1: needs 'videos/{LEFT}/from_timestamp', a number from 0 to .*; found NaN",
    ),
    "length text": (column("length", ["5", "4", "6", "3"]), r"row 0: needs 'length'.*found \"5\""),
    "length huge": (column("length", [5, 4, 1e30, 3]), r"row 2: needs 'length'.*found 1e\+30"),
    "episode_index half": (column("episode_index", [0, 1, 2.5, 3]), r"row 2: needs 'episode_index"),
    "tasks": (column("tasks", [[1], [1], [1], [1]]), r"row 0: needs 'tasks', a list of texts"),
    "action text": (data("action", lambda v: ["x"] * len(v)), r"no numeric column 'action'"),
    "action null": (
        data("action", lambda v: put(v, 7, [0.0, None, 0.0, 0.0])),
        r"file-000.parquet: episode 1, frame 2: action\[1\] is nan",
    ),
    "action ragged": (
        data("action", lambda v: put(v, 7, [0.0, 0.0])),
        r"episode 1, row 7: action: rows of different widths, 2 after 4",
    ),
    "action row null": (
        data("action", lambda v: put(v, 7, None)),
        r"episode 1, row 7: action: rows of different widths, 0 after 4",
    ),
    "action nested": (
        data("action", lambda v: put([[r] for r in v], 7, [[0.0], [1.0, 2.0, 3.0]])),
        r"episode 1, row 7: action: rows of different widths, 2 after 1",
    ),
    "action empty": (data("action", lambda v: [[]] * len(v)), r"no numeric column|no numbers"),
    "owner text": (
        data("episode_index", lambda v: list(map(str, v))),
        r"file-000.parquet: episode_index: needs whole numbers, found string",
    ),
    "owner null": (
        data("episode_index", lambda v: put(v, 3, None)),
        r"file-000.parquet: episode_index: nothing in row 3",
    ),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_a_bad_field_is_named_with_its_file_and_place(name, small, copied, capsys):
    change, message = BAD_FIELDS[name]
    change(copied)
    error = dry_run(small, copied, capsys)
    assert re.search(message, error), error


def line(number, content):
    """A change of one line of episodes.jsonl."""

    def change(root):
        path = root / "meta/episodes.jsonl"
        lines = path.read_text().splitlines()
        lines[number - 1] = content
        path.write_text("\n".join(lines))

    return change


def renamed(root):
    folder = root / "data/chunk-000"
    shutil.copy(folder / "episode_000001.parquet", folder / "episode_000002.parquet")
    line(3, '{"episode_index": 2, "length": 4}')(root)


JSONL = "meta/episodes.jsonl"
BAD_LINES = {
    "null": (line(2, "null"), rf"{JSONL}: line 2: needs a mapping of fields, found null"),
    "list": (line(2, "[1]"), rf"{JSONL}: line 2: needs a mapping of fields, found \[1\]"),
    "cut": (line(4, '{"episode_in'), rf"{JSONL}: cannot be read in line 4; missing, or cut short"),
    "no length": (line(1, '{"episode_index": 0}'), rf"{JSONL}: line 1: needs 'length', a whole"),
    "pointer": (
        lambda root: (root / JSONL).write_bytes(POINTER),
        rf"{JSONL}: is only a Git LFS pointer",
    ),
    "listed twice": (
        line(2, '{"episode_index": 0, "length": 5}'),
        rf"{JSONL}: line 2: episode_index 0 is taken, see .*{JSONL}: line 1",
    ),
    "copied from another episode": (
        renamed,
        r"episode_000002.parquet: is of episode 2 by its name, but of episode 1 by its column",
    ),
    "text in one file": (
        lambda root: edit_table(
            root / "data/chunk-000/episode_000003.parquet",
            lambda rows: [row.update(action=["x"] * 4) for row in rows],
        ),
        r"episode_000003.parquet: episode 3: action: needs numbers, found list",
    ),
    "no picture": (
        lambda root: edit_table(
            root / "data/chunk-000/episode_000003.parquet",
            lambda rows: rows[1][LEFT].update(bytes=b"x"),
        ),
        rf"episode_000003.parquet: episode 3, frame 1: {LEFT} is not a whole picture",
    ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_or_file_of_version_2_is_named(name, small, tmp_path, capsys):
    root = write_pictures(tmp_path / "set")
    change, message = BAD_LINES[name]
    change(root)
    error = ending(lambda: train(small, root, tmp_path), capsys)
    assert re.search(message, error), error


# What pyarrow raises for rows that no parquet file can hold.
UNWRITABLE = (pa.ArrowException, OverflowError, TypeError, AttributeError, ValueError)


def train(exp, root, folder):
    """One step with decoded frames: everything of the dataset is read."""
    return exp.main(
        f"data.root={root}",
        "data.cache=frames",
        "train.total_steps=1",
        f"train.save_dir={folder / 'run'}",
    )


def read(exp, root, folder):
    """The same reading without a policy, in a tenth of the time."""
    options = exp.argv(f"data.root={root}", "data.cache=frames")
    cfg, _ = config.load(train_flow_matching.Config, train_flow_matching.__file__, options)
    dataset = Data(cfg.data)
    dataset.cache_frames()
    return 0 if dataset.windows[dataset.train_rows] else 1


def harm(root, rng):
    """One mutation of a dataset's metadata, rows, or bytes of one of its files; what it was."""
    table = root / TABLE
    lines = root / JSONL
    kind = rng.choice(["info", "table", "rows", "bytes"])
    if kind == "info":
        path = root / "meta/info.json"
        path.write_text(json.dumps(mutated(json.loads(path.read_text()), rng)))
        return "info.json"
    if kind == "table" and lines.is_file():
        rows = mutated([json.loads(text) for text in lines.read_text().splitlines()], rng)
        lines.write_text("\n".join(map(json.dumps, rows)))
        return "lines of the table"
    files = sorted(path for path in root.rglob("*") if path.is_file())
    if kind in ("table", "rows"):
        files = [path for path in files if path.suffix == ".parquet"]
    path = table if kind == "table" else files[rng.integers(len(files))]
    if kind == "bytes":
        path.write_bytes(damaged(path.read_bytes(), rng))
        return f"bytes of {path.relative_to(root)}"
    rows = pq.read_table(path).to_pylist()
    with contextlib.suppress(*UNWRITABLE):
        pq.write_table(pa.Table.from_pylist(mutated(rows, rng)), path)
    return f"rows of {path.relative_to(root)}"


def fuzz(command, exp, root, seeds, folder, capsys):
    for seed in seeds:
        harmed = Path(shutil.copytree(root, folder / f"set_{seed}"))
        what = harm(harmed, np.random.default_rng(seed))
        try:
            ending(partial(command, exp, harmed, folder / f"run_{seed}"), capsys)
        except BaseException as error:
            error.add_note(f"seed {seed}: {what}")
            raise
        shutil.rmtree(harmed)


@pytest.fixture(params=["videos", "pictures"])
def hostile(request, small, tmp_path):
    """A dataset to be harmed: v3.0 with videos, or v2.1 with pictures in parquet."""
    if request.param == "videos":
        return Path(small.config["data"]["root"])
    return write_pictures(tmp_path / "pictures")


def test_any_harm_ends_in_one_message(hostile, small, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fuzz(read, small, hostile, range(10), tmp_path, capsys)


@pytest.mark.slow
def test_much_harm_ends_in_messages(hostile, small, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fuzz(train, small, hostile, range(1000, 1150), tmp_path, capsys)
