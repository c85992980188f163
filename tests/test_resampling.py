"""Columns at another rate: kinds are recognised from the values, and none is bent silently."""

import re

import numpy as np
import pytest
from conftest import Experiment, write_demos
from helpers import real_dataset

from common import run
from common.config import ConfigError
from common.data.columns import joint_names, kinds, maybe_deltas, rows_before_another
from common.data.lerobot import LeRobotDataset
from common.data.resampling import Grid, chosen_kinds, given_kinds, unwrapped
from common.envs.avoid import Avoid, columns, demonstrations
from common.envs.tabletop import Tabletop, demonstrate
from common.schema import Data as Settings

FPS = 20.0
LENGTHS = (57, 91, 64, 80)
RATES = [5.0, 10.0, 7.0, 13.3, 30.0, 40.0, 100.0]  # below and above, by whole and other ratios


def bounds(lengths):
    """First and last row of each episode."""
    last = np.cumsum(lengths) - 1
    return last - np.array(lengths) + 1, last


def times(lengths=LENGTHS, rate=FPS, fps=FPS):
    """Episode and time of each point of a grid."""
    counts = [int((n - 1) * rate / fps + 1e-6) + 1 for n in lengths]
    episode = np.repeat(np.arange(len(lengths)), counts)
    return episode, np.concatenate([np.arange(count) for count in counts]) / rate


def grid(rate, lengths=LENGTHS):
    episode, time = times(lengths, rate)
    first, last = bounds(lengths)
    return Grid(time * FPS, first[episode], last[episode], FPS / rate, last)


def sampled(function, rate=FPS):
    """float32 (points, dim) of function(episode, time)."""
    return np.stack(function(*times(rate=rate)), 1).astype(np.float32)


def resampled(values, rate, state=None):
    """The column at another rate, by the kinds that are recognised."""
    found = kinds(values, *bounds(LENGTHS), state)
    return grid(rate).resampled(values, found), found


@pytest.mark.parametrize("rate", RATES)
def test_joints_are_interpolated(rate):
    def joints(episode, time):
        return [3 * time + episode, np.sin(0.3 * time)]

    made, found = resampled(sampled(joints), rate)
    assert found == ["linear"] * 2
    np.testing.assert_allclose(made, sampled(joints, rate), atol=1e-4)


@pytest.mark.parametrize("rate", RATES)
def test_few_values_are_held(rate):
    def phases(episode, time):
        gripper = (time + 0.2 * episode) % 1.7 < 0.8
        return [gripper, np.where(gripper, 0.08, 0.0), np.floor(2 * time) % 4 - 1, 90.0 * gripper]

    values = sampled(phases)
    made, found = resampled(values, rate)
    assert found == ["discrete"] * 4
    assert all(set(new) <= set(old) for new, old in zip(made.T, values.T, strict=True))
    episode, time = times(rate=rate)
    first, last = bounds(LENGTHS)
    nearest = np.minimum(
        first[episode] + np.floor(time * FPS + 0.5 + 1e-9).astype(int), last[episode]
    )
    np.testing.assert_array_equal(made, values[nearest])


def test_a_binary_sensor_may_be_noisy_and_a_gripper_that_moves_is_no_command():
    _, time = times()
    rng = np.random.default_rng(0)
    closed = (time % 1.7 < 0.8).astype(float)
    ramp = np.clip(closed.cumsum() % 16 / 4, 0, 1)  # 0, 0.25, ... 1, then held
    noisy = closed + 0.003 * rng.normal(size=len(time))
    pulses = rng.integers(0, 2, len(time))
    columns = [noisy, pulses, ramp, np.full(len(time), 3.0)]
    values = np.stack(columns, 1).astype(np.float32)
    assert kinds(values, *bounds(LENGTHS)) == ["discrete"] * 2 + ["linear"] * 2
    one_hot = np.eye(4, dtype=np.float32)[(2 * time).astype(int) % 4]  # of norm 1
    assert kinds(one_hot, *bounds(LENGTHS)) == ["discrete"] * 4


