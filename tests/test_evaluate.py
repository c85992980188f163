"""evaluate.py with scripted policies in worlds whose outcome is known: actions, counts, errors."""

import json
import math
import os
import re
import resource
import signal
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import MagicMock

import av
import gymnasium
import numpy as np
import pytest
import torch
from conftest import CAMERAS, LENGTHS, write_demos
from fuzz import ending
from helpers import ScriptedPolicy, write_v2
from scipy import stats

import evaluate
from common import config, metrics, open_loop, plots, run, schema
from common.config import UserError
from common.data import columns
from common.data.images import IMAGE
from common.data.lerobot import LeRobotDataset
from common.data.normalizer import Normalizer, statistics
from common.data.windows import content_hash

torch.set_num_threads(1)
TOLD = defaultdict(list)  # reset seed -> actions that its robot was told


class World(gymnasium.Env):
    """State: seed, tick. Ends after 7 + seed % 3 ticks; succeeds unless seed % 5 == 0.

    The mode is that of the actions' sum.

    A picture is uniformly as bright as the tick.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    MODES, MODE_SHARES = ("even", "odd", "never"), (0.5, 0.25, 0.25)
    observation_space = gymnasium.spaces.Dict(
        {
            "observation.state": gymnasium.spaces.Box(-np.inf, np.inf, (2,)),
            "top": gymnasium.spaces.Box(0, 255, (8, 8, 3)),
        }
    )
    action_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
    render_mode = "rgb_array"
    render_observations = True

    def reset(self, *, seed=None, options=None):
        self.seed, self.tick, TOLD[seed] = seed, 0, []
        return self.observe(), self.info()

    def step(self, action):
        TOLD[self.seed].append(action)
        self.tick += 1
        done = self.tick == 7 + self.seed % 3
        return self.observe(), 0.0, done, False, self.info(done)

    def observe(self):
        observation = {"observation.state": np.float32([self.seed, self.tick])}
        if self.render_observations:
            observation["top"] = np.full((8, 8, 3), self.tick, np.uint8)
        return observation

    def info(self, done=False):
        good = done and self.seed % 5 > 0
        mode = self.MODES[int(np.floor(np.sum(TOLD[self.seed]))) % 2] if done else None
        position = np.array([self.seed % 4, self.tick], float)
        return {
            "success": good,
            "mode": mode,
            "failure": "five" if done and not good else None,
            "position": position,
        }

    def obstacles(self):
        return np.array([[1.5, 3.0, 0.3]])

    def render(self):
        return np.full((12, 20, 3), 10 * self.tick, np.uint8)


class Foreign(World):
    """Knows nothing of ours but the observation: no list of modes, no positions, obstacles or
    pictures, another name of success."""

    MODES = MODE_SHARES = obstacles = property()
    metadata = {"render_modes": [], "render_fps": 10}  # noqa: RUF012
    render_mode, render = None, gymnasium.Env.render  # which raises

    def info(self, done=False):
        return {"is_success": self.seed % 5 > 0, "mode": ["left", 2][self.seed % 2]} if done else {}


class Mute(World):
    def info(self, done=False):
        return {}


class Renamed(World):
    observation_space = gymnasium.spaces.Dict({"agent_pos": gymnasium.spaces.Box(-1, 1, (2,))})


class Wide(World):
    action_space = gymnasium.spaces.Box(-1, 1, (3,))


class Nested(World):
    observation_space = gymnasium.spaces.Dict({"observation.state": World.observation_space})


class Endless(World):
    def step(self, action):
        observation, reward, _, truncated, info = super().step(action)
        return observation, reward, False, truncated, info | {"failure": None}


class Blind(World):
    render = gymnasium.Env.render  # which raises


class Unprepared(World):
    render_mode = None  # and __init__ takes none


class Chatty(World):
    """More than the policy reads, modes as numpy has them, and pictures of any size elsewhere."""

    MODES = MODE_SHARES = property()

    def observe(self):
        more = {"instruction": "go", "cloud": np.zeros((self.tick + self.seed % 2, 3))}
        return super().observe() | more

    def info(self, done=False):
        return {"success": np.bool_(True), "mode": np.int64(self.seed % 2)} if done else {}


class Ragged(World):
    def observe(self):
        return super().observe() | {"top": np.zeros((8, 8 + self.seed % 2, 3), np.uint8)}


class Forgetful(World):
    def observe(self):
        observation = super().observe()
        return observation if self.tick < 3 else {"joints": np.zeros(2)}


class Sick(World):
    def observe(self):
        state = np.full(2, np.nan if self.tick == 3 and self.seed == 50_001 else 1.0)
        return super().observe() | {"observation.state": state}


class Wordy(World):
    def observe(self):
        return super().observe() | {"observation.state": np.array(["left", "right"])}


class Faint(World):
    def render(self):
        return super().render() / 255


class Broken(World):
    def step(self, action):
        raise TypeError("a mistake of the environment")


for kind in (
    World,
    Foreign,
    Chatty,
    Ragged,
    Forgetful,
    Sick,
    Wordy,
    Faint,
    Broken,
    Mute,
    Renamed,
    Wide,
    Nested,
    Endless,
    Blind,
    Unprepared,
):
    gymnasium.register(f"{kind.__name__}-v0", kind, disable_env_checker=True)


@pytest.fixture
def play(tmp_path, monkeypatch):
    """play(*options, policy=None, prefix=0, **data) -> (results.json, the policy), scripted."""

    def run(*options, policy=None, prefix=0, env="World-v0", draw=False, meta=None, **data):
        policy = policy or ScriptedPolicy(prefix=prefix)
        settings = {
            "root": "nowhere",
            "HZ": 10,
            "action_horizon": 6,
            "obs_proprio_history": 2,
            "image_size": [8, 8],
        }
        cfg = SimpleNamespace(data=config.from_dict(schema.Data, settings | data))
        monkeypatch.setattr(evaluate, "find_checkpoint", lambda folder: folder)
        about = {"script": "/home/me/train_mine.py", "step": 5, **(meta or {})}
        monkeypatch.setattr(evaluate, "open_action_policy", lambda *a, **b: (policy, cfg, about))
        if not draw:
            for module in (evaluate, open_loop):
                monkeypatch.setattr(module, "plots", MagicMock())
        argv = ["--checkpoint", str(tmp_path), "--out", str(tmp_path / "out"), *map(str, options)]
        argv += ["--env", env] if env else []
        TOLD.clear()
        assert evaluate.main(argv) == 0
        return json.loads((tmp_path / "out/results.json").read_text()), policy

    return run


def first_numbers(seed):
    return [int(action[0]) for action in TOLD[seed]]


SHORT, HZ = ("--episodes", 3, "--nfe", 1, "--videos", 0), 10


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--replan_steps", 1], [0, 100, 200, 300, 400, 500, 600]),
        (["--replan_steps", 4], [0, 1, 2, 3, 400, 401, 402]),
        (["--replan_steps", 6], [0, 1, 2, 3, 4, 5, 600]),
        (["--replan_steps", 2, "--delay", 1], [0, 1, 2, 201, 202, 401, 402]),
        (["--replan_steps", 3, "--delay", 3], [0, 1, 2, 3, 4, 5, 303]),
        (["--replan_steps", 1, "--delay", 3], [0, 1, 2, 3, 103, 203, 303]),
    ],
)
def test_actions_of_robots(play, options, told):
    play(*SHORT, *options)
    assert first_numbers(50_001) == told  # 50001 % 3 == 0: seven ticks
    assert first_numbers(50_000)[:7] == told


def test_ensembled_actions_are_weighted_means(play):
    play(*SHORT, "--replan_steps", 2, "--ensemble", 0.5)
    # Tick 4 is covered by the chunks of ticks 0, 2 and 4, tick 6 by those of 2, 4 and 6, the oldest
    # weighing most.
    for tick, covering in ((1, [1]), (3, [3, 201]), (4, [4, 202, 400]), (6, [204, 402, 600])):
        weights = np.exp(-0.5 * np.arange(len(covering)))
        assert TOLD[50_001][tick][0] == pytest.approx(weights @ covering / weights.sum(), rel=1e-6)


@pytest.mark.parametrize("options", [(), ("--ensemble", 0.3)])
def test_the_prefix_is_what_robots_then_do(play, capsys, options):
    results, policy = play(*SHORT, "--replan_steps", 2, "--delay", 3, *options, prefix=3)
    plans = [plan for plan in policy.seen if plan["tick"] > 0]
    assert {plan["tick"] for plan in plans} == {2, 4, 6, 8}
    for plan in plans:
        done = np.array(TOLD[plan["name"]][plan["tick"] : plan["tick"] + 3])
        np.testing.assert_array_equal(plan["prefix"][: len(done)], done)
    assert all(plan["prefix"] is None for plan in policy.seen if plan["tick"] == 0)
    assert results["conditioned"]
    assert "3 steps late and continues the running chunk" in capsys.readouterr().out


@pytest.mark.parametrize(("prefix", "delay"), [(2, 3), (0, 1), (4, 0)])
def test_no_prefix_where_the_policy_did_not_learn_it_or_nothing_is_late(
    play, capsys, prefix, delay
):
    results, policy = play(*SHORT, "--replan_steps", 2, "--delay", delay, prefix=prefix)
    assert all(plan["prefix"] is None for plan in policy.seen)
    assert not results["conditioned"]
    assert ("skips its first actions" in capsys.readouterr().out) == (delay > 0)


def test_repeats_bit_for_bit_and_batched_as_one_by_one(play):
    def everything(*options):
        results, policy = play(
            "--episodes",
            11,
            "--nfe",
            1,
            3,
            "--replan_steps",
            2,
            "--delay",
            1,
            "--videos",
            2,
            *options,
        )
        results.pop("batch")
        for row in results["results"]:
            assert row.pop("ms_per_chunk") <= row.pop("ms_p95")
        plans = {(s["nfe"], s["name"], s["tick"]): (s["z"], s["x0"].tobytes()) for s in policy.seen}
        return (
            results,
            {seed: np.array(told).tobytes() for seed, told in TOLD.items() if told},
            plans,
        )

    alone = everything("--batch", 1)
    for options in (["--batch", 1], ["--batch", 4], ["--batch", 960]):
        assert everything(*options) == alone
    other = everything("--batch", 4, "--seed", 1)
    assert all(other[1][seed] != told for seed, told in alone[1].items())


@pytest.mark.parametrize("ticks", [0, 3, 4, 100])
def test_the_latent_keeps_its_noise_for_so_long(play, ticks):
    results, policy = play(*SHORT, "--replan_steps", 2, "--hold", ticks / HZ)
    assert results["hold"] == ticks / HZ
    drawn = defaultdict(dict)
    for plan in policy.seen:
        drawn[plan["name"]][plan["tick"]] = plan
    for plans in drawn.values():
        periods = {tick // max(ticks, 1) for tick in plans}
        assert len({plan["z"] for plan in plans.values()}) == len(periods)
        assert len({(tick // max(ticks, 1), plan["z"]) for tick, plan in plans.items()}) == len(
            periods
        )
        assert len({plan["x0"].tobytes() for plan in plans.values()}) == len(
            plans
        )  # noise of the chunk is always new
    assert len({plans[0]["z"] for plans in drawn.values()}) == 3


def test_histories_are_oldest_first_and_pictures_come_only_where_needed(play):
    camera = {"cameras": {"up": "top"}, "obs_images_history": 3, "obs_proprio_history": 5}
    _, policy = play(*SHORT, "--replan_steps", 4, policy=ScriptedPolicy(latent=False), **camera)
    for plan in policy.seen:
        k = plan["tick"]
        assert plan[IMAGE + "up"].shape == (3, 3, 8, 8)
        assert plan[IMAGE + "up"][:, 0, 0, 0].round().tolist() == [max(k - 2, 0), max(k - 1, 0), k]
        assert plan["states"][:, 1].tolist() == [max(k - i, 0) for i in (4, 3, 2, 1, 0)]
    _, policy = play(*SHORT, "--replan_steps", 4, **camera | {"obs_images_history": 1})
    assert all(plan[IMAGE + "up"][0, 0, 0].round() == plan["tick"] for plan in policy.seen)
    assert policy.seen[0][IMAGE + "up"].shape == (3, 8, 8)


def test_pictures_are_not_drawn_in_vain(play, monkeypatch):
    drawn = set()
    observe = World.observe

    def recording(self):
        if self.render_observations and self.seed >= 50_000:
            drawn.add(self.tick)
        return observe(self)

    monkeypatch.setattr(World, "observe", recording)
    play(*SHORT, "--replan_steps", 4, cameras={"up": "top"}, obs_images_history=2)
    assert drawn == {0, 3, 4, 7, 8}


def test_results_say_what_happened(play, tmp_path):
    results, _ = play(
        "--episodes", 10, "--nfe", 1, 2, "--replan_steps", 3, "--videos", 3, "--batch", 2, draw=True
    )
    about = {
        "policy": "train_mine",
        "step": 5,
        "parameters": 9,
        "env": "World-v0",
        "replan_steps": 3,
        "seed": 0,
    }
    about |= {
        "hold": 2.0,
        "ensemble": None,
        "delay": 0,
        "conditioned": False,
        "checkpoint": str(tmp_path),
    }
    assert {key: results[key] for key in about} == about
    assert [row["nfe"] for row in results["results"]] == [1, 2]
    row = results["results"][1]
    good = [seed for seed in range(50_000, 50_010) if seed % 5]
    counts = np.bincount([int(np.floor(np.sum(TOLD[seed]))) % 2 for seed in good], minlength=3)
    assert (row["episodes"], row["success"], row["failures"]) == (10, 0.8, {"five": 2})
    assert row["modes"] == dict(zip(World.MODES, counts.tolist(), strict=True))
    assert row["entropy"] == pytest.approx(stats.entropy(counts) / math.log(3))
    assert row["coverage"] == pytest.approx(np.mean(counts > 0))
    assert row["kl"] == pytest.approx(stats.entropy(counts, World.MODE_SHARES))
    interval = stats.binomtest(8, 10).proportion_ci(method="wilson")
    assert row["interval"] == pytest.approx(list(interval))
    for picture in ("success", "tracks", "modes"):
        assert (tmp_path / f"out/{picture}.png").read_bytes()[:4] == b"\x89PNG"
    with av.open(str(tmp_path / "out/episodes.mp4")) as container:
        frames = [
            frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)
        ]
    assert len(frames) == 10  # at most nine ticks, and the picture before the first
    assert frames[0].shape == (24, 40, 3)  # three of 12 x 20, in two columns
    assert np.abs(frames[3][6, 10] - 30).max() < 12
    assert frames[-1][0, 10, 0] > frames[-1][0, 10, 1] + 60  # the first fails: red
    assert frames[-1][0, 30, 1] > frames[-1][0, 30, 0] + 60  # the second succeeds: green


def test_a_world_that_tells_more_than_is_needed(play):
    results, _ = play("--episodes", 4, "--nfe", 1, "--replan_steps", 6, env="Chatty-v0")
    assert results["results"][0]["modes"] == {"0": 2, "1": 2}
    assert results["results"][0]["success"] == 1


@pytest.mark.parametrize(
    ("env", "options", "message"),
    [
        ("Ragged", {"cameras": {"up": "top"}}, r"--env: top differs in shape from .*\(8, 9, 3\)"),
        ("Forgetful", {}, "the observation lacks 'observation.state'"),
        ("Sick", {}, "observation.state: number 0 of robot 1 is nan"),
        ("Wordy", {}, "observation.state: expected numbers, found <U5"),
    ],
)
def test_observations_that_a_policy_cannot_have(play, capsys, env, options, message):
    arguments = [*SHORT, "--replan_steps", 2]
    text = ending(lambda: play(*arguments, env=f"{env}-v0", **options), capsys)
    assert re.search(message, text)


def test_a_picture_that_is_no_video(play, capsys):
    arguments = [*SHORT[:4], "--replan_steps", 2]
    text = ending(lambda: play(*arguments, env="Faint-v0"), capsys)
    assert "--env: Faint-v0: render() gives float64 (12, 20, 3), expected a uint8 picture" in text
    play(*arguments, "--videos", 0, env="Faint-v0")


def test_a_mistake_in_an_environment_keeps_its_traceback(play):
    with pytest.raises(TypeError, match="a mistake of the environment"):
        play(*SHORT, "--replan_steps", 2, env="Broken-v0")


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("batch", "1000000000000", "a whole number from 1 to 1000000"),
        ("episodes", "9" * 5000, "a whole number from 1 to 1000000"),
        ("episodes", "0", "a whole number from 1 to 1000000"),
        ("nfe", "2.5", "a whole number from 1 to 1000000"),
        ("samples", "many", "a whole number from 1 to 1000000"),
        ("videos", "-1", "a whole number from 0 to 1000000"),
        ("max_steps", "1e3", "a whole number from 1 to 1000000"),
        ("seed", "-1", "a whole number from 0 to 9223372036854775807"),
        ("seed", "9223372036854775808", "a whole number from 0 to 9223372036854775807"),
        ("temperature", "nan", "a number from 0 to 1e6"),
        ("guidance", "inf", "a number from 0 to 1e6"),
        ("guidance", "-1", "a number from 0 to 1e6"),
        ("hold", "1e300", "a number from 0 to 1e6"),
        ("ensemble", "x", "a number from 0 to 1e6"),
        ("weights", "backbone", "NAME=PATH"),
    ],
)
def test_numbers_that_make_no_sense(capsys, option, value, expected):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--checkpoint", "run", f"--{option}={value}"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    shown = f'"{value}"' if len(value) < 50 else '"99999999'
    assert f"error: argument --{option}: expected {expected}, found {shown}" in error
    assert len(error) < 200


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_an_evaluation_without_results(
    play, tmp_path, monkeypatch, capsys, number, code
):
    step = World.step
    steps = []

    def interrupted(self, action):
        steps.append(1)
        if len(steps) == 60:  # six episodes at NFE 1 take 48
            os.kill(os.getpid(), number)
        return step(self, action)

    monkeypatch.setattr(World, "step", interrupted)
    arguments = ["--episodes", 6, "--nfe", 1, 2, "--videos", 0, "--replan_steps", 2]
    with pytest.raises(SystemExit) as stopped:
        run.cli(lambda: play(*arguments))
    assert stopped.value.code == code
    assert files_in(tmp_path / "out") == []
    out = capsys.readouterr().out
    assert "NFE 1: 4 of 6 episodes succeeded" in out
    assert "NFE 2" not in out


def test_without_a_terminal_an_evaluation_prints_a_line_per_nfe(play, capsys):
    play("--episodes", 10, "--nfe", 1, 2, "--videos", 0, "--replan_steps", 3)
    out, err = capsys.readouterr()
    assert "NFE 1: 8 of 10 episodes succeeded\nNFE 2: 8 of 10 episodes succeeded\n" in out
    assert err == ""


def test_a_world_that_tells_little(play, tmp_path):
    results, _ = play("--episodes", 4, "--nfe", 1, "--replan_steps", 6, env="Foreign-v0", draw=True)
    row = results["results"][0]
    assert [row[key] for key in ("success", "entropy", "coverage", "kl")] == [
        0.75,
        None,
        None,
        None,
    ]
    assert row["modes"] == {"2": 2, "left": 1}
    assert row["failures"] == {"unnamed": 1}
    assert not (tmp_path / "out/tracks.png").exists()
    assert not (tmp_path / "out/modes.png").exists()


@contextmanager
def disk_of(size):
    """No file grows beyond so many bytes, as on a disk that fills up."""
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_disk_that_is_full_costs_the_figures_and_not_the_results(play, tmp_path, capsys):
    with disk_of(5000):
        play(*SHORT[:4], "--replan_steps", 3, draw=True)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["results"][0]["episodes"] == 3
    assert files_in(tmp_path / "out") == ["episodes.mp4", "results.json"]
    with av.open(str(tmp_path / "out/episodes.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 10
    out = capsys.readouterr().out
    for name in ("success", "tracks", "modes"):
        problem = rf"warning: {tmp_path}/out/{name}.png: could not be written: .* \(\d+ MiB free\)"
        assert re.search(problem, out)


def test_an_older_figure_stays_where_a_new_one_is_refused(play, tmp_path, capsys):
    play(*SHORT, "--replan_steps", 3, draw=True)
    before = (tmp_path / "out/success.png").read_bytes()
    with disk_of(5000):
        play(*SHORT, "--replan_steps", 2, draw=True)
    assert (tmp_path / "out/success.png").read_bytes() == before
    assert files_in(tmp_path / "out") == ["modes.png", "results.json", "success.png", "tracks.png"]


def test_a_video_on_a_full_disk(tmp_path, capsys):
    pictures = list(np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3)).astype(np.uint8))
    with disk_of(5000), plots.decoration(tmp_path / "episodes.mp4") as file:
        plots.write_video([(pictures, True)], 10, file)
    assert files_in(tmp_path) == []
    assert "warning: " + str(tmp_path / "episodes.mp4") in capsys.readouterr().out


def test_results_that_cannot_be_written_keep_the_older_ones_and_end_with_2(
    play, tmp_path, monkeypatch, capsys
):
    older, _ = play(*SHORT, "--replan_steps", 2)
    print_results = evaluate.print_results
    full = ExitStack()

    def printed_as_the_disk_fills_up(*args):
        print_results(*args)
        full.enter_context(disk_of(100))

    monkeypatch.setattr(evaluate, "print_results", printed_as_the_disk_fills_up)
    with full:
        message = ending(lambda: play(*SHORT, "--replan_steps", 3) and 0, capsys)
    place = f"error: {tmp_path}/out/results.json: could not be written: File too large"
    assert re.fullmatch(rf"{place} \(\d+ MiB free\)\n", message)
    assert json.loads((tmp_path / "out/results.json").read_text()) == older
    assert files_in(tmp_path / "out") == ["results.json"]


def test_a_folder_that_cannot_be_written_is_told_before_the_episodes(play, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out, problem in (("file/x", "Not a directory"), ("out", "File too large")):
        with disk_of(1000):
            message = ending(lambda out=out: play(*SHORT, "--out", tmp_path / out), capsys)
        assert f"error: --out: {tmp_path}/{out} cannot be written: {problem}" in message
        assert not TOLD


def test_a_mistake_in_code_that_draws_is_no_full_disk(tmp_path):
    def draw():
        with plots.decoration(tmp_path / "x.png") as file:
            file.write_text("half")
            raise KeyError("row")

    with pytest.raises(KeyError):
        draw()
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({"env": "avoids"}, {}, r"no environment 'avoids'; did you mean 'avoid'\?"),
        ({"env": "World-v7"}, {}, r"no environment 'World-v7'; did you mean 'World-v0'\?"),
        ({"env": "no_such_module:World-v0"}, {}, "no environment 'no_such_module:World-v0'"),
        (
            {"env": "Renamed-v0"},
            {},
            r"does not give \['observation.state'\].*gives \['agent_pos'\]",
        ),
        (
            {},
            {"cameras": {"head": "front"}},
            r"does not give \['front'\].*\['observation.state', 'top'\]",
        ),
        ({}, {"HZ": 25}, r"runs at 10 Hz, the policy at 25 \(its render_fps"),
        ({"env": "Wide-v0"}, {}, r"\(2, 3\) numbers, the policy was trained on \(2, 2\)"),
        ({"env": "Nested-v0"}, {}, r"observation.state is Dict\(.*\), the policy takes numbers"),
        ({"env": "Mute-v0"}, {}, r"must tell info\['success'\]"),
        (
            {"env": "Blind-v0"},
            {},
            r"Blind-v0: an environment that names rgb_array .* has render\(\)\n"
            r"    \(NotImplementedError",
        ),
        (
            {"env": "Unprepared-v0"},
            {},
            r"Unprepared-v0: .* takes render_mode .*\n    \(TypeError: .*'render_mode'",
        ),
    ],
)
def test_environments_that_do_not_fit(play, options, data, message):
    with pytest.raises(UserError, match=message):
        play("--episodes", 2, "--nfe", 1, "--videos", 1, **options, **{"action_horizon": 8} | data)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"action_horizon": 12}, [*range(8), 800]),
        ({"first_frames": 1, "action_horizon": 12}, range(9)),
    ],
)
def test_replans_after_eight_steps_but_for_a_policy_of_whole_episodes(play, data, told):
    play("--episodes", 3, "--nfe", 1, "--videos", 0, **data)
    seed = next(seed for seed in range(50_000, 50_003) if seed % 3 == 2)
    assert first_numbers(seed) == list(told)


def test_an_environment_in_other_units(play, capsys):
    policy = ScriptedPolicy(latent=False)
    policy.stats.state_min[0] = 0
    policy.stats.state_max[0] = 900
    with pytest.raises(UserError, match=r"state\[0\] of robot 0 is 5e\+04, .* --other_units\)"):
        play(*SHORT, "--replan_steps", 4, policy=policy)
    results, _ = play(*SHORT, "--replan_steps", 4, "--other_units", policy=policy)
    assert results["results"][0]["episodes"] == 3
    assert capsys.readouterr().out.count("warning: observation.state[0] of robot 0 is 5e+04") == 1


def test_an_environment_with_other_sizes_of_a_state_key(play):
    with pytest.raises(
        UserError, match=r"World-v0: observation.state has 2 numbers, in training 3"
    ):
        play(*SHORT, meta={"columns": {"observation.state": 3}}, action_horizon=8)


def test_an_episode_without_an_end_fails_in_time(play, capsys):
    quick = ("--episodes", 2, "--nfe", 1, "--max_steps", 20)
    results, _ = play(*quick, env="Endless-v0", policy=ScriptedPolicy(latent=False))
    assert results["results"][0]["failures"] == {"timeout": 2}
    assert len(TOLD[50_000]) == 20
    assert "noise is held" not in capsys.readouterr().out  # this policy has no latent


def test_replan_steps_and_delay_fit_the_chunk(play):
    play(*SHORT, "--replan_steps", 4, "--delay", 2)
    with pytest.raises(UserError, match="replan_steps 8: more than the 6 steps of a chunk"):
        play(*SHORT, "--replan_steps", 8)
    with pytest.raises(
        UserError, match=r"replan_steps 4 \+ delay 3: more than the 6 steps of a chunk"
    ):
        play(*SHORT, "--replan_steps", 4, "--delay", 3)


@pytest.mark.parametrize("name", evaluate.ENVIRONMENTS)
def test_our_environments_tell_what_is_reported(name):
    env = gymnasium.make(evaluate.ENVIRONMENTS[name], disable_env_checker=True)
    world, (_, info) = env.unwrapped, env.reset(seed=evaluate.FIRST_SEED)
    assert len(set(world.MODES)) == len(world.MODES) == len(world.MODE_SHARES) > 1
    assert sum(world.MODE_SHARES) == pytest.approx(1)
    assert info.keys() >= {"success", "mode", "failure"}
    assert np.shape(info["position"]) == (2,)
    assert world.obstacles().shape[1] == 3
    world.render_observations = False
    assert not any(key.startswith(IMAGE) for key in env.step(env.action_space.sample() * 0)[0])


def test_intervals_and_divergences_against_scipy():
    for successes, n in ((0, 7), (7, 7), (1, 1), (13, 40), (499, 500)):
        expected = stats.binomtest(successes, n).proportion_ci(method="wilson")
        assert metrics.wilson(successes, n) == pytest.approx(tuple(expected), abs=1e-12)
    rng = np.random.default_rng(0)
    for counts in rng.integers(0, 9, (20, 5)).tolist():
        shares = rng.dirichlet(np.ones(5)).tolist()
        assert metrics.entropy(counts) == pytest.approx(stats.entropy(counts) / np.log(5))
        assert metrics.kl(counts, shares) == pytest.approx(stats.entropy(counts, shares))
        assert metrics.coverage(counts) == pytest.approx(np.count_nonzero(counts) / 5)
    assert metrics.entropy([4, 4, 4]) == pytest.approx(1)
    assert metrics.entropy([0, 9]) == 0
    assert metrics.entropy([5]) is None  # a single mode: log 1 = 0
    assert metrics.kl([3, 3], [0.5, 0.5]) == pytest.approx(0)
    assert metrics.kl([1, 3], [1.0, 0.0]) is None  # infinite, which JSON cannot say
    assert metrics.entropy([0, 0]) is metrics.kl([0, 0], [0.5, 0.5]) is None
    assert metrics.coverage([0, 0]) == 0


def test_times_leave_out_the_first_call():
    calls = []
    assert len(metrics.times(lambda: calls.append(1), calls=20)) == 20
    assert len(metrics.times(lambda: calls.append(1), seconds=0.0)) == 3
    assert len(calls) == 21 + 4


@pytest.mark.parametrize("good", [True, False])
def test_pictures_of_one_sided_results(tmp_path, good):
    path = [np.array([0.0, i]) for i in range(3)]
    episodes = [
        evaluate.Episode(good, "a" if good else None, None if good else "disc", path)
        for _ in range(3)
    ]
    names = [f"{i}-{j}" for i in range(4) for j in range(6)]
    rows = [{"nfe": 1, **metrics.summary(episodes, names, None, [0.1])}]
    plots.draw_success(rows, tmp_path / "success.png")
    plots.draw_paths({"NFE 1": episodes}, names, tmp_path / "tracks.png")
    plots.draw_mode_shares(rows, names, None, tmp_path / "modes.png")
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_table_counts_where_modes_are_many():
    names = [f"{i}" for i in range(12)]
    episodes = [evaluate.Episode(True, name) for name in names[:9]] + [
        evaluate.Episode(failure="disc")
    ]
    row = {"nfe": 1, **metrics.summary(episodes, names, [1 / 12] * 12, [0.02, 0.02])}
    last = metrics.table([row], names).splitlines()[-1]
    assert last == "| 1 | 0.900 | 0.596-0.982 | 0.884 | 0.288 | 9 of 12 | disc 1 | 20.0 (20.0) |"


class Knowing(ScriptedPolicy):
    """Open loop: the recorded chunks plus 0.1 (joint + 1), or a drawn number; padding is far off.

    Velocities are off by z, or by 0.5 without a latent; `arms` has x0 and times of each context.
    """

    def __init__(self, target="velocity", latent=True, drawn=0.0):
        super().__init__(latent)
        self.target, self.drawn, self.arms = target, drawn, []
        sizes = {"state": 5, "action": 4}
        values = {
            key: value[:1].repeat(sizes[key.partition("_")[0]])
            for key, value in self.stats.state_dict().items()
        }
        values["action_std"] = torch.tensor([1.0, 2, 4, 8])
        self.stats = Normalizer("mean_std", values)

    def latent(self, memory, noise):
        noise.normal(len(memory["action"]), 3)
        return torch.full((len(memory["action"]), 1), 1.5) if self.has_latent else None

    def sample(self, memory, x0, steps=10, z=None, prefix=None):
        far = memory["action_is_pad"][..., None] * 1e3
        off = self.drawn * x0[:, :1, :1] if self.drawn else 0.1 * torch.arange(1, 5)
        return memory["action"] + off + far

    def posterior_latent(self, memory, x1, noise):
        torch.testing.assert_close(x1, self.stats.normalize("action", memory["action"]))
        noise.normal(len(x1), 3)
        return torch.full((len(x1), 1), 0.25)

    def context(self, memory, z):
        self.arms.append(([], []))
        return memory, z

    def velocity(self, x, t, context, prefix_mask=None):
        memory, z = context
        x1 = self.stats.normalize("action", memory["action"])
        x0 = (x - t * x1) / (1 - t)
        starts, times = self.arms[-1]
        starts.append(x0)
        times.append(t)
        torch.testing.assert_close(x0, starts[0], atol=1e-4, rtol=1e-4)
        off = 0.5 if z is None else z[:, :, None]
        off = off + memory["action_is_pad"][..., None] * 1e3
        return x1 - x0 + off if self.target == "velocity" else (x1 + off - x) / (1 - t)


def trained_on(root, held_out):
    """meta.json's record of the episodes of a dataset."""
    dataset = LeRobotDataset(root)
    numbers = [episode.index for episode in dataset.episodes]
    columns = dataset.columns(["observation.state", "action"], numbers).values()
    ends = np.cumsum([episode.length for episode in dataset.episodes])[:-1]
    rows = zip(*(np.split(values, ends) for values in columns), strict=True)
    hashes = {str(n): content_hash(arrays) for n, arrays in zip(numbers, rows, strict=True)}
    others = [number for number in numbers if number not in held_out]
    return {
        "episodes": {"trained on": others, "held out": held_out},
        "episode_hashes": hashes,
    }


