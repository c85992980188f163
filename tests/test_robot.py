"""Robot: histories, pictures, replanning, late chunks, errors of observations, and checkpoints."""

import shutil
import sys
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from conftest import CAMERAS, Experiment, forget_accelerator
from helpers import ScriptedPolicy, rewrite_meta
from PIL import Image

import evaluate
import train_mi
import train_vfp
from common import config, schema
from common.checkpoint import newest, read_meta
from common.config import UserError
from common.data.frames import VideoFrames
from common.data.images import IMAGE
from common.data.lerobot import LeRobotDataset
from common.data.loader import to_device
from common.data.normalizer import Normalizer, statistics
from common.envs import avoid, tabletop
from common.envs.registry import ENVIRONMENTS
from common.noise import RowNoise
from common.robot import Execution, ObservationError, Robot

torch.set_num_threads(1)
STATE = "observation.state"


def robot_of(policy, settings=None, **options):
    """A Robot of a ScriptedPolicy at 10 Hz, with chunks of 6 and 2 states per observation."""
    data = {
        "root": "nowhere",
        "HZ": 10,
        "action_horizon": 6,
        "obs_proprio_history": 2,
        "image_size": [8, 8],
    }
    cfg = SimpleNamespace(data=config.from_dict(schema.Data, data | (settings or {})))
    return Robot(policy, cfg, **{"nfe": 3, "replan_steps": 4} | options)


def observe(tick, name=1, **more):
    return {STATE: np.float32([name, tick]), **more}


def drive(robot, ticks):
    """First numbers of these ticks' actions: 100 tick + j for action j of the chunk of a tick."""
    return [int(robot.act(observe(tick))[0]) for tick in ticks]


# histories and observations


def test_the_first_observation_fills_the_histories_and_they_roll():
    policy = ScriptedPolicy()
    settings = {"obs_proprio_history": 3, "obs_images_history": 2, "cameras": {"up": "top"}}
    robot = robot_of(policy, settings, replan_steps=1)
    for tick in range(5):
        picture = np.full((8, 8, 3), tick, np.uint8)
        robot.act(observe(tick, top=picture))
        plan = policy.seen[-1]
        assert plan["states"].tolist() == [[1, max(tick - k, 0)] for k in (2, 1, 0)]
        assert plan[IMAGE + "up"].shape == (2, 3, 8, 8)
        assert plan[IMAGE + "up"][:, 0, 0, 0].round().tolist() == [max(tick - 1, 0), tick]
    robot.reset()
    robot.act(observe(7, top=np.full((8, 8, 3), 9, np.uint8)))
    assert policy.seen[-1]["states"].tolist() == [[1, 7]] * 3
    assert policy.seen[-1][IMAGE + "up"][:, 0, 0, 0].round().tolist() == [9, 9]


def test_states_are_raw_and_concatenated_in_the_order_of_the_keys():
    policy = ScriptedPolicy()
    policy.stats.state_std *= 50
    robot = robot_of(policy, {"state_keys": ["b", "a"]}, nfe=5)
    robot.act({"a": np.int64(7), "b": [123.5], "unused": "text"})
    assert policy.seen[0]["states"].tolist() == [[123.5, 7]] * 2
    assert policy.seen[0]["nfe"] == 5


def test_pictures_are_resized_as_those_of_the_frame_cache(demos):
    dataset = LeRobotDataset(demos)
    key = CAMERAS["left"]
    episode = dataset.episodes[0].index
    original = VideoFrames(dataset, {"left": key}, (32, 32), [episode])
    cached = VideoFrames(dataset, {"left": key}, (12, 20), [episode])
    policy = ScriptedPolicy()
    settings = {"cameras": {"left": key}, "image_size": [12, 20]}
    robot = robot_of(policy, settings, replan_steps=1)
    for row in range(3):
        picture = original.frame("left", row).transpose(1, 2, 0)
        robot.act(observe(row, **{key: picture}))
        given = policy.seen[-1][IMAGE + "left"].round().to(torch.uint8).numpy()
        np.testing.assert_array_equal(given, cached.frame("left", row))


