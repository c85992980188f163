"""Scales of state and action: what statistics tell of a dataset, and what they warn of."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import Experiment, write_demos

from common import checkpoint, run
from common.data.loader import Data
from common.data.normalizer import (
    Normalizer,
    differences,
    neighbour_scale,
    poor_scales,
    statistics,
)
from common.schema import Data as Settings


def rows(mean, std, count=400, seed=0):
    """float32 (count, dims) with about these means and spreads."""
    noise = np.random.default_rng(seed).normal(size=(count, len(mean)))
    return (np.array(mean) + np.array(std) * noise).astype(np.float32)


def compare(trained, found, names=None):
    """Differences of the actions; the states are alike."""
    return differences(statistics(STATE, trained), statistics(STATE, found), names)


STATE = rows([0.0], [1.0])
USUAL = rows([0.25, -2.0, 100.0], [0.1, 0.02, 30.0])


def test_another_recording_of_the_same_robot_does_not_differ():
    assert compare(USUAL, rows([0.3, -2.03, 80.0], [0.07, 0.04, 40.0], seed=1)) == []


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (14.3, 5.73, r"mean 14\.\d with a spread of 5\.\d+, in training 0\.2\d+ with 0\.\d+: "),
        (14.3, 5.73, "other units \\(degrees, in training radians\\?\\)"),
        (0.0044, 0.00175, "radians, in training degrees"),
        (250.0, 100.0, "millimetres, in training metres"),
        (1.0, 0.1, "other units\\?"),
        (0.25, 0.7, "other units\\?"),
        (0.25, 0.01, "other units\\?"),
        (0.25, 0.0, "constant here"),
    ],
)
def test_a_dimension_of_another_kind_is_named(mean, std, message):
    names = {"action": ["left_gripper", "x", "y"]}
    lines = compare(USUAL, rows([mean, -2.0, 100.0], [std, 0.02, 30.0], seed=1), names)
    assert len(lines) == 1
    assert lines[0].startswith("action[0] (left_gripper): mean ")
    assert re.search(message, lines[0])


def test_dimensions_that_were_constant():
    trained = rows([0.0, 7.0, 7.0, 0.0], [0.0, 0.0, 0.0, 0.0])
    still = rows([0.001, 7.1, 7.0, 0.0], [0.0, 0.0, 0.01, 0.0], seed=1)
    assert compare(trained, still) == []
    moved = compare(trained, rows([0.0, 8.0, 7.0, 0.5], [0.2, 0.0, 0.0, 0.0], seed=1))
    assert [line.split(":")[0] for line in moved] == ["action[0]", "action[1]", "action[3]"]
    assert all(line.endswith(": constant in training") for line in moved)


def test_another_number_of_dimensions_is_one_line():
    assert compare(USUAL, USUAL[:, :2]) == ["action: 2 numbers, in training 3"]


MODES = ["mean_std", "quantile"]


def scaled(actions, mode="mean_std", min_std=0.0):
    return Normalizer(mode, statistics(STATE, actions), min_std)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1e-4, 0.003, 1.0, 4000.0])
def test_the_scale_follows_the_units(mode, size):
    """Rounding apart, metres and millimetres train the same."""
    usual = scaled(USUAL, mode)
    other = scaled(USUAL * np.float32(size), mode)
    x = torch.from_numpy(USUAL)
    for normalizer, values in ((usual, x), (other, x * size)):
        found = normalizer.normalize("action", values)
        torch.testing.assert_close(found, usual.normalize("action", x), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(
            normalizer.denormalize("action", found), values, atol=0, rtol=1e-3
        )


@pytest.mark.parametrize("mode", MODES)
def test_dimensions_with_a_spread_above_the_old_floor_keep_their_scale_bit_for_bit(mode):
    actions = rows([0.25, -2.0, 100.0], [0.05, 0.04, 30.0])
    new = scaled(actions, mode)
    old = scaled(actions, mode, 0.01)
    x = torch.from_numpy(actions)
    assert all(map(torch.equal, new.affine("action"), old.affine("action")))
    assert torch.equal(new.denormalize("action", 3 * x), old.denormalize("action", 3 * x))


NOISE = np.random.default_rng(1).uniform(-1, 1, (400, 1))
LOCKED = {  # rounding errors of a joint that stands still
    "exact": np.full((400, 1), 7.0),
    "computed": 1.5 + 3e-7 * NOISE,
    "near zero": 1e-7 * NOISE,
    "ticks": 4095.3 + 4e-4 * NOISE,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("values", LOCKED.values(), ids=LOCKED)
def test_rounding_errors_are_not_blown_up_to_unit_spread(mode, values, capsys):
    actions = np.concatenate([USUAL[:, :2], values.astype(np.float32)], 1)
    stats = statistics(STATE, actions, {"state": ["s"], "action": ["x", "y", "wrist"]})
    assert (
        "action dimensions [2] are constant over the training episodes: wrist"
        in capsys.readouterr().out
    )
    normalizer = Normalizer(mode, stats)
    assert normalizer.affine("action")[1][2] == 1
    assert normalizer.normalize("action", torch.from_numpy(actions))[:, 2].abs().max() < 1e-3
    noise = normalizer.denormalize("action", torch.tensor([[0.0, 0.0, 3.0], [0.0, 0.0, -3.0]]))
    assert noise[:, 2].numpy() == pytest.approx(values.mean(), rel=1e-6, abs=2e-7)
    assert poor_scales(normalizer, STATE, actions) == []


def test_the_smallest_scale_by_hand():
    actions = np.concatenate([USUAL, np.zeros_like(USUAL[:, :1])], 1)
    for mode in MODES:
        _, own = scaled(actions, mode).affine("action")
        _, scale = scaled(actions, mode, 2.0).affine("action")
        assert scale.tolist() == [2.0, 2.0, own[2], 2.0]


def warned(column, mode="mean_std", min_std=0.0):
    """Warnings of one action's scale."""
    actions = np.asarray(column, np.float32)[:, None]
    names = {"state": ["s"], "action": ["grip"]}
    return poor_scales(scaled(actions, mode, min_std), STATE, actions, names)