@pytest.fixture
def off_line(play, demos):
    def run(*options, **more):
        data = {"root": demos, "cameras": CAMERAS, "image_size": [32, 32], "val_episodes": [3, 5]}
        data |= more
        meta = trained_on(data["root"], data["val_episodes"])
        return play(*options, env=None, meta=meta, **data | {"root": str(data["root"])})

    return run


def test_open_loop_errors_are_of_recorded_steps_only(off_line, tmp_path):
    results, _ = off_line(policy=Knowing(), draw=True)
    np.testing.assert_allclose(results["mae"], [0.1, 0.2, 0.3, 0.4], rtol=1e-4)
    np.testing.assert_allclose(results["mae_by_step"], [results["mae"]] * 6, rtol=1e-4)
    assert results["episodes"] == [3, 5]
    assert results["joints"] == [f"action[{i}]" for i in range(4)]
    assert results["chunk_error"]["mean"] == pytest.approx(
        np.mean([0.1, 0.1, 0.075, 0.05]), rel=1e-4
    )
    assert results["chunk_error"]["best"] == results["chunk_error"]["mean"]
    for picture in ("chunks_3", "chunks_5", "error_by_step", "velocity_loss"):
        assert (tmp_path / f"out/{picture}.png").read_bytes()[:4] == b"\x89PNG"