TURNS = {"radians": (2 * np.pi, -np.pi), "degrees": (360, 0), "symmetric degrees": (360, -180)}
TURNS |= {"ticks": (4096, 0)}


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(("period", "begin"), TURNS.values(), ids=TURNS)
def test_angles_go_the_short_way_round(rate, period, begin):
    def angle(episode, time):
        turns = (0.7 + 0.1 * episode) * time * (-1) ** episode + 0.3
        return [begin + (turns * period - begin) % period]

    made, found = resampled(sampled(angle), rate)
    assert found == ["angle"]
    assert made.min() >= begin
    assert made.max() <= begin + period * (1 + 1e-6)
    off = (made - sampled(angle, rate)) / period
    assert np.abs(off - np.round(off)).max() < 1e-4


def test_jumps_that_are_no_turns_stay_as_they_are():
    _, time = times()
    rng = np.random.default_rng(0)
    smooth = rng.normal(size=len(time)).cumsum() / 100
    jump = np.where(time % 1.7 < 0.8, -3.0, 3.0) + smooth - smooth.mean()
    sine = 3 * np.sin(time)
    shaking = 3 * (-1) ** np.arange(len(time)) + smooth
    values = np.stack([jump, sine, shaking], 1).astype(np.float32)
    assert kinds(values, *bounds(LENGTHS)) == ["linear"] * 3


def rotation(axis, angle):
    """Quaternions (w, x, y, z) of rotations about an axis."""
    axis = np.array(axis) / np.linalg.norm(axis)
    return [np.cos(angle / 2), *(axis[:, None] * np.sin(angle / 2))]


@pytest.mark.parametrize("rate", RATES)
def test_quaternions_turn_at_constant_speed(rate):
    rng = np.random.default_rng(0)

    def pose(episode, time):
        return [time, *rotation([1, 2, -1], (1.5 + episode) * time + 0.4)]

    values = sampled(pose)
    flips = rng.choice([-1, 1], (len(values), 1))
    values[:, 1:] *= flips
    made, found = resampled(values, rate)
    assert found == ["linear", *["quaternion"] * 4]
    np.testing.assert_allclose(np.linalg.norm(made[:, 1:], axis=1), 1, atol=1e-6)
    expected = sampled(pose, rate)[:, 1:] * flips[grid(rate).nearest]  # signs as recorded nearby
    np.testing.assert_allclose(made[:, 1:], expected, atol=2e-4)


def wander(seed, dim=2):
    """Smooth motion (rows, dim) of each episode, from a random start."""
    rng = np.random.default_rng(seed)
    steps = [np.cumsum(rng.normal(size=(n, dim)), 0) / 500 for n in LENGTHS]
    position = np.concatenate([np.cumsum(step, 0) + rng.normal(size=dim) for step in steps])
    return position.astype(np.float32)


def steps_of(state):
    """Deltas to the next row of the episode; the last of each is 0."""
    steps = np.zeros_like(state)
    before = rows_before_another(bounds(LENGTHS)[1])
    steps[before] = state[before + 1] - state[before]
    return steps


@pytest.mark.parametrize("rate", RATES)
def test_deltas_add_up_to_the_way_that_the_state_goes(rate):
    state = wander(0)
    made, found = resampled(steps_of(state), rate, state)
    assert found == ["delta"] * 2
    episode, _ = times(rate=rate)
    moved, _ = resampled(state, rate)
    for number in range(len(LENGTHS)):
        rows = episode == number
        way = made[rows].cumsum(0)[:-1]
        np.testing.assert_allclose(way, moved[rows][1:] - moved[rows][:1], atol=1e-5)


def test_deltas_are_summed_over_whole_steps_and_shared_out_between_them():
    actions = np.arange(LENGTHS[0], dtype=np.float32)[:, None]
    half = grid(10.0, LENGTHS[:1]).resampled(actions, ["delta"])[:, 0]
    assert half[:5].tolist() == [1, 5, 9, 13, 17]
    assert half[-1] == actions[-1]  # nothing follows the last row
    double = grid(40.0, LENGTHS[:1]).resampled(actions, ["delta"])[:, 0]
    assert double[:6].tolist() == [0, 0, 0.5, 0.5, 1, 1]