USUAL_COLUMN = rows([0.25], [0.1], 1000)[:, 0]
GLITCH = np.where(np.arange(1000) == 7, 200.0, USUAL_COLUMN)
CLOSED = (np.arange(1000) < 5).astype(float)
BAD_SCALES = [
    (GLITCH, "mean_std", 0, r"spread of 0\.0\d+ .*outliers stretch the std, .*normalize: quantile"),
    (GLITCH, "quantile", 0, "single values lie .* scales off .*damaged rows"),
    (CLOSED, "mean_std", 0, "98 % of the rows .*it rarely moves$"),
    (CLOSED, "quantile", 0, "98 % of the rows .*it rarely moves$"),
    (USUAL_COLUMN, "mean_std", 1, r"spread of 0\.\d+ .*data.min_std 1 is too large for it$"),
    (USUAL_COLUMN, "quantile", 1, "data.min_std 1 is too large for it$"),
    (1.5 + 1e-4 * USUAL_COLUMN, "mean_std", 0, "less than a thousandth .*try data.min_std$"),
]


@pytest.mark.parametrize(("column", "mode", "min_std", "message"), BAD_SCALES)
def test_a_scale_that_does_not_suit_its_dimension_is_named(column, mode, min_std, message):
    lines = warned(column, mode, min_std)
    assert len(lines) == 1
    assert re.search(rf"^action\[0\] \(grip\): .*{message}", lines[0])
    ends = np.float32([column.min(), column.max()])
    assert f"all rows {ends[0]:.6g} to {ends[1]:.6g}" in lines[0]


@pytest.mark.parametrize("mode", MODES)
def test_healthy_dimensions_are_not_warned_of(mode):
    time = np.linspace(0, 20, 1000)
    for column in (
        USUAL_COLUMN,
        0.001 * USUAL_COLUMN,
        np.sin(time),
        time < 10,
        time < 0.5,  # closed for 2.5 % of the time
        np.random.default_rng(0).standard_t(3, 1000),
        np.random.default_rng(0).normal(size=1000).cumsum(),
    ):
        assert warned(column, mode) == []
    assert warned(1.5 + 1e-4 * USUAL_COLUMN, mode, min_std=0.01) != []  # by hand, and too large