def test_best_of_n_draws(off_line):
    """The error of a draw is a normal number's size, sqrt(2 / pi) in the mean; 8 draws' is less."""
    many, _ = off_line("--samples", 8, policy=Knowing(drawn=1.0))
    again, _ = off_line("--samples", 8, policy=Knowing(drawn=1.0))
    assert many == again
    error, scale = many["chunk_error"], np.mean([1, 1 / 2, 1 / 4, 1 / 8])
    assert error["samples"] == 8
    assert 0.5 * scale < error["mean"] < 1.1 * scale
    assert error["best"] < 0.4 * error["mean"]


class Closer(Knowing):
    """Errors fall with the number of evaluations; `given` has the noise of each call."""

    def __init__(self):
        super().__init__()
        self.given = defaultdict(list)
        self.encoded = 0

    def encode(self, obs, camera_mask=None):
        self.encoded += 1
        return super().encode(obs, camera_mask)

    def sample(self, memory, x0, steps=10, z=None, prefix=None):
        self.given[steps].append(x0.numpy())
        recorded = memory["action"]
        return recorded + (super().sample(memory, x0, steps, z, prefix) - recorded) / steps


def test_figures_of_single_episodes_show_the_last_nfe(off_line):
    off_line("--nfe", 1, 4, policy=Closer())
    drawn = open_loop.plots.draw_chunks.call_args_list  # of a stand-in for the module
    assert [call.args[0] for call in drawn] == [3, 5]
    for call in drawn:
        _, predicted, recorded, valid = call.args[:4]
        np.testing.assert_allclose(
            (predicted - recorded)[valid].mean(0), [0.025, 0.05, 0.075, 0.1], rtol=1e-3
        )


