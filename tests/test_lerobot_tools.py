"""Datasets that lerobot's own tools edited read right, frame for frame and row for row.

Needs an interpreter with lerobot 0.6.1 or newer, which wants other versions of what we use:
LEROBOT_PYTHON=/path/to/its/bin/python python -m pytest -m slow tests/test_lerobot_tools.py
"""

import io
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import (
    PAINTED_CAMERAS,
    PAINTED_LENGTHS,
    PAINTED_SIZE,
    edit_table,
    paint,
    spelled,
    write_painted,
)
from PIL import Image

from common.data.checks import check_files
from common.data.frames import VideoFrames
from common.data.lerobot import LeRobotDataset

PYTHON = os.environ.get("LEROBOT_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="LEROBOT_PYTHON names no interpreter with lerobot"),
]
FPS = 30  # start times are no exact floats
OTHER = (9, 21)
# lerobot's default, AV1 at crf 30, leaves blocks of the frame before in pictures as ours.
ENCODER = {"operation__rgb_encoder__vcodec": "h264", "operation__rgb_encoder__crf": 18}
STATE = "observation.state"
ROWS = np.split(np.arange(sum(PAINTED_LENGTHS)), np.cumsum(PAINTED_LENGTHS)[:-1])
OTHER_ROWS = np.split(np.arange(sum(OTHER)), np.cumsum(OTHER)[:-1])


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Folder of datasets `first` and `other`, and {name: rows of state} of both."""
    folder = tmp_path_factory.mktemp("lerobot")
    states = {
        "first": write_painted(folder / "first", fps=FPS)[0],
        "other": write_painted(folder / "other", OTHER, FPS)[0],
    }
    return folder, states


def edit(folder, operation, **options):
    """lerobot-edit-dataset in `folder`. Its dataset ids are read nowhere."""
    tool = Path(PYTHON).with_name("lerobot-edit-dataset")
    command = [str(tool), f"--operation.type={operation}"]
    command += [f"--{name.replace('__', '.')}={value}" for name, value in options.items()]
    home = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=folder, env=os.environ | home, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def check(root, expected, cameras=PAINTED_CAMERAS):
    """expected: for each episode its rows of state (n, 6) and the numbers that its frames spell."""
    dataset = LeRobotDataset(root)
    assert dataset.cameras == cameras
    assert check_files(dataset, cameras, [STATE, "action"]) == []
    assert [e.length for e in dataset.episodes] == [len(numbers) for _, numbers in expected]
    rows = dataset.columns([STATE])[STATE]
    np.testing.assert_array_equal(rows, np.concatenate([state for state, _ in expected]))
    numbers = np.concatenate([numbers for _, numbers in expected])
    frames = VideoFrames(dataset, {key: key for key in cameras}, PAINTED_SIZE, None)
    for key in cameras:
        images = frames.gather(key, np.arange(len(numbers)))
        found = [spelled(image, key == PAINTED_CAMERAS[1]) for image in images]
        assert found == numbers.tolist(), key


def parts(state, rows):
    return [(state[numbers], numbers) for numbers in rows]


def test_episodes_deleted_and_then_merged_with_another_set(sets):
    folder, states = sets
    edit(
        folder,
        "delete_episodes",
        repo_id="a/first",
        root="first",
        new_repo_id="a/rest",
        new_root="rest",
        operation__episode_indices="[1]",
    )
    rest = parts(states["first"], [ROWS[0], ROWS[2]])
    check(folder / "rest", rest)
    edit(
        folder,
        "merge",
        new_repo_id="a/merged",
        new_root="merged",
        operation__repo_ids="['a/rest', 'a/other']",
        operation__roots=f"['{folder}/rest', '{folder}/other']",
    )
    check(folder / "merged", [*rest, *parts(states["other"], OTHER_ROWS)])


def test_a_split(sets):
    folder, states = sets
    edit(
        folder,
        "split",
        repo_id="a/first",
        root="first",
        new_root="split",
        operation__splits=json.dumps({"train": [0, 2], "val": [1]}),
    )
    check(folder / "split/train", parts(states["first"], [ROWS[0], ROWS[2]]))
    check(folder / "split/val", parts(states["first"], [ROWS[1]]))


@pytest.mark.parametrize("joined", ["true", "false"])
def test_a_set_merged_with_itself(joined, sets):
    folder, states = sets
    edit(
        folder,
        "merge",
        new_repo_id="a/twice",
        new_root=f"twice_{joined}",
        operation__repo_ids="['a/first', 'a/first']",
        operation__roots=f"['{folder}/first', '{folder}/first']",
        operation__concatenate_videos=joined,
        operation__concatenate_data=joined,
    )
    check(folder / f"twice_{joined}", parts(states["first"], ROWS) * 2)


def test_a_camera_removed(sets):
    folder, states = sets
    edit(
        folder,
        "remove_feature",
        repo_id="a/first",
        root="first",
        new_repo_id="a/one",
        new_root="one",
        operation__feature_names=f"['{PAINTED_CAMERAS[0]}']",
    )
    check(folder / "one", parts(states["first"], ROWS), PAINTED_CAMERAS[1:])


def test_videos_encoded_again(sets):
    folder, states = sets
    edit(
        folder,
        "reencode_videos",
        repo_id="a/first",
        root="first",
        new_repo_id="a/again",
        new_root="again",
        **ENCODER,
    )
    check(folder / "again", parts(states["first"], ROWS))


def as_pictures(root):
    """The videos of a painted set become pictures in parquet."""
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    for key in PAINTED_CAMERAS:
        cells = []
        for number in range(table.num_rows):
            buffer = io.BytesIO()
            Image.fromarray(paint(number, key == PAINTED_CAMERAS[1])).save(buffer, "PNG")
            cells.append({"bytes": buffer.getvalue(), "path": f"frame-{number:06d}.png"})
        table = table.append_column(key, pa.array(cells))
    pq.write_table(table, path)

    def without_videos(rows):
        for row in rows:
            for name in [name for name in row if name.startswith("videos/")]:
                del row[name]

    edit_table(root / "meta/episodes/chunk-000/file-000.parquet", without_videos)
    info = json.loads((root / "meta/info.json").read_text())
    for key in PAINTED_CAMERAS:
        info["features"][key]["dtype"] = "image"
        del info["features"][key]["info"]
    (root / "meta/info.json").write_text(json.dumps(info | {"video_path": None}))
    return root


def test_pictures_converted_to_videos(sets, tmp_path):
    state, _ = write_painted(tmp_path / "set", fps=FPS)
    as_pictures(tmp_path / "set")
    check(tmp_path / "set", parts(state, ROWS))
    edit(
        tmp_path,
        "convert_image_to_video",
        repo_id="a/set",
        root="set",
        new_repo_id="a/video",
        new_root="video",
        **ENCODER,
    )
    check(tmp_path / "video", parts(state, ROWS))
