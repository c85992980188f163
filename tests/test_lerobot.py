import json
import shutil
from pathlib import Path

import av
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import (
    PAINTED_CAMERAS,
    PAINTED_VIDEO,
    real_dataset,
    reencode,
    write_painted,
    write_v2,
)

from common.config import DataError
from common.data.checks import check_files
from common.data.lerobot import LeRobotDataset, fetch
from common.data.writer import DatasetWriter


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("written") / "set"
    return root, *write_painted(root)


@pytest.fixture
def copied(written, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(written[0], tmp_path / "set"))


def edit_info(root, **changes):
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_written_rows_come_back_exactly(written):
    root, state, action = written
    dataset = LeRobotDataset(root)
    assert (dataset.version, dataset.fps, dataset.robot_type) == ("v3.0", 20.0, "two_arms")
    assert dataset.cameras == PAINTED_CAMERAS
    assert [(e.index, e.length, e.tasks) for e in dataset.episodes] == [
        (0, 30, ["lift"]),
        (1, 17, ["drop"]),
        (2, 45, ["lift"]),
    ]
    assert [e.videos[PAINTED_CAMERAS[1]][1] for e in dataset.episodes] == [0.0, 1.5, 2.35]
    columns = dataset.columns(["observation.state", "action", "next.done", "index", "timestamp"])
    np.testing.assert_array_equal(columns["observation.state"], state)
    np.testing.assert_array_equal(columns["action"], action)
    np.testing.assert_array_equal(columns["index"][:, 0], np.arange(92))
    assert columns["next.done"].sum() == 3
    np.testing.assert_allclose(columns["timestamp"][30:47, 0], np.arange(17) / 20, rtol=1e-6)
    some = dataset.columns(["action"], [2, 0])["action"]
    np.testing.assert_array_equal(some, np.concatenate([action[47:], action[:30]]))
    assert check_files(dataset, PAINTED_CAMERAS, ["observation.state", "action"]) == []
    assert not root.with_name("set.tmp").exists()


def test_written_metadata(written):
    root, state, _ = written
    stats = json.loads((root / "meta/stats.json").read_text())
    np.testing.assert_allclose(
        stats["observation.state"]["q99"], np.quantile(state.astype(float), 0.99, axis=0)
    )
    np.testing.assert_allclose(stats["observation.state"]["std"], state.astype(float).std(0))
    assert np.shape(stats[PAINTED_CAMERAS[0]]["mean"]) == (3, 1, 1)
    assert stats[PAINTED_CAMERAS[0]]["min"][0][0][0] == pytest.approx(50 / 255)
    row = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()[1]
    assert (row["dataset_from_index"], row["dataset_to_index"]) == (30, 47)
    assert row[f"videos/{PAINTED_CAMERAS[0]}/to_timestamp"] == pytest.approx(47 / 20)
    assert row["stats/action/count"] == [17]
    assert pq.ParquetFile(root / "data/chunk-000/file-000.parquet").num_row_groups == 3
    tasks = pq.read_table(root / "meta/tasks.parquet")
    assert tasks.to_pylist() == [
        {"task_index": 0, "task": "lift"},
        {"task_index": 1, "task": "drop"},
    ]
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    with av.open(root / f"videos/{PAINTED_CAMERAS[0]}/chunk-000/file-000.mp4") as container:
        keys = [packet.is_keyframe for packet in container.demux(video=0) if packet.size]
    assert [keys[k] for k in (0, 30, 47)] == [True] * 3


def test_writer_refuses(tmp_path, written):
    action = {"action": {"dtype": "float32", "shape": [2], "names": None}}
    with pytest.raises(DataError, match="already exists"):
        DatasetWriter(written[0], 20, action)
    with pytest.raises(DataError, match=r"videos are \[even, even, 3\]"):
        DatasetWriter(
            tmp_path / "odd", 20, {"cam": {"dtype": "video", "shape": [63, 64, 3], "names": None}}
        )
    writer = DatasetWriter(tmp_path / "new", 20, action)
    with pytest.raises(DataError, match=r"keys \['actoin'\], expected \['action'\]"):
        writer.add_episode({"actoin": np.zeros((3, 2))}, task="")
    with pytest.raises(DataError, match=r"shape \(3, 4\), expected \(3, 2\)"):
        writer.add_episode({"action": np.zeros((3, 4))}, task="")
    assert not (tmp_path / "new").exists()


def test_real_v21():
    dataset = LeRobotDataset(real_dataset("so101_bimanual_cloth_v21"))
    assert (dataset.version, dataset.fps, len(dataset.episodes)) == ("v2.1", 20.0, 13)
    assert dataset.cameras == ["observation.images.cam0", "observation.images.cam1"]
    columns = dataset.columns(["action", "observation.state"])
    assert columns["action"].shape == columns["observation.state"].shape == (3045, 12)
    warnings = check_files(dataset, dataset.cameras, ["action", "observation.state"])
    assert len(warnings) == 1
    assert "timestamps are up to 27" in warnings[0]
    assert "of 18.5 Hz by its timestamps, 20 by info.json" in warnings[0]