def test_open_loop_reports_every_nfe(off_line, tmp_path, capsys):
    results, policy = off_line("--nfe", 1, 4, 2, 4, "--samples", 2, policy=Closer(), draw=True)
    assert [row["nfe"] for row in results["results"]] == [1, 4, 2]
    for row in results["results"]:
        np.testing.assert_allclose(
            row["mae"], np.arange(1, 5) / 10 / row["nfe"], rtol=1e-3, atol=1e-6
        )
    assert {key: results[key] for key in results["results"][-1]} == results["results"][-1]
    for one, other in zip(policy.given[1], policy.given[4], strict=True):
        np.testing.assert_array_equal(one, other)
    assert policy.encoded == 2 + 1  # both episodes, and the velocity loss
    out = capsys.readouterr().out
    assert (
        "\n| | NFE 1 | NFE 4 | NFE 2 |\n|---|---|---|---|\n| action[0] | 0.1 (0.10) | 0.025" in out
    )
    assert "\n| whole chunk | (0.081) | (0.020) | (0.041) |\n| best of 2 draws | (0.081) |" in out


def test_open_loop_takes_ten_evaluations_unless_told(off_line):
    results, policy = off_line(policy=Closer())
    assert list(policy.given) == [10]
    assert results["nfe"] == 10