def test_deltas_are_recognised_late_blurred_or_of_few_values():
    state = wander(1)
    steps = steps_of(state)
    late = np.roll(steps, -2, 0)  # asked for two steps before
    noisy = steps + 0.3 * steps.std() * np.random.default_rng(0).normal(size=steps.shape)
    bounded = bounds(LENGTHS)
    assert kinds(noisy, *bounded, state) == ["delta"] * 2
    assert kinds(late, *bounded, state) == ["delta"] * 2
    drift = 0.5 * (-1) ** times()[0]
    jerky = (np.random.default_rng(0).normal(size=len(state)) + drift)[:, None].astype(np.float32)
    follows = np.roll(jerky, 2, 0).cumsum(0)
    assert kinds(jerky, *bounded, follows) == ["delta"]
    keys = np.random.default_rng(2).choice([-0.01, 0, 0.01], (len(state), 1))
    first, last = bounded
    pressed = np.concatenate(
        [keys[a : b + 1].cumsum(0) - keys[a : b + 1] for a, b in zip(*bounded, strict=True)]
    )
    assert kinds(keys, first, last) == ["linear"]
    assert kinds(keys, first, last, pressed) == ["delta"]


def test_deltas_of_an_angle_that_wraps():
    turned = 15 * wander(4, 1)
    wrapped = (turned + np.pi) % (2 * np.pi) - np.pi
    first, last = bounds(LENGTHS)
    names = {"s": ["yaw"], "action": ["yaw_rate"]}
    found = {"s": wrapped, "action": steps_of(turned)}
    settings = Settings(root="here", HZ=7.0, state_keys=["s"])
    chosen = chosen_kinds(settings, FPS, found, names, first, last)
    assert chosen == {"s": ["angle"], "action": ["delta"]}


def test_other_units_are_doubtful_and_velocities_are_not(capsys):
    state = wander(3)
    steps = steps_of(state)
    first, last = bounds(LENGTHS)
    mixed = steps @ np.array([[1.0, 2.0], [-2.0, 1.0]], np.float32)  # in a frame of its own
    for action, doubt in (
        (steps / 0.02, True),
        (steps * FPS, False),
        (mixed, True),
        (state, False),
    ):
        assert maybe_deltas(action, first, last, state, FPS).tolist() == [doubt] * 2
    names = {"observation.state": ["x", "y"], "action": ["dx", "dy"]}
    found = {"observation.state": state, "action": mixed}
    settings = {"root": "here", "HZ": 7.0}
    chosen = chosen_kinds(Settings(**settings), FPS, found, names, first, last)
    assert chosen["action"] == ["linear"] * 2
    out = capsys.readouterr().out
    assert (
        "warning: resampling from 20 to 7 Hz: action[0] (dx), action[1] (dy): perhaps deltas" in out
    )
    assert """data.resample='{"action[0]": delta}'""" in out
    by_hand = Settings(**settings, resample={"dx": "delta", "action": "linear"})
    chosen = chosen_kinds(by_hand, FPS, found, names, first, last)
    assert chosen["action"] == ["delta", "linear"]
    assert capsys.readouterr().out == ""
    names["action"] = ["delta_x", "y"]
    found["action"] = np.random.default_rng(0).normal(size=state.shape).astype(np.float32)
    chosen_kinds(Settings(**settings), FPS, found, names, first, last)
    assert "Hz: action[0] (delta_x): perhaps deltas" in capsys.readouterr().out