def test_pictures_are_asked_for_only_where_they_are_planned_from():
    policy = ScriptedPolicy()
    settings = {"cameras": {"up": "top"}, "obs_images_history": 2}
    robot = robot_of(policy, settings, replan_steps=4)
    needed = []
    for tick in range(9):
        needed.append(robot.needs_pictures)
        picture = {"top": np.full((8, 8, 3), tick, np.uint8)} if robot.needs_pictures else {}
        robot.act(observe(tick, **picture))
    assert [tick for tick, need in enumerate(needed) if need] == [0, 3, 4, 7, 8]
    assert [plan[IMAGE + "up"][:, 0, 0, 0].round().tolist() for plan in policy.seen] == [
        [0, 0],
        [3, 4],
        [7, 8],
    ]
    assert not robot_of(ScriptedPolicy()).needs_pictures
    assert robot_of(ScriptedPolicy(), settings, delay=1).needs_pictures


PICTURE = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({STATE: None}, r"lacks 'observation.state'; it has top"),
        ({"top": None}, r"lacks 'top'; it has observation.state"),
        ({STATE: np.float32([1, 2, 3])}, r"observation.state: 3 numbers a robot, .* trained on 2"),
        ({STATE: np.float32(1)}, r"observation.state: 1 numbers a robot, .* trained on 2"),
        ({STATE: np.array(["a", "b"])}, r"observation.state: expected numbers, found <U1"),
        ({STATE: [None, 1.0]}, r"observation.state: expected numbers, found object"),
        ({STATE: np.float32([1, np.nan])}, r"observation.state: number 1 is nan"),
        ({STATE: np.float32([np.inf, 1])}, r"observation.state: number 0 is inf"),
        ({"top": PICTURE / 255.0}, r"top: expected uint8 pictures .*, found float64"),
        ({"top": PICTURE[..., 0]}, r"top: expected \(h, w, 3\) pictures, found \(8, 8\)"),
        ({"top": PICTURE[None]}, r"top: expected \(h, w, 3\) pictures, found \(1, 8, 8, 3\)"),
        ({"top": np.zeros((8, 8, 4), np.uint8)}, r"top: expected .*, found \(8, 8, 4\)"),
        (
            {"top": PICTURE.transpose(2, 0, 1)},
            r"top: expected .*, found \(3, 8, 8\); move the channels to the end",
        ),
    ],
)
def test_an_observation_that_cannot_be_is_refused_before_it_is_remembered(change, message):
    settings = {"cameras": {"up": "top"}}
    plans = []
    for mistaken in (False, True):
        policy = ScriptedPolicy()
        robot = robot_of(policy, settings, replan_steps=1)
        robot.act(observe(0, top=PICTURE))
        if mistaken:
            given = observe(1, top=PICTURE) | change
            given = {key: value for key, value in given.items() if value is not None}
            with pytest.raises(ObservationError, match=message):
                robot.act(given)
        robot.act(observe(2, top=PICTURE))
        plans.append(policy.seen)
    assert [plan["states"].tolist() for plan in plans[0]] == [
        plan["states"].tolist() for plan in plans[1]
    ]
    np.testing.assert_array_equal(plans[0][1]["x0"], plans[1][1]["x0"])


def test_a_number_that_is_not_finite_is_that_of_its_robot():
    robot = robot_of(ScriptedPolicy(), replan_steps=1)
    robot.reset([("a",), ("b",), ("c",)])
    states = np.ones((3, 2), np.float32)
    robot.act({STATE: states})
    states[1, 0] = np.nan
    with pytest.raises(ObservationError, match="number 0 of robot 2 is nan"):
        robot.act({STATE: states[:2]}, [0, 2])
    with pytest.raises(ObservationError, match=r"a row for each of 2 robots, found shape \(3, 2\)"):
        robot.act({STATE: states}, [0, 2])


# states of another kind than in training


def ranged(low, high, std):
    """A ScriptedPolicy with states of these ranges and spreads."""
    policy = ScriptedPolicy()
    values = {"min": low, "max": high, "std": std}
    for key, value in values.items():
        getattr(policy.stats, f"state_{key}").copy_(torch.tensor(value))
    return policy


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([1.5, 0.0], None),
        ([1.9 + 5 * 0.4 - 0.01, 0.0], None),
        (
            [1.9 + 5 * 0.4 + 0.01, 0.0],
            r"a\[0\] is 3.91, in training it was -1.2 to 1.9: other units",
        ),
        ([-1.2 - 5 * 0.4 - 0.01, 0.0], r"a\[0\] is -3.21, in training it was -1.2 to 1.9: other"),
        ([90.0, 0.0], r"a\[0\] is 90, .* check_units=False takes it as it is"),
        ([0.0, -70.0], r"b\[0\] is -70, in training it was 0 to 1: other units"),
    ],
)
def test_an_episode_that_starts_far_outside_of_the_training_data_is_refused(state, message):
    robot = robot_of(ranged([-1.2, 0.0], [1.9, 1.0], [0.4, 0.2]), {"state_keys": ["a", "b"]})
    observation = {"a": state[:1], "b": state[1:]}
    for _ in range(2):  # at the start of each episode
        if message is None:
            robot.act(observation)
        else:
            with pytest.raises(ObservationError, match=message):
                robot.act(observation)
            assert not robot.states[0]
        robot.act({"a": [0.0], "b": [0.5]})
        robot.reset()
    assert robot.outside == 0