@pytest.mark.parametrize("target", ["velocity", "x1"])
def test_the_velocity_loss_is_explained_by_what_the_decoder_predicts(off_line, capsys, target):
    policy = Knowing(target)
    policy.weights.target = target
    results, _ = off_line(policy=policy)
    out = capsys.readouterr().out
    first, middle, last = (results["velocity_loss"]["prior"][k] for k in (0, 5, 9))
    assert "at t = 0.05, 0.55, 0.95, by source of the latent: posterior 0.0" in out
    assert f"; prior {first:.3g}, {middle:.3g}, {last:.3g}\n" in out
    assert ("squared error of x1, divided by (1 - t)^2" in out) == (target == "x1")


@pytest.mark.parametrize("target", ["velocity", "x1"])
def test_velocity_loss_by_source_of_the_latent(off_line, target):
    results, policy = off_line(policy=Knowing(target))
    loss = results["velocity_loss"]
    t = np.arange(0.05, 1, 0.1)
    np.testing.assert_allclose(loss["t"], t)
    grow = 1 if target == "velocity" else 1 / (1 - t) ** 2
    np.testing.assert_allclose(loss["posterior"], 0.25**2 * grow * np.ones(10), rtol=1e-3)
    np.testing.assert_allclose(loss["prior"], 1.5**2 * grow * np.ones(10), rtol=1e-3)
    for (x0, times), (same, _) in zip(policy.arms[::2], policy.arms[1::2], strict=True):
        torch.testing.assert_close(x0[0], same[0], atol=0, rtol=0)
        assert times == loss["t"]
    x0 = torch.cat([x0[0] for x0, _ in policy.arms[::2]])
    assert len(x0) == 20 + 17  # every window of both episodes
    assert len({row.numpy().tobytes() for row in x0}) == len(x0)