def test_neighbours_are_found_in_small_units_too():
    state = rows([0.0, 1.0, 5.0], [1.0, 0.0004, 0.0])
    scale = neighbour_scale(state)
    assert scale[0] == state.std(0)[0] + 1e-2  # as ever
    assert (state / scale).std(0) == pytest.approx([0.99, 0.5, 0], abs=0.01)
    assert scale[2] == 1


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Demonstrations whose actions are deltas of a few millimetres, the last one locked."""

    def edit(episode, arrays):
        arrays["action"] *= [0.001, 0.001, 0.001, 0]

    return write_demos(tmp_path_factory.mktemp("small") / "demos", edit=edit)


def test_training_sees_small_actions_at_unit_spread(small, tmp_path):
    exp = Experiment(tmp_path, small)
    exp.main("train.total_steps=1")
    stats = exp.job.policy.stats
    action = torch.from_numpy(exp.job.data.windows.action)
    spread = stats.normalize("action", action).std(0)
    assert spread.tolist() == pytest.approx([1, 1, 1, 0], abs=0.2)
    assert exp.meta("step_1")["config"]["data"]["min_std"] == 0


def write_meta(folder, edit):
    """Change meta.json of a checkpoint."""
    meta = checkpoint.read_meta(folder)
    edit(meta)
    digest = checkpoint._digest(meta)
    (folder / "meta.json").write_text(json.dumps({**meta, "sha256": digest}))


def test_an_old_checkpoint_keeps_the_scale_that_it_was_trained_with(small, tmp_path, capsys):
    exp = Experiment(tmp_path, small)
    exp.main("train.total_steps=2", "data.min_std=0.01")
    assert exp.job.policy.stats.affine("action")[1].tolist() == pytest.approx([0.01] * 4)

    def without_new_keys(meta):
        for key in ("min_std", "resample"):
            del meta["config"]["data"][key]

    write_meta(exp.save_dir / "step_2", without_new_keys)
    policy, cfg = checkpoint.open_policy(exp.save_dir)
    assert cfg.data.min_std == 0.01
    old = policy.stats.affine("action")
    assert old[1].tolist() == pytest.approx([0.01] * 4)
    exp.main("train.total_steps=3")
    out = capsys.readouterr().out
    assert "data.min_std stays 0.01, as this run began" in out
    assert "was None" not in out
    assert all(map(torch.equal, exp.job.policy.stats.affine("action"), old))
    policy, _ = checkpoint.open_policy(exp.save_dir)
    assert all(map(torch.equal, policy.stats.affine("action"), old))


def test_warnings_name_dimensions_as_the_dataset_does(small, capsys):
    settings = {"HZ": 10.0, "val_episodes": 0.0, "state_keys": ["observation.state", "action"]}
    data = Data(Settings(root=str(small), min_std=0.5, **settings))
    out = capsys.readouterr().out
    assert "state dimensions [8] are constant over the training episodes: action[3]" in out
    assert "warning: state[5] (action[0]): 98 % of the rows have a normalised spread of 0.0" in out
    assert data.names["state"][4:6] == ["observation.state[4]", "action[0]"]


def finished(exp, capsys, *overrides):
    """Exit code of the command and all that it printed."""
    with pytest.raises(SystemExit) as e:
        run.cli(lambda: exp.main(*overrides))
    streams = capsys.readouterr()
    return e.value.code, streams.out + streams.err


OTHER_UNITS = r"\n    action\[1\]: mean \S+ with a spread of \S+, in training \S+ with \S+: other "
OTHER_UNITS += r"units \(degrees, in training radians\?\)\n(?!    )"


def test_resuming_on_another_dataset_names_its_dimensions(demos, tmp_path, capsys):
    def edit(episode, arrays):
        arrays["action"][:, 1] *= 57.3

    degrees = write_demos(tmp_path / "degrees", edit=edit)
    exp = Experiment(tmp_path / "exp", demos)
    assert finished(exp, capsys, "train.total_steps=1")[0] == 0
    stats = exp.job.policy.stats.state_dict()
    code, out = finished(exp, capsys, "train.total_steps=2", f"data.root={degrees}")
    assert code == 0
    folder = f"{exp.save_dir}/step_1"
    assert f"files of {degrees} are not those that {folder} was trained on, in {demos}" in out
    start = re.escape(f"warning: other data than this run, which keeps the statistics of {folder},")
    assert re.search(start + " learned from" + OTHER_UNITS, out)
    kept = exp.job.policy.stats.state_dict()
    assert all(torch.equal(kept[key], value) for key, value in stats.items())
    assert exp.meta("step_2")["dataset"]["root"] == str(degrees)
    assert exp.meta("step_2")["names"]["action"][1] == "action[1]"


def test_components_of_another_dataset(demos, tmp_path, capsys):
    def edit(episode, arrays):
        arrays["action"][:, 1] *= 57.3

    old = Experiment(tmp_path / "old", demos)
    assert finished(old, capsys, "train.total_steps=1")[0] == 0
    degrees = write_demos(tmp_path / "degrees", edit=edit)
    exp = Experiment(tmp_path / "exp", degrees)
    options = ("train.total_steps=1", f"train.load_dir={old.save_dir}")
    code, out = finished(exp, capsys, *options)
    assert code == 0
    start = re.escape(f"other data than components of {old.save_dir}/step_1 (train.load_dir)")
    assert re.search(start + " learned from" + OTHER_UNITS, out)


def test_resuming_on_the_same_dataset_says_nothing_of_it(demos, tmp_path, capsys):
    exp = Experiment(tmp_path, demos)
    assert finished(exp, capsys, "train.total_steps=1")[0] == 0
    write_meta(exp.save_dir / "step_1", lambda meta: meta.pop("dataset"))  # as before it was there
    for steps in (2, 3):
        code, out = finished(exp, capsys, f"train.total_steps={steps}")
        assert code == 0
        assert "other data" not in out
        assert "files of" not in out


def test_resuming_on_data_of_another_width_is_one_error(demos, tmp_path, capsys):
    exp = Experiment(tmp_path, demos)
    assert finished(exp, capsys, "train.total_steps=1")[0] == 0
    wider = "data.state_keys=[observation.state, action]"
    code, out = finished(exp, capsys, "train.total_steps=2", wider)
    assert code == 2
    assert f"error: {demos}: state_dim 9, action_dim 4; {exp.save_dir}/step_1 was trained" in out
    assert "on state_dim 5, action_dim 4\n    give data.root, data.state_keys" in out