@pytest.mark.parametrize(
    ("constant", "good", "poor"),
    [(0.0, 0.04, 0.06), (1.57, 1.64, 90.0), (300.0, 314.0, 0.3), (-0.04, 0.0, -40.0)],
)
def test_a_dimension_that_was_constant_may_differ_a_little(constant, good, poor):
    policy = ranged([constant, 0.0], [constant, 9.0], [0.0, 1.0])
    robot_of(policy).act({STATE: [good, 0.0]})
    with pytest.raises(ObservationError, match=f"in training it was {constant:g} to {constant:g}"):
        robot_of(policy).act({STATE: [poor, 0.0]})


def test_later_observations_may_lie_anywhere_and_are_counted(capsys):
    robot = robot_of(ranged([0.0, 0.0], [1.0, 9.0], [0.1, 1.0]), replan_steps=1)
    robot.reset([("a",), ("b",)])
    robot.act({STATE: [[0, 0], [1, 9]]})
    robot.act({STATE: [[0, 0], [1, 9]]})
    assert robot.outside == 0
    robot.act({STATE: [[0, 0], [50, 9]]})
    robot.act({STATE: [[50, 90], [50, 9]]})
    assert robot.outside == 3
    out = capsys.readouterr().out
    problem = "warning: observation.state[0] of robot 1 is 50, in training it was 0 to 1: far from"
    assert problem in out
    assert out.count("warning") == 1
    robot.reset([("a",), ("b",)])
    with pytest.raises(ObservationError, match=r"state\[1\] of robot 1 is 90, in training"):
        robot.act({STATE: [[0, 0], [1, 90]]})


def test_the_check_of_units_can_be_left_out(capsys):
    robot = robot_of(ranged([0.0, 0.0], [1.0, 9.0], [0.1, 1.0]), check_units=False)
    robot.act({STATE: [57.3, 0]})
    assert robot.outside == 1
    assert "warning: observation.state[0] is 57.3, in training it was 0 to 1" in (
        capsys.readouterr().out
    )


def test_each_state_key_has_the_numbers_that_it_had_in_training():
    policy = ranged([0.0] * 2, [9.0] * 2, [1.0] * 2)
    policy.stats = Normalizer(
        "mean_std", {k: v[:1].repeat(5) for k, v in policy.stats.named_buffers()}
    )
    settings = {"state_keys": ["a", "b"]}
    robot = robot_of(policy, settings, columns={"a": 3, "b": 2, "action": 2})
    robot._remember({"a": np.ones(3), "b": np.ones(2)}, [0])
    with pytest.raises(ObservationError, match="a: 2 numbers a robot, the policy was trained on 3"):
        robot.act({"a": np.ones(2), "b": np.ones(3)})


def demonstrated(name, seeds):
    """States (N, S) of a few demonstrations of an environment."""
    env = gymnasium.make(ENVIRONMENTS[name], disable_env_checker=True).unwrapped
    if name.startswith("avoid"):
        _, _, paths = avoid.demonstrations((1,) * len(env.MODES))
        return ["observation.state"], avoid.states(paths).reshape(-1, 4)
    episodes = [tabletop.demonstrate(seed, type(env), (8, 8), render=False) for seed in seeds]
    keys = [key for key in episodes[0] if key.startswith("observation.") and "images" not in key]
    return keys, np.concatenate([np.concatenate([e[k] for k in keys], 1) for e in episodes if e])


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_episodes_of_our_environments_start_within_their_demonstrations(name):
    keys, states = demonstrated(name, range(8))
    policy = ScriptedPolicy()
    policy.stats = Normalizer("mean_std", statistics(states, states))
    env = gymnasium.make(ENVIRONMENTS[name], disable_env_checker=True)
    env.unwrapped.render_observations = False
    robot = robot_of(policy, {"state_keys": keys})
    for seed in range(50_000, 50_100):
        robot.reset()
        robot._remember(env.reset(seed=seed)[0], [0])
    assert robot.outside == 0