def test_velocity_loss_without_a_latent(off_line):
    loss = off_line(policy=Knowing(latent=False))[0]["velocity_loss"]
    assert list(loss) == ["t", "none"]
    np.testing.assert_allclose(loss["none"], 0.25, rtol=1e-4)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["x", "y", "grip"], ["x", "y", "grip"]),
        ([["x", "y", "grip"]], ["x", "y", "grip"]),
        ({"motors": ["x", "y", "grip"]}, ["x", "y", "grip"]),
        ({"x": 0, "y": 1, "grip": 2}, ["x", "y", "grip"]),
        ({"axes": {"x": 0, "y": 1, "grip": 2}}, ["x", "y", "grip"]),
        (["x", "y"], None),
        (None, None),
        ([], None),
    ],
)
def test_names_of_joints(names, expected):
    features = {"do": {"names": names}}
    assert columns.joint_names(features, "do", 3) == (expected or ["do[0]", "do[1]", "do[2]"])
    assert columns.joint_names({}, "do", 1) == ["do[0]"]


def test_joint_names_reach_the_results(off_line, tmp_path):
    root = write_demos(tmp_path / "named", lengths=(8, 9))
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["action"]["names"] = ["a", "b", "c", "d"]
    (root / "meta/info.json").write_text(json.dumps(info))
    results, _ = off_line(root=root, policy=Knowing(), val_episodes=[1])
    assert results["joints"] == ["a", "b", "c", "d"]