def test_a_jump_of_a_turn_that_is_no_angle_is_doubtful(capsys):
    _, time = times()
    smooth = np.cumsum(np.random.default_rng(0).normal(size=len(time))) / 100
    jumps = np.where(time % 1.7 < 0.8, -3.0, 3.0) + smooth - smooth.mean()
    found = {"s": jumps[:, None].astype(np.float32), "action": np.float32(time)[:, None]}
    names = {"s": ["wrist"], "action": ["a"]}
    settings = Settings(root="here", HZ=7.0, state_keys=["s"])
    assert chosen_kinds(settings, FPS, found, names, *bounds(LENGTHS))["s"] == ["linear"]
    assert "Hz: s[0] (wrist): perhaps an angle that wraps" in capsys.readouterr().out


def nothing_special(state, action, lengths, names=None):
    """Whether a recording looks like joints only."""
    first, last = bounds(lengths)
    found = [*kinds(state, first, last), *kinds(action, first, last, state)]
    doubts = maybe_deltas(action, first, last, state, FPS)
    return set(found) == {"linear"} and not doubts.any()


@pytest.mark.parametrize("seed", range(20))
def test_random_walks_are_joints(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(20, 60, 5)
    walks = [rng.normal(size=(n, 9)).cumsum(0) for n in lengths]
    walks = np.concatenate(walks).astype(np.float32)
    assert nothing_special(walks[:, :5], walks[:, 5:], lengths)
    smooth = np.concatenate([wander(seed), wander(seed + 50)], 1)
    targets = np.roll(smooth, -2, 0)
    assert nothing_special(smooth, wander(seed + 100), LENGTHS)
    targets[bounds(LENGTHS)[1]] = smooth[bounds(LENGTHS)[1]]
    assert nothing_special(smooth, targets, LENGTHS)


def test_demonstrations_are_joints_but_for_gripper_commands():
    episodes = [demonstrate(seed, Tabletop, (32, 32), render=False) for seed in range(8)]
    episodes = [episode for episode in episodes if episode]
    lengths = [len(episode["action"]) for episode in episodes]
    state, action = (
        np.concatenate([np.float32(episode[key]) for episode in episodes])
        for key in ("observation.state", "action")
    )
    first, last = bounds(lengths)
    assert set(kinds(state, first, last)) == {"linear"}
    expected = ["linear", "linear", "discrete"] * 2
    assert kinds(action, first, last, state) == expected
    assert not maybe_deltas(action, first, last, state, FPS).any()
    _, _, paths = demonstrations(tuple(min(count, 2) for count in Avoid.COUNTS))
    episodes = [columns(path) for path in paths]
    state, action = (
        np.concatenate([np.float32(episode[key]) for episode in episodes])
        for key in ("observation.state", "action")
    )
    assert nothing_special(state, action, [len(episode["action"]) for episode in episodes])


@pytest.mark.parametrize("name", ["so101_bimanual_cloth_v21", "gr1_picknplace_sim_v20"])
def test_real_recordings_are_joints_but_for_hands_that_open_and_close(name):
    dataset = LeRobotDataset(real_dataset(name))
    found = dataset.columns(["observation.state", "action"])
    first, last = bounds([episode.length for episode in dataset.episodes])
    state = found["observation.state"]
    assert set(kinds(state, first, last)) == {"linear"}
    action = kinds(found["action"], first, last, state)
    hands = [i for i, kind in enumerate(action) if kind == "discrete"]
    assert hands == ([] if name.startswith("so101") else [29, 30, 31, 32, 33])
    assert set(action) <= {"linear", "discrete"}
    assert not maybe_deltas(found["action"], first, last, state, dataset.fps).any()


NAMES = {"state": ["x", "y"], "action": ["x", "y", "w", "grip", "wrist"]}


def test_kinds_given_by_hand():
    given = given_kinds({"grip": "linear", "action[4]": "angle", "x": "delta"}, ["state"], NAMES)
    assert given["state"] == ["delta", "discrete"]
    assert given["action"] == ["delta", None, None, "linear", "angle"]
    whole = given_kinds({"action": "discrete", "action[1]": "linear"}, [], NAMES)
    assert whole["action"] == ["discrete", "linear", *["discrete"] * 3]
    with pytest.raises(ConfigError, match=r"'gripp' is no column .* did you mean 'grip'"):
        given_kinds({"gripp": "linear"}, [], NAMES)
    with pytest.raises(ConfigError, match="5 numbers of action are said to be quaternions"):
        given_kinds({"action": "quaternion"}, [], NAMES)


def test_an_angle_by_hand_that_does_not_wrap_is_interpolated():
    values = wander(0, 1)
    for rate in RATES:
        plain = grid(rate).resampled(values, ["linear"])
        np.testing.assert_allclose(grid(rate).resampled(values, ["angle"]), plain, atol=1e-6)
    assert np.array_equal(
        unwrapped(values, ["angle"], rows_before_another(bounds(LENGTHS)[1])), values
    )


@pytest.fixture(scope="module")
def deltas(tmp_path_factory):
    """Demonstrations at 10 Hz: deltas of two states, a gripper, and a wrist that turns."""

    def edit(episode, arrays):
        n = len(arrays["action"])
        steps = np.diff(arrays["observation.state"][:, :2], axis=0, append=0)
        steps[-1] = 0
        arrays["action"][:, :2] = steps
        arrays["action"][:, 2] = np.arange(n) > n // 2
        arrays["action"][:, 3] = (0.7 * np.arange(n) + np.pi) % (2 * np.pi) - np.pi

    return write_demos(tmp_path_factory.mktemp("deltas") / "demos", edit=edit)


def printed(exp, capsys, *overrides):
    """Exit code of the command and what it printed."""
    with pytest.raises(SystemExit) as e:
        run.cli(lambda: exp.main("train.total_steps=1", *overrides))
    streams = capsys.readouterr()
    return e.value.code, streams.out + streams.err


@pytest.mark.parametrize("rate", [5, 4, 25])
def test_training_at_another_rate_says_what_it_does(deltas, tmp_path, capsys, rate):
    exp = Experiment(tmp_path, deltas)
    code, out = printed(exp, capsys, f"data.HZ={rate}")
    assert code == 0
    start = f"resampling from 10 to {rate} Hz: "
    assert f"{start}action[0], action[1]: deltas of the state: added up over each step" in out
    assert f"{start}action[2]: few values: the nearest one is taken" in out
    assert f"{start}action[3]: an angle that wraps: interpolated the short way" in out
    windows = exp.job.data.windows
    assert set(windows.action[:, 2]) == {0, 1}
    turned = np.diff(windows.action[:, 3]) - 0.7 * 10 / rate
    turned = turned[np.diff(windows.episode) == 0] / (2 * np.pi)
    assert np.abs(turned - np.round(turned)).max() < 1e-4
    for first, last in zip(windows.first, windows.last, strict=True):
        way = windows.state[last, :2] - windows.state[first, :2]
        np.testing.assert_allclose(windows.action[first:last, :2].sum(0), way, atol=1e-4)


def test_kinds_can_be_overridden_and_mistakes_are_errors(deltas, tmp_path, capsys):
    exp = Experiment(tmp_path, deltas)
    code, out = printed(exp, capsys, "data.HZ=4", "data.resample={action: linear}")
    assert code == 0
    assert "resampling from" not in out
    assert len(set(exp.job.data.windows.action[:, 2])) > 2
    code, out = printed(exp, capsys, "data.HZ=10", "data.resample={acton: linear}")
    assert code == 2
    assert re.search("error: data.resample: 'acton' .*did you mean 'action'", out)
    code, out = printed(exp, capsys, "data.resample={action: square}")
    assert code == 2
    assert "data.resample" in out


def test_at_the_rate_of_the_dataset_nothing_changes_and_nothing_is_said(deltas, tmp_path, capsys):
    exp = Experiment(tmp_path, deltas)
    assert "resampling from" not in printed(exp, capsys)[1]
    dataset = LeRobotDataset(deltas)
    for key, values in (("observation.state", "state"), ("action", "action")):
        recorded = dataset.columns([key])[key]
        assert np.array_equal(getattr(exp.job.data.windows, values), recorded)
    assert joint_names(dataset.features, "action", 4) == exp.job.data.names["action"]