# replanning


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"replan_steps": 1}, [0, 100, 200, 300, 400, 500, 600]),
        ({"replan_steps": 4}, [0, 1, 2, 3, 400, 401, 402]),
        ({"replan_steps": 6}, [0, 1, 2, 3, 4, 5, 600]),
        ({"replan_steps": 2, "delay": 1, "threaded": False}, [0, 1, 2, 201, 202, 401, 402]),
        ({"replan_steps": 1, "delay": 3, "threaded": False}, [0, 1, 2, 3, 103, 203, 303]),
    ],
)
def test_actions_and_ticks_of_replanning(options, expected):
    policy = ScriptedPolicy()
    robot = robot_of(policy, **options)
    replanned = []
    for tick, action in enumerate(expected):
        assert drive(robot, [tick]) == [action]
        replanned.append(robot.replanned)
    assert replanned == [tick % options["replan_steps"] == 0 for tick in range(7)]
    assert [plan["tick"] for plan in policy.seen] == np.flatnonzero(replanned).tolist()
    assert robot.latency().plans == sum(replanned)
    assert robot.latency().missed == 0


def test_an_ensemble_averages_the_chunks_that_cover_a_tick():
    robot = robot_of(ScriptedPolicy(), replan_steps=2, ensemble=0.5)
    actions = [robot.act(observe(tick))[0] for tick in range(7)]
    for tick, covering in ((1, [1]), (3, [3, 201]), (4, [4, 202, 400]), (6, [204, 402, 600])):
        weights = np.exp(-0.5 * np.arange(len(covering)))
        assert actions[tick] == pytest.approx(weights @ covering / weights.sum(), rel=1e-6)


@pytest.mark.parametrize(("hold", "held"), [(0.0, 1), (0.3, 3), (0.4, 4), (9.0, 90)])
def test_the_latent_keeps_its_noise_for_so_long(hold, held):
    policy = ScriptedPolicy()
    robot = robot_of(policy, replan_steps=1, hold=hold)
    drive(robot, range(9))
    for one, other in zip(policy.seen, policy.seen[1:], strict=False):
        same = one["tick"] // held == other["tick"] // held
        assert (one["z"] == other["z"]) == same
        assert not np.array_equal(one["x0"], other["x0"])


def test_each_episode_has_its_own_noise_and_named_ones_have_theirs():
    policy = ScriptedPolicy()
    robot = robot_of(policy)
    for keys in (None, None, [("mine",)], [("mine",)]):
        robot.reset(keys)
        robot.act({STATE: np.float32([1, 0])} if keys is None else {STATE: np.float32([[1, 0]])})
    first, second, named, again = policy.seen
    assert first["z"] != second["z"]
    assert named["z"] == again["z"]
    assert named["z"] not in (first["z"], second["z"])


def test_robots_side_by_side_act_as_each_alone():
    keys = [("a", 1), ("b", 2), ("c", 3)]
    together = robot_of(ScriptedPolicy(), replan_steps=2)
    together.reset(keys)
    actions = {name: [] for name in range(3)}
    for tick in range(7):
        active = [0, 1, 2] if tick < 3 else [0, 2]  # the second one stops
        states = np.float32([[name, tick] for name in active])
        for name, action in zip(active, together.act({STATE: states}, active), strict=True):
            actions[name].append(action)
    for name in range(3):
        alone = robot_of(ScriptedPolicy(), replan_steps=2)
        alone.reset([keys[name]])
        for tick, action in enumerate(actions[name]):
            given = {STATE: np.float32([[name, tick]])}
            np.testing.assert_array_equal(alone.act(given), action[None])


# chunks that come late


def ready(robot):
    """Wait until the chunk that is being planned is there."""
    assert not wait([robot.pending], timeout=60).not_done


def test_a_chunk_from_the_thread_acts_from_its_tick():
    policy = ScriptedPolicy()
    robot = robot_of(policy, replan_steps=4, delay=2)
    assert drive(robot, [0]) == [0]
    assert robot.pending is None  # the first chunk is waited for
    assert drive(robot, range(1, 5)) == [1, 2, 3, 4]
    ready(robot)  # long before it acts
    assert robot.latency().plans == 1
    assert drive(robot, [5, 6, 7, 8]) == [5, 402, 403, 404]
    assert [plan["tick"] for plan in policy.seen][:2] == [0, 4]
    assert robot.latency().plans == 2
    ready(robot)
    assert drive(robot, [9, 10, 11]) == [405, 802, 803]
    assert robot.latency().missed == 0
    assert [plan["tick"] for plan in policy.seen] == [0, 4, 8]