# which episodes are evaluated

SHOWN = {"observation.state": 5, "action": 4}  # column -> numbers in a row


def recording(number, scale=1.0, sizes=None):
    """Columns of a recorded episode that no other one is like."""
    rng = np.random.default_rng(number)
    columns = {}
    for key, size in (sizes or SHOWN).items():
        columns[key] = (scale * rng.normal(size=(9 + number, size))).astype(np.float32).tolist()
    return columns


def write_recordings(root, numbers, fps=10, **options):
    """A v2.1 dataset whose episodes 0, 1, ... are these recordings; {episode: recording}, too."""
    pairs = numbers.items() if isinstance(numbers, dict) else enumerate(numbers)
    tables = {index: recording(number, **options) for index, number in pairs}
    return write_v2(root, tables, {"fps": fps})


class Learned(Knowing):
    """With the statistics of some recordings."""

    def __init__(self, numbers):
        super().__init__()
        columns = [recording(number) for number in numbers]
        state, action = (np.concatenate([c[key] for c in columns]) for key in SHOWN)
        self.stats = Normalizer("mean_std", statistics(state, action))


EPISODES = {"trained on": [0, 1, 2, 4, 6, 7], "held out": [3, 5]}
HASHES = {
    str(n): content_hash(np.float32(column) for column in recording(n).values()) for n in range(8)
}


@pytest.fixture
def again(play, capsys):
    """again(root, *options) -> (results.json, printed): of a policy that recordings 0-7 taught."""

    def run(root, *options, meta=None, episodes=EPISODES, **data):
        policy = Learned(episodes["trained on"])
        about = {"episodes": episodes, "episode_hashes": HASHES, **(meta or {})}
        settings = {"root": str(root), "val_episodes": 0.25} | data
        capsys.readouterr()
        results, _ = play(*options, policy=policy, env=None, meta=about, **settings)
        return results, capsys.readouterr().out

    return run


def test_the_episodes_held_out_are_those_of_the_checkpoint(again, tmp_path):
    root = write_recordings(tmp_path / "data", range(8))
    results, out = again(root)
    assert results["episodes"] == [3, 5]  # the last two are the share of data.val_episodes now
    assert results["new_episodes"] == []
    assert "notice" not in out
    moved = root.rename(tmp_path / "moved")
    results, out = again("nowhere", "--data", moved)
    assert results["episodes"] == [3, 5]
    assert "notice" not in out
    results, _ = again(moved, HZ=5)  # resampled: what is recorded stays the same
    assert results["episodes"] == [3, 5]


def test_a_dataset_that_grew(again, tmp_path):
    root = write_recordings(tmp_path / "data", range(10))
    results, out = again(root)
    assert results["episodes"] == [3, 5]
    assert (
        f"notice: {root} has episodes that are new to the run: [8, 9]; --new_episodes evaluates "
        "them, too\n" in out
    )
    results, out = again(root, "--new_episodes")
    assert results["episodes"] == [3, 5, 8, 9]
    assert results["new_episodes"] == [8, 9]
    assert "notice: episodes that are new to the run are evaluated, too: [8, 9]\n" in out
    nothing_held_out = {"trained on": list(range(8)), "held out": []}
    results, _ = again(root, "--new_episodes", episodes=nothing_held_out)
    assert results["episodes"] == [8, 9]
    with pytest.raises(UserError, match=r"held no episodes out.*--new_episodes"):
        again(root, episodes=nothing_held_out)


def without(*gone):
    return {number: number for number in range(8) if number not in gone}


def test_a_dataset_that_lost_episodes(again, tmp_path):
    root = write_recordings(tmp_path / "a", without(5))
    results, out = again(root)
    assert results["episodes"] == [3]
    assert f"notice: {root}: of the held-out episodes [3, 5] there are [3], by" in out
    results, out = again(write_recordings(tmp_path / "b", without(2)))
    assert results["episodes"] == [3, 5]
    assert "notice" not in out
    nothing = "has none of the episodes that this run held out"
    for number, left in enumerate((without(3, 5), {0: 0}, {30: 8, 31: 9})):
        unseen = r"; new to the run are \[30, 31\]: --new_episodes" if 30 in left else "$"
        with pytest.raises(UserError, match=nothing + unseen):
            again(write_recordings(tmp_path / f"c{number}", left))