def test_real_v20():
    dataset = LeRobotDataset(real_dataset("gr1_picknplace_sim_v20"))
    assert (dataset.version, len(dataset.episodes), dataset.episodes[1].length) == ("v2.0", 5, 470)
    assert dataset.cameras == ["observation.images.ego_view"]
    assert dataset.columns(["action"], [4, 0])["action"].shape == (328 + 416, 44)
    assert check_files(dataset, dataset.cameras, ["action"]) == []
    with pytest.raises(
        DataError,
        match=r"(?s)egoview' is declared.*no files; did you mean.*ego_view.*data.cameras='\{head: ",
    ):
        check_files(dataset, ["observation.images.egoview"], ["action"])


def test_v2_column_types_and_sparse_numbers(tmp_path):
    values = np.arange(12.0).reshape(4, 3)
    flat = pa.array(values.ravel())
    lists = {"a": values.tolist(), "b": pa.array(values.tolist(), pa.list_(pa.float32()))}
    lists |= {"c": pa.FixedSizeListArray.from_arrays(flat, 3), "d": values[:, 0], "text": ["x"] * 4}
    lists["matrix"] = pa.array(values.reshape(4, 3, 1).tolist())
    dataset = LeRobotDataset(write_v2(tmp_path / "set", {7: lists, 3: lists}))
    columns = dataset.columns(["a", "b", "c", "matrix", "d"], [3])
    for key in ("a", "b", "c", "matrix"):
        np.testing.assert_array_equal(columns[key], values)
    np.testing.assert_array_equal(columns["d"], values[:, :1])
    assert [e.index for e in dataset.episodes] == [7, 3]
    with pytest.raises(
        DataError, match=r"no numeric column 'text'\n    available: a, b, c, d, matrix"
    ):
        dataset.columns(["text"])
    with pytest.raises(DataError, match=r"no episode \[0\]; there are 2, from 3 to 7"):
        dataset.columns(["a"], [0])


def test_ragged_rows(tmp_path):
    dataset = LeRobotDataset(write_v2(tmp_path / "set", {0: {"a": [[1.0, 2.0], [1.0]]}}))
    with pytest.raises(DataError, match="a: rows of different widths"):
        dataset.columns(["a"])


def test_missing_values_are_nan(tmp_path):
    table = {"done": [True, None], "count": [3, None], "far": [1e300, None]}
    dataset = LeRobotDataset(write_v2(tmp_path / "set", {0: table}))
    columns = dataset.columns(["done", "count", "far"])
    assert [columns[key][0, 0] for key in columns] == [1, 3, np.inf]
    assert np.isnan([columns[key][1, 0] for key in columns]).all()


def test_partial_download_leaves_out_what_is_not_there(tmp_path):
    root = write_v2(tmp_path / "set", {index: {"a": [1.0, 2.0]} for index in range(3)})
    (root / "data/chunk-000/episode_000001.parquet").unlink()
    dataset = LeRobotDataset(root)
    assert [e.index for e in dataset.episodes] == [0, 2]
    assert "no files for the listed episodes [1]" in check_files(dataset, [], ["a"])[0]
    for path in (root / "data/chunk-000").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"no episodes \(3 without files\)"):
        LeRobotDataset(root)


def test_not_a_dataset(tmp_path, copied):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"empty/meta/info.json: not found; data.root must be.*has nothing"
    ):
        LeRobotDataset(tmp_path / "empty")
    edit_info(copied, codebase_version="v1.6")
    with pytest.raises(DataError, match=r"info.json: codebase_version is 'v1.6', not one of"):
        LeRobotDataset(copied)
    edit_info(copied, codebase_version="v3.0", fps="fast")
    with pytest.raises(DataError, match="needs 'fps'"):
        LeRobotDataset(copied)
    edit_info(copied, fps=20)
    shutil.rmtree(copied / "meta/episodes")
    with pytest.raises(DataError, match=r"no episodes \(0 without files\)"):
        LeRobotDataset(copied)
    (copied / "meta/info.json").write_text("{")
    with pytest.raises(DataError, match=r"info.json: cannot be read"):
        LeRobotDataset(copied)


def test_content_key_follows_the_files(copied):
    before = LeRobotDataset(copied).content_key
    assert LeRobotDataset(copied).content_key == before
    video = copied / f"videos/{PAINTED_CAMERAS[0]}/chunk-000/file-000.mp4"
    video.write_bytes(video.read_bytes() + b"x")
    assert LeRobotDataset(copied).content_key != before


def rewrite(root, change):
    """Change the data table of a written dataset in place."""
    path = root / "data/chunk-000/file-000.parquet"
    pq.write_table(change(pq.read_table(path)), path)


def spoil(table, key, row, column, value):
    values = np.stack(table[key].to_numpy(zero_copy_only=False))
    values[row, column] = value
    array = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    return table.set_column(table.schema.get_field_index(key), key, array)


def truncate(path, share=0.7):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