def test_a_chunk_that_is_there_at_its_tick_is_not_late():
    policy = ScriptedPolicy()
    robot = robot_of(policy, replan_steps=4, delay=2)
    drive(robot, range(4))
    policy.released.clear()
    assert drive(robot, [4, 5]) == [4, 5]  # being planned all the while
    policy.released.set()
    ready(robot)
    assert drive(robot, [6]) == [402]
    assert robot.latency().missed == 0


def test_while_a_chunk_is_late_the_running_one_goes_on():
    policy = ScriptedPolicy()
    robot = robot_of(policy, {"action_horizon": 9}, replan_steps=3, delay=1)
    assert drive(robot, range(3)) == [0, 1, 2]
    policy.released.clear()
    assert drive(robot, range(3, 7)) == [3, 4, 5, 6]  # planned at 3, needed at 4
    assert robot.latency().missed == 1  # one plan, however late
    assert robot.latency().plans == 1
    policy.released.set()
    ready(robot)
    assert drive(robot, [7]) == [304]  # action 4 of its chunk: those before are left out
    assert robot.latency().plans == 2
    assert robot.latency().missed == 1
    assert [plan["tick"] for plan in policy.seen][:2] == [0, 3]
    assert robot.replanned  # the next plan is due already, from this tick
    ready(robot)
    assert drive(robot, [8, 9]) == [701, 702]


class Late:
    """A plan that is not done until it is waited for."""

    def __init__(self, future, released):
        self.future = future
        self.released = released

    def done(self):
        return False

    def result(self):
        self.released.set()
        return self.future.result(60)


def test_where_the_running_chunk_ends_a_late_one_is_waited_for():
    policy = ScriptedPolicy()
    robot = robot_of(policy, replan_steps=3, delay=1)
    drive(robot, range(3))
    policy.released.clear()
    assert drive(robot, [3]) == [3]
    robot.pending = Late(robot.pending, policy.released)
    assert drive(robot, [4, 5]) == [4, 5]
    assert not policy.released.is_set()
    assert drive(robot, [6]) == [303]  # of a chunk of 6, no action is left
    assert policy.released.is_set()
    assert robot.latency().missed == 1


def test_a_late_chunk_continues_the_actions_that_run_meanwhile():
    policy = ScriptedPolicy(prefix=2)
    robot = robot_of(policy, replan_steps=4, delay=2)
    drive(robot, range(5))
    ready(robot)
    assert policy.seen[0]["prefix"] is None
    assert policy.seen[1]["prefix"][:, 0].tolist() == [4, 5]
    for learned, delay in ((1, 2), (2, 0)):
        policy = ScriptedPolicy(prefix=learned)
        drive(robot_of(policy, delay=delay, threaded=False), range(5))
        assert all(plan["prefix"] is None for plan in policy.seen)


def test_a_reset_leaves_what_was_being_planned_behind():
    policy = ScriptedPolicy()
    robot = robot_of(policy, replan_steps=4, delay=2)
    drive(robot, range(5))
    robot.reset()
    assert robot.pending is None
    assert drive(robot, range(7)) == [0, 1, 2, 3, 4, 5, 402]
    assert robot.states[0].maxlen == 2


def test_a_mistake_while_planning_reaches_the_caller():
    policy = ScriptedPolicy()
    robot = robot_of(policy, replan_steps=4, delay=2)
    drive(robot, range(4))
    policy.latent = None
    drive(robot, [4])
    wait([robot.pending])
    with pytest.raises(TypeError):
        drive(robot, [5, 6])
    policy.latent = ScriptedPolicy().latent
    robot.reset()
    assert drive(robot, [0]) == [0]


def test_replan_steps_and_delay_must_fit_the_chunk_and_the_thread():
    policy = ScriptedPolicy()
    with pytest.raises(UserError, match="replan_steps 8: more than the 6 steps of a chunk"):
        robot_of(policy, replan_steps=8)
    message = r"replan_steps 4 \+ delay 3: more than the 6 steps of a chunk"
    with pytest.raises(UserError, match=message):
        robot_of(policy, replan_steps=4, delay=3)
    message = "replan_steps 2: less than delay 3, and a thread plans one chunk after the other"
    with pytest.raises(UserError, match=message):
        robot_of(policy, replan_steps=2, delay=3)
    robot_of(policy, replan_steps=2, delay=3, threaded=False)
    robot_of(policy, replan_steps=3, delay=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nfe": 0}, "nfe: expected a whole number from 1 on, found 0"),
        ({"replan_steps": 2.0}, "replan_steps: expected a whole number from 1 on, found 2.0"),
        ({"hold": float("nan")}, "hold: expected a number from 0 to 1e6, found nan"),
        ({"hold": 1e300}, "hold: expected a number from 0 to 1e6"),
        ({"ensemble": -0.1}, "ensemble: expected a number from 0 to 1e6"),
    ],
)
def test_numbers_that_make_no_sense(options, message):
    with pytest.raises(UserError, match=message):
        robot_of(ScriptedPolicy(), **options)