@pytest.mark.parametrize(
    ("gone", "held_out"), [(0, [2, 4]), (2, [2, 4]), (3, [4]), (4, [3, 4]), (5, [3]), (7, [3, 5])]
)
def test_episodes_that_were_numbered_anew_are_found_by_what_they_hold(
    again, tmp_path, gone, held_out
):
    root = write_recordings(tmp_path / "data", [*without(gone).values(), 8])
    results, out = again(root)
    assert results["episodes"] == held_out
    assert (f"there are {held_out}, by the numbers that they have now" in out) == (gone != 7)
    results, out = again(root, "--new_episodes")
    assert results["episodes"] == sorted([*held_out, 7])
    assert results["new_episodes"] == [7]


def test_a_number_changes_neither_what_is_held_out_nor_its_noise(again, tmp_path, monkeypatch):
    monkeypatch.setattr(Knowing, "sample", lambda self, memory, x0, *rest, **options: x0)
    (before, _), (after, _) = (
        again(write_recordings(tmp_path / str(first), {first: 3, first + 1: 5}))
        for first in (3, 30)
    )
    assert after["episodes"] == [30, 31]
    for key in ("mae", "chunk_error", "velocity_loss"):
        assert after[key] == before[key]


def test_a_copy_of_an_episode_that_was_trained_on_is_held_out_only_as_recorded(again, tmp_path):
    """Recording 3 was trained on as episode 8, too, and held out as episode 3."""
    episodes = EPISODES | {"trained on": [*EPISODES["trained on"], 8]}
    meta = {"episode_hashes": HASHES | {"8": HASHES["3"]}}
    root = write_recordings(tmp_path / "same", [*range(8), 3])
    assert again(root, meta=meta, episodes=episodes)[0]["episodes"] == [3, 5]
    root = write_recordings(tmp_path / "renumbered", [1, 2, 3, 4, 5, 6, 7, 3])
    assert again(root, meta=meta, episodes=episodes)[0]["episodes"] == [4]


def test_other_recordings_of_the_same_kind_are_all_new(again, tmp_path):
    root = write_recordings(tmp_path / "other", range(20, 24))
    with pytest.raises(
        UserError, match=r"--data: .* has none .* new to the run are \[0, 1, 2, 3\]:"
    ):
        again("nowhere", "--data", root)
    results, _ = again("nowhere", "--data", root, "--new_episodes")
    assert results["episodes"] == results["new_episodes"] == [0, 1, 2, 3]


def test_an_episode_that_was_changed_is_another_one():
    state, action = (np.array(column, np.float32) for column in recording(3).values())
    known = content_hash([state, action])
    assert content_hash([state.copy(), action.copy()]) == known
    changed = action.copy()
    changed[-1, -1] += 1e-3
    for other in ([state, changed], [state[:-1], action[:-1]], [action, state], [state]):
        assert content_hash(other) != known


def test_older_checkpoints_know_their_episodes_by_number(again, tmp_path):
    root = write_recordings(tmp_path / "data", range(10))
    results, out = again(root, meta={"episode_hashes": None})
    assert results["episodes"] == [3, 5]
    assert "notice: an older checkpoint, which knows its held-out episodes by number only" in out
    assert "new to the run: [8, 9]" in out
    results, _ = again(root, "--new_episodes", meta={"episode_hashes": None})
    assert results["new_episodes"] == [8, 9]
    root = write_recordings(tmp_path / "large", range(8), scale=50)
    with pytest.raises(UserError, match="of another kind than the training data"):
        again(root, meta={"episode_hashes": None})


def test_data_in_other_units(again, tmp_path):
    root = write_recordings(tmp_path / "data", range(8), scale=50)
    message = (
        r"--data: .*data is of another kind than the training data:\n    state\[0\]: mean .*\n"
        r"(.*\n)*    action\[3\]: mean .* other units.*\n    --other_units evaluates it anyway"
    )
    with pytest.raises(UserError, match=message):
        again(root, "--data", root, "--new_episodes")
    with pytest.raises(UserError, match="has none of the episodes that this run held out"):
        again(root, "--other_units")
    results, _ = again(root, "--other_units", "--new_episodes")
    assert results["episodes"] == list(range(8))


@pytest.mark.parametrize(
    ("sizes", "settings", "message"),
    [
        ({"action": 3}, {}, "the action has 3 numbers, in training 4"),
        ({"observation.state": 6}, {}, "the state has 6 numbers, in training 5"),
        ({"a": 2, "b": 3}, {"state_keys": ["a", "b"]}, "a has 2 numbers, in training 3; b has 3"),
        (
            {},
            {"state_keys": ["joints"]},
            r"no numeric column 'joints'(.*\n)*.* trained on the columns \['joints', 'action'\]",
        ),
        (
            {},
            {"cameras": {"up": "top"}},
            r"'top' is not in the dataset(.*\n)*.* and the cameras \['top'\]",
        ),
    ],
)
def test_data_of_other_columns(again, tmp_path, sizes, settings, message):
    root = write_recordings(tmp_path / "data", range(8), sizes=SHOWN | sizes)
    meta = {"columns": {"a": 3, "b": 2}}
    with pytest.raises(UserError, match=rf"--data: .* than the training data: (.*\n)*.*{message}"):
        again("nowhere", "--data", root, "--other_units", meta=meta, **settings)


def test_data_of_another_rate(again, tmp_path):
    root = write_recordings(tmp_path / "data", range(8), fps=5)
    _, out = again("nowhere", "--data", root, "--new_episodes")
    assert f"notice: --data: {root} has 5 fps, resampled to the policy's 10 Hz" in out


def test_a_real_run_and_a_dataset_that_grew_since(experiment, tmp_path, capsys):
    exp = experiment()
    exp.main("train.total_steps=1", "data.val_episodes=0.3")
    assert exp.meta("step_1")["columns"] == {"observation.state": 5, "action": 4}
    grown = write_demos(tmp_path / "grown", lengths=(*LENGTHS, 12))
    argv = ["--checkpoint", str(exp.save_dir), "--out", str(tmp_path / "out"), "--data", str(grown)]
    assert evaluate.main(argv) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["episodes"] == exp.meta("step_1")["episodes"]["held out"] == [4, 5]
    out = capsys.readouterr().out
    assert "has episodes that are new to the run: [6]" in out
    assert "older checkpoint" not in out