DATA = "data/chunk-000/file-000.parquet"
FAULTS = {
    "nan": (
        lambda r: rewrite(r, lambda t: spoil(t, "action", 35, 4, np.nan)),
        r"episode 1, frame 5: action\[4\] is nan",
    ),
    "inf": (
        lambda r: rewrite(r, lambda t: spoil(t, "observation.state", 91, 0, -np.inf)),
        r"episode 2, frame 44: obs.*-inf",
    ),
    "rows": (
        lambda r: rewrite(r, lambda t: t.slice(0, 91)),
        r"file-000.parquet: episode 2 has 44 rows, declared are 45",
    ),
    "gap": (
        lambda r: rewrite(r, lambda t: t.take([*range(33), 34, 33, *range(35, 92)])),
        r"episode 1: frame_index does not run from 0 to 16",
    ),
    "footer": (lambda r: truncate(r / DATA), r"file-000.parquet: cannot be read \(episode 0\)"),
    "parquet": (
        lambda r: (r / DATA).unlink(),
        r"file-000.parquet: cannot be read \(episode 0\); missing",
    ),
    "column": (
        lambda r: rewrite(r, lambda t: t.drop(["action"])),
        r"no numeric column 'action'\n    available: observ",
    ),
    "mp4 cut": (
        lambda r: truncate(r / PAINTED_VIDEO),
        r"left/chunk-000/file-000.mp4: cannot be read.*cut short.*\(episode 0, 1, 2\)",
    ),
    "mp4 empty": (
        lambda r: (r / PAINTED_VIDEO).write_bytes(b""),
        r"left/chunk-000/file-000.mp4: cannot be read",
    ),
    "mp4 short": (
        lambda r: reencode(r / PAINTED_VIDEO, 91),
        r"file-000.mp4: has 91 frames, episode 2 needs 92",
    ),
    "mp4 shorter": (
        lambda r: reencode(r / PAINTED_VIDEO, 40),
        r"file-000.mp4: has 40 frames, episode 1 needs 47",
    ),
    "camera": (
        lambda r: (r / PAINTED_VIDEO).unlink(),
        r"(?s)left' is declared in info.json but has no files.*available: observation.images.head",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_check_names_file_and_episode(name, copied):
    break_it, message = FAULTS[name]
    break_it(copied)
    with pytest.raises(DataError, match=message):
        check_files(LeRobotDataset(copied), PAINTED_CAMERAS, ["observation.state", "action"])


def test_check_lists_all_faults_and_the_way_out(copied):
    rewrite(copied, lambda t: spoil(t, "action", 35, 4, np.nan))
    truncate(copied / PAINTED_VIDEO)
    edit_info(
        copied,
        features=json.loads((copied / "meta/info.json").read_text())["features"]
        | {"observation.state": {"dtype": "float32", "shape": [7]}},
    )
    with pytest.raises(
        DataError, match=r"(?s)6 numbers a row.*\[7\].*is nan.*cut short.*data.episodes"
    ) as caught:
        check_files(LeRobotDataset(copied), PAINTED_CAMERAS, ["observation.state", "action"])
    assert len(str(caught.value).splitlines()) == 6
    assert check_files(LeRobotDataset(copied), PAINTED_CAMERAS[:1], ["action"], [0, 2]) == [
        f"{copied}: cameras not used: {PAINTED_CAMERAS[1]}"
    ]


def test_video_with_its_index_first_cut_short(copied):
    path = copied / PAINTED_VIDEO
    with (
        av.open(path) as source,
        av.open(copied / "fast.mp4", "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    (copied / "fast.mp4").rename(path)
    assert check_files(LeRobotDataset(copied), PAINTED_CAMERAS, ["action"]) == []
    truncate(path, 0.99)
    with pytest.raises(
        DataError,
        match=r"file-000.mp4: cut short: \d+ bytes, its frames need \d+ \(episode 0, 1, 2\)",
    ):
        check_files(LeRobotDataset(copied), PAINTED_CAMERAS, ["action"])


def test_fetch(tmp_path, monkeypatch, written):
    assert fetch(str(written[0])) == written[0]
    with pytest.raises(DataError, match="no folder nowhere"):
        fetch("./nowhere")
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda **how: asked.update(how) or str(written[0])
    )
    assert LeRobotDataset(fetch("lab/cloth")).version == "v3.0"
    assert asked == {"repo_id": "lab/cloth", "repo_type": "dataset"}


def test_fetch_offline(tmp_path, monkeypatch, written):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    real_download = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda **how: real_download(**how, cache_dir=tmp_path)
    )
    with pytest.raises(
        DataError, match=r"'lab/none' is no folder here.*Check the name and the network"
    ):
        fetch("lab/none")
    snapshot = tmp_path / "datasets--lab--cloth/snapshots/0123"
    shutil.copytree(written[0], snapshot)
    (tmp_path / "datasets--lab--cloth/refs").mkdir()
    (tmp_path / "datasets--lab--cloth/refs/main").write_text("0123")
    assert LeRobotDataset(fetch("lab/cloth")).root == snapshot