def test_numbers_may_be_numpys():
    assert drive(robot_of(ScriptedPolicy(), nfe=np.int64(2), replan_steps=np.int32(2)), [0]) == [0]


def test_a_plan_that_took_longer_than_it_may_is_counted_without_a_thread():
    robot = robot_of(ScriptedPolicy(), replan_steps=1)
    robot.data.HZ = 1e9
    assert robot.latency() == (0.0, 0.0, 0, 0)
    drive(robot, range(4))
    latency = robot.latency()
    assert latency.plans == 4
    assert latency.missed == 3  # the robot waits for the first
    assert 0 < latency.median <= latency.p95


# checkpoints


@pytest.fixture(scope="module")
def module_experiment(tmp_path_factory, demos):
    yield lambda script: Experiment(tmp_path_factory.mktemp("robot") / script, demos, script)
    forget_accelerator()


@pytest.fixture(scope="module")
def trained(module_experiment):
    """The run folder of a policy with pictures of 24 x 40, after two steps."""
    exp = module_experiment("train_vfp")
    exp.main("train.total_steps=2", "data.image_size=[24, 40]")
    return exp.save_dir


def camera_observation(tick, count=None):
    """An observation in the dataset's keys, or of `count` robots, with pictures of 48 x 64."""
    rng = np.random.default_rng([tick, 7])
    rows = 1 if count is None else count
    observation = {STATE: rng.normal(size=(rows, 5)).astype(np.float32)}
    for key in CAMERAS.values():
        observation[key] = rng.integers(0, 255, (rows, 48, 64, 3)).astype(np.uint8)
    if count is None:
        return {key: value[0] for key, value in observation.items()}
    return observation


def test_a_robot_of_a_run_folder_is_that_of_its_newest_checkpoint(trained):
    runs = {}
    for folder in (trained, newest(trained), str(trained)):
        robot = Robot.open(folder, replan_steps=3, device="cpu")
        runs[folder] = np.array([robot.act(camera_observation(tick)) for tick in range(7)])
        assert runs[folder].shape == (7, 4)
        assert np.isfinite(runs[folder]).all()
        assert robot.columns == {STATE: 5, "action": 4}
        np.testing.assert_array_equal(runs[folder], runs[trained])


def test_the_robot_does_what_the_protocol_says(trained):
    robot = Robot.open(trained, nfe=3, replan_steps=3, hold=0.2, device="cpu")
    robot.reset([("mine",)])
    actions = np.array([robot.act(camera_observation(tick, 1))[0] for tick in range(6)])
    policy = robot.policy
    observations = [camera_observation(tick) for tick in range(6)]
    for tick in (0, 3):
        history = [max(tick - k, 0) for k in (2, 1, 0)]
        states = np.array([observations[k][STATE] for k in history])
        batch = {STATE: torch.from_numpy(states)[None]}
        for name in CAMERAS:
            batch[IMAGE + name] = torch.from_numpy(robot_picture(robot, observations[tick], name))
        with torch.no_grad():
            memory = policy.encode(to_device(batch, torch.device("cpu")))
            z = policy.latent(memory, RowNoise([("latent", "mine", tick // 2)]))
            x0 = RowNoise([("mine", tick)]).normal(1, 6, 4)
            chunk = policy.sample(memory, x0, 3, z)[0].numpy()
        np.testing.assert_array_equal(actions[tick : tick + 3], chunk[:3])


def robot_picture(robot, observation, name):
    """(1, 3, 24, 40) of a camera, resized by Pillow."""
    picture = Image.fromarray(observation[CAMERAS[name]])
    resized = np.asarray(picture.resize((40, 24), Image.Resampling.BILINEAR))
    return resized.transpose(2, 0, 1)[None].copy()


def test_a_robot_in_degrees_is_refused_where_the_run_had_radians(trained):
    robot = Robot.open(trained, replan_steps=3, device="cpu")
    degrees = camera_observation(0)
    degrees[STATE] = np.degrees(degrees[STATE])
    with pytest.raises(ObservationError, match=r"observation.state\[\d\] is .*: other units than"):
        robot.act(degrees)
    Robot.open(trained, replan_steps=3, device="cpu", check_units=False).act(degrees)


def test_one_robot_and_a_batch_give_the_same_actions(trained):
    keys = [("left", 0), ("right", 5)]
    together = Robot.open(trained, replan_steps=3, device="cpu")
    together.reset(keys)
    alone = [Robot.open(trained, replan_steps=3, device="cpu") for _ in keys]
    for robot, key in zip(alone, keys, strict=True):
        robot.reset([key])
    for tick in range(7):
        observation = camera_observation(tick, 2)
        both = together.act(observation)
        for row, robot in enumerate(alone):
            own = {key: value[row : row + 1] for key, value in observation.items()}
            np.testing.assert_allclose(robot.act(own)[0], both[row], rtol=1e-4, atol=1e-5)
    assert not np.allclose(both[0], both[1])


def test_code_that_is_not_the_project_s_is_run_where_it_is_named(trained, tmp_path, monkeypatch):
    folder = tmp_path / "run/step_2"
    shutil.copytree(newest(trained), folder)
    script = tmp_path / "train_of_a_stranger.py"
    script.write_text(Path(train_vfp.__file__).read_text() + "\nimport strange_blocks\n")
    (tmp_path / "strange_blocks.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = read_meta(folder)["config"]
    rewrite_meta(folder, script=str(script), config=settings | {"plugins": ["strange_blocks"]})
    with pytest.raises(UserError, match=r"not run for a checkpoint's sake.*--script PATH"):
        Robot.open(folder)
    with pytest.raises(UserError, match=r"If you trust them: --plugins strange_blocks"):
        Robot.open(folder, script=script)
    try:
        named = {"script": str(script), "plugins": ["strange_blocks"]}
        robot = Robot.open(folder, replan_steps=3, device="cpu", **named)
        expected = Robot.open(trained, replan_steps=3, device="cpu").act(camera_observation(0))
        np.testing.assert_array_equal(robot.act(camera_observation(0)), expected)
        argv = ["--checkpoint", str(folder), "--script", str(script), "--nfe", "1"]
        with pytest.raises(UserError, match=r"If you trust them: --plugins strange_blocks"):
            evaluate.main(argv)
        assert evaluate.main([*argv, "--plugins", "strange_blocks"]) == 0
    finally:
        sys.modules.pop(script.stem, None)
        sys.modules.pop("strange_blocks", None)


def test_a_damaged_checkpoint_is_refused(trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    folder = newest(copy)
    file = folder / "action_decoder.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"action_decoder.safetensors has .* bytes"):
        Robot.open(folder)
    with pytest.raises(UserError, match="no checkpoint is whole"):
        Robot.open(copy)
    with pytest.raises(UserError, match="no checkpoint here"):
        Robot.open(tmp_path / "nowhere")


def test_a_run_of_train_mi_draws_no_actions(module_experiment, monkeypatch):
    monkeypatch.setattr(train_mi, "scored", lambda job: 0)
    exp = module_experiment("train_mi")
    exp.main("train.total_steps=1", "scoring={k: [1], window: 0}")
    with pytest.raises(UserError, match=r"draws no actions: python train_mi.py --score"):
        Robot.open(exp.save_dir)


def test_the_precision_is_that_of_the_training(module_experiment, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    exp = module_experiment("train_flow_matching")
    exp.main("train.total_steps=1")
    robot = Robot.open(exp.save_dir, replan_steps=3, device="cpu")
    assert robot.precision == "bf16"
    precisions = []
    encode = robot.policy.encode

    def watched(obs, camera_mask=None):
        enabled = torch.is_autocast_enabled("cpu")
        precisions.append(torch.get_autocast_dtype("cpu") if enabled else None)
        return encode(obs, camera_mask)

    robot.policy.encode = watched
    action = robot.act(camera_observation(0))
    assert precisions == [torch.bfloat16]
    assert action.dtype == np.float32


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("no", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_autocast_by_the_precision(precision, expected):
    policy = ScriptedPolicy()
    drive(robot_of(policy, precision=precision), [0])
    assert policy.autocast == [expected]


# which chunk acts


def run_robots(replan_steps, delay=0, ensemble=None, horizon=8, ticks=23, robots=3):
    """Actions (ticks, robots, 2), chunks by tick and prefixes by tick of an Execution.

    It is given random chunks, without waiting for them.
    """
    rng = np.random.default_rng(0)
    rows = list(range(robots))
    execution = Execution(robots, replan_steps, ensemble, delay)
    carried, chunks, prefixes = [], {}, {}
    for tick in range(ticks):
        if execution.due():
            prefixes[tick] = execution.running(rows, delay) if delay else None
            chunks[tick] = rng.normal(size=(robots, horizon, 2)).astype(np.float32)
            execution.add(rows, chunks[tick], tick)
        carried.append(execution.next(rows))
    return np.array(carried), chunks, prefixes


def test_chunks_one_after_the_other():
    carried, chunks, _ = run_robots(replan_steps=3)
    assert list(chunks) == [0, 3, 6, 9, 12, 15, 18, 21]
    for tick, actions in enumerate(carried):
        np.testing.assert_array_equal(actions, chunks[tick // 3 * 3][:, tick % 3])


@pytest.mark.parametrize(("replan_steps", "delay"), [(3, 2), (3, 5), (4, 4), (1, 7), (2, 5)])
def test_late_chunks_act_where_they_were_meant_to(replan_steps, delay):
    """Chunk k acts from tick k + delay for replan_steps; the first acts until the second does."""
    carried, chunks, _ = run_robots(replan_steps, delay)
    for tick, actions in enumerate(carried):
        start = max((tick - delay) // replan_steps * replan_steps, 0)
        np.testing.assert_array_equal(actions, chunks[start][:, tick - start])


@pytest.mark.parametrize("replan_steps", [1, 3])
@pytest.mark.parametrize("m", [0.0, 0.01, 0.7])
def test_ensembling_as_in_act(replan_steps, m):
    """The table of Zhao et al.: row k has tick k's chunk from column k on; columns are averaged."""
    carried, chunks, _ = run_robots(replan_steps, ensemble=m)
    for robot in range(3):
        table = np.full((23, 23 + 8, 2), np.nan)
        for tick, chunk in chunks.items():
            table[tick, tick : tick + 8] = chunk[robot]
        for tick in range(23):
            present = table[: tick + 1, tick]
            present = present[~np.isnan(present[:, 0])]
            weights = np.exp(-m * np.arange(len(present)))
            np.testing.assert_allclose(
                carried[tick, robot], weights @ present / weights.sum(), rtol=1e-5, atol=1e-6
            )


def test_ensembling_leaves_out_chunks_that_are_not_there_yet():
    carried, chunks, _ = run_robots(replan_steps=2, delay=3, ensemble=0.4)
    for tick in range(23):
        there = [k for k in chunks if k + (3 if k else 0) <= tick < k + 8]
        weights = np.exp(-0.4 * np.arange(len(there)))
        mean = sum(
            w * chunks[k][:, tick - k] for w, k in zip(weights / weights.sum(), there, strict=True)
        )
        np.testing.assert_allclose(carried[tick], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ensemble", [None, 0.2])
@pytest.mark.parametrize(("replan_steps", "delay"), [(5, 1), (4, 4), (2, 5), (1, 7)])
def test_prefix_is_what_is_carried_out_next(replan_steps, delay, ensemble):
    carried, _, prefixes = run_robots(replan_steps, delay, ensemble)
    assert prefixes.pop(0) is None
    for tick, prefix in prefixes.items():
        following = carried[tick : tick + delay]
        assert prefix.shape == (3, delay, 2)
        np.testing.assert_array_equal(prefix[:, : len(following)], following.swapaxes(0, 1))


@pytest.mark.parametrize("ensemble", [None, 0.2])
def test_robots_that_stop_change_nothing_for_the_others(ensemble):
    rng = np.random.default_rng(1)
    chunks = rng.normal(size=(6, 4, 5, 1)).astype(np.float32)
    together, alone = Execution(4, 2, ensemble, 1), Execution(1, 2, ensemble, 1)
    for tick in range(12):
        rows = [0, 1, 2, 3] if tick < 5 else [2]
        if together.due():
            together.add(rows, chunks[tick // 2, rows], tick)
            alone.add([0], chunks[tick // 2, [2]], tick)
        np.testing.assert_array_equal(together.next(rows)[rows.index(2)], alone.next([0])[0])


def test_a_chunk_lasts_until_the_next_one_acts():
    execution = Execution(1, 4, delay=2)
    with pytest.raises(ValueError, match="chunks of 5 for replan_steps 4 and delay 2"):
        execution.add([0], np.zeros((1, 5, 2)), 0)
    execution.add([0], np.zeros((1, 6, 2)), 0)
