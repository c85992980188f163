import json
from pathlib import Path

import av
import gymnasium
import numpy as np
import pyarrow.parquet as pq
import pytest
from gymnasium.utils.env_checker import check_env
from helpers import carry, pinhole, still

from common.envs import geometry, registry, tabletop  # noqa: F401 (gymnasium ids)
from common.envs.tabletop import CAMERAS, Expert, Tabletop, generate

OPEN, CLOSED = 0.0, 1.0


def arranged(
    bar=((-0.12, -0.2), (0.12, -0.2)), grippers=None, pillar=(0.0, 0.0), goal=(0.0, 0.3), held=False
):
    """A situation set by hand, without pictures."""
    env = Tabletop()
    env.render_observations = False
    env.reset(seed=0)
    env.bar, env.goal, env.pillars = np.array(bar, float), np.array(goal), np.array([pillar], float)
    env.grippers = np.array(bar if grippers is None else grippers, float)
    if held:
        env.grips, env.held, env.grasped = np.ones(2), np.ones(2, bool), True
    return env


def play(seed, mode, render=False, size=(96, 96)):
    """(states, actions, info) of an expert's episode."""
    env = Tabletop(size)
    env.render_observations = render
    observation, info = env.reset(seed=seed)
    expert = Expert(env, mode, np.random.default_rng([seed, 1]))
    states = []
    actions = []
    done = False
    while not done:
        states.append(observation["observation.state"])
        actions.append(expert())
        observation, _, terminated, truncated, info = env.step(actions[-1])
        done = terminated or truncated
    return np.array(states), np.array(actions), info


@pytest.mark.filterwarnings("ignore:.*render.*:UserWarning")
def test_gymnasium_accepts_it():
    check_env(gymnasium.make("Tabletop-v0", image_size=(48, 64)).unwrapped)


def test_seed_decides_everything():
    env = Tabletop((48, 48))
    first, again, other = env.reset(seed=3)[0], env.reset(seed=3)[0], env.reset(seed=4)[0]
    unseeded = env.reset()[0]
    for key, value in first.items():
        np.testing.assert_array_equal(value, again[key])
        assert not np.array_equal(value, other[key])
        assert not np.array_equal(other[key], unseeded[key])
    for a, b in zip(play(5, "left")[:2], play(5, "left")[:2], strict=True):
        np.testing.assert_array_equal(a, b)


def test_rendering_changes_only_what_is_returned():
    wrapped = gymnasium.make("Tabletop-v0", image_size=(48, 48))
    env = wrapped.unwrapped
    env.render_observations = False
    assert list(wrapped.reset(seed=0)[0]) == ["observation.state"]
    assert list(wrapped.step(still(env))[0]) == ["observation.state"]
    env.render_observations = True
    assert env.observe() in env.observation_space
    blind = play(2, "right")
    seeing = play(2, "right", render=True, size=(48, 48))
    for a, b in zip(blind[:2], seeing[:2], strict=True):
        np.testing.assert_array_equal(a, b)


def test_grippers_keep_the_speed_limit_and_the_table():
    env = arranged(grippers=((-0.3, -0.3), (0.3, -0.3)))
    state = env.step([-0.3 + 3, -0.3 + 4, CLOSED, 0.31, -0.3, OPEN])[0]["observation.state"]
    # Targets are clipped to the table first: (0.5, 0.4) lies along (8, 7) from the left gripper.
    np.testing.assert_allclose(
        state[:2], [-0.3 + 0.035 * 8 / 113**0.5, -0.3 + 0.035 * 7 / 113**0.5], atol=1e-6
    )
    np.testing.assert_allclose(state[2:], [0.25, 0.31, -0.3, OPEN], atol=1e-6)
    for _ in range(40):
        state = env.step([-9, -9, 2, 9, -9, -1])[0]["observation.state"]
    np.testing.assert_allclose(state, [-0.5, -0.4, 1, 0.5, -0.4, 0], atol=1e-6)


@pytest.mark.parametrize(
    "action", [np.zeros(5), np.zeros((1, 6)), np.array([0, 0, np.nan, 0, 0, 0])]
)
def test_bad_actions_are_refused(action):
    with pytest.raises(ValueError, match="six finite numbers"):
        arranged().step(action)


@pytest.mark.parametrize(("distance", "grasps"), [(0.049, True), (0.051, False)])
def test_grasp_needs_5_cm(distance, grasps):
    env = arranged(grippers=((-0.12, -0.2 - distance), (0.12, -0.2)))
    for _ in range(4):
        env.step(still(env, CLOSED))
    assert env.held.tolist() == [grasps, True]
    assert env.grasped == grasps


def test_grasp_needs_the_closing_and_its_own_end():
    env = arranged(grippers=((-0.3, -0.2), (0.3, -0.2)))
    for _ in range(4):
        env.step(still(env, CLOSED))
    for _ in range(10):
        env.step([-0.12, -0.2, CLOSED, 0.12, -0.2, CLOSED])
    np.testing.assert_allclose(env.grippers, env.bar)
    assert not env.held.any()  # arrived with closed fingers
    env = arranged(grippers=((0.12, -0.2), (-0.12, -0.2)))
    for _ in range(4):
        env.step(still(env, CLOSED))
    assert not env.held.any()  # crossed arms


def test_bar_held_at_one_end_trails():
    env = arranged()
    for _ in range(4):
        env.step([-0.12, -0.2, CLOSED, 0.12, -0.2, OPEN])
    for _ in range(10):
        env.step([-0.2, -0.3, CLOSED, 0.12, -0.2, OPEN])
    np.testing.assert_allclose(env.bar[0], [-0.2, -0.3])
    assert np.linalg.norm(env.bar[1] - env.bar[0]) == pytest.approx(0.24)
    assert env.bar[1][1] < -0.21
    assert not env.grasped


@pytest.mark.parametrize(
    ("stretch", "drops"), [(0.079, False), (0.081, True), (-0.079, False), (-0.081, True)]
)
def test_dropped_when_stretched_by_8_cm(stretch, drops):
    env = arranged(held=True)
    for share in np.linspace(0, 1, 9)[1:]:
        _, reward, terminated, _, info = env.step(
            [-0.12 - share * stretch, -0.2, CLOSED, 0.12, -0.2, CLOSED]
        )
    assert (terminated, info["failure"]) == ((True, "dropped") if drops else (False, None))
    assert reward == 0


@pytest.mark.parametrize(("gap", "touches"), [(0.001, False), (-0.001, True)])
def test_pillar_contact(gap, touches):
    # The bar's side, held level below the pillar.
    bar_reach = Tabletop.pillar_radius + tabletop.BAR_RADIUS + gap
    gripper_reach = Tabletop.pillar_radius + tabletop.GRIPPER_RADIUS + gap
    side_on = arranged(bar=((-0.12, -bar_reach), (0.12, -bar_reach)), held=True)
    # A bar that points at the pillar: its gripper is rounder, so it touches first.
    end_on = arranged(bar=((-gripper_reach - 0.24, 0), (-gripper_reach, 0)), held=True)
    empty = arranged(grippers=((-0.3, -0.3), (0.8 * gripper_reach, 0.6 * gripper_reach)))
    for env in (side_on, end_on, empty):
        _, _, terminated, _, info = env.step(still(env))
        assert (terminated, info["failure"]) == ((True, "pillar") if touches else (False, None))


def test_success_only_after_release_in_the_goal_zone():
    env = arranged(bar=((-0.12, 0.3), (0.12, 0.3)), held=True)
    _, reward, terminated, _, info = env.step(still(env))
    assert (reward, terminated, info["success"]) == (0, False, False)
    x, y = env.grippers[1]
    for _ in range(4):  # one hand alone does not count
        assert not env.step([-0.12, 0.3, OPEN, x, y, CLOSED])[2]
    for _ in range(3):
        _, reward, terminated, _, info = env.step(still(env, OPEN))
    assert (reward, terminated, info["success"], info["failure"]) == (1, True, True, None)


@pytest.mark.parametrize(
    ("offset", "success"),
    [((0.059, 0.0), True), ((0.061, 0), False), ((0, -0.069), True), ((0, -0.071), False)],
)
def test_goal_tolerance_and_release_elsewhere(offset, success):
    env = arranged(bar=np.array([[-0.12, 0.3], [0.12, 0.3]]) + offset, held=True)
    for _ in range(4):
        _, _, terminated, _, info = env.step(still(env, OPEN))
        if terminated:
            break
    assert (terminated, info["success"]) == (success, success)


def test_bar_never_held_by_both_is_no_success():
    env = arranged(bar=((-0.12, 0.3), (0.12, 0.3)), goal=(0.0, 0.3))
    assert not env.step(still(env, OPEN))[2]


@pytest.mark.parametrize(("held", "failure"), [(False, "no_grasp"), (True, "timeout")])
def test_time_limit(held, failure):
    env = arranged(held=held)
    results = [env.step(still(env)) for _ in range(env.max_steps)]
    assert [r[3] for r in results] == [False] * (env.max_steps - 1) + [True]
    assert not any(r[2] for r in results)
    assert (results[-2][4]["failure"], results[-1][4]["failure"]) == (None, failure)


def test_mode_is_the_side_of_the_last_passage():
    env = arranged(bar=((-0.12, -0.2), (0.12, -0.2)), held=True)
    assert carry(env, (-0.22, -0.2), (-0.22, -0.01))[4]["mode"] is None
    assert carry(env, (-0.22, 0.01))[4]["mode"] == "left"
    env.max_steps = 500
    # Back down, across below the pillar and up on the other side: the last passage upwards counts.
    assert carry(env, (-0.22, -0.2), (0.22, -0.2))[4]["mode"] == "left"
    info = carry(env, (0.22, 0.2))[4]
    assert (info["mode"], info["failure"]) == ("right", None)
    np.testing.assert_allclose(info["position"], [0.22, 0.2])


def test_what_plots_and_metrics_ask_for():
    env = arranged(pillar=(0.01, -0.02))
    np.testing.assert_allclose(env.obstacles(), [(0.01, -0.02, 0.06)])
    np.testing.assert_allclose(env.reset(seed=1)[1]["position"], env.bar.mean(0))
    assert dict(zip(env.MODES, env.MODE_SHARES, strict=True)) == {"left": 0.5, "right": 0.5}


def test_expert_succeeds_on_both_sides():
    results = {mode: [play(seed, mode) for seed in range(40)] for mode in Tabletop.MODES}
    for mode, episodes in results.items():
        assert (
            np.mean([info["success"] and info["mode"] == mode for _, _, info in episodes]) >= 0.98
        )
    lengths = {
        mode: np.mean([len(actions) for _, actions, _ in episodes])
        for mode, episodes in results.items()
    }
    assert all(85 < length < 110 for length in lengths.values())
    drawn = [Expert(Tabletop(), None, np.random.default_rng(seed)).mode for seed in range(200)]
    assert 70 < drawn.count("left") < 130


@pytest.mark.parametrize("size", [(384, 384), (320, 480)])
def test_things_have_their_colour_where_they_project(size):
    env = Tabletop(size)
    seen = dict.fromkeys(CAMERAS, 0)
    for seed in range(8):
        env.reset(seed=seed)
        env.grippers = env.bar + np.array([[-0.02, -0.06], [0.02, -0.06]])
        views, points = {"cam_head": ((0, -0.5, 1), (0, 0, 0), 1.22)}, []
        for name, at, x in (
            ("cam_left", env.grippers[0], -0.4),
            ("cam_right", env.grippers[1], 0.4),
        ):
            heading = (at - (x, -0.62)) / np.linalg.norm(at - (x, -0.62))
            views[name] = ((*(at - 0.08 * heading), 0.2), (*(at + 0.1 * heading), 0), 0.72)
            side = np.array([heading[1], -heading[0]])
            # The hand to the left and right of its fingers, and the tips of the open fingers.
            for sign in (-1, 1):
                palm = at - 0.05 * heading + sign * 0.04 * side
                points.append(
                    ((*palm, 0.03), tabletop.LEFT if x < 0 else tabletop.RIGHT, True, name)
                )
                points.append(
                    (
                        (*(at + 0.014 * heading + sign * 0.028 * side), 0.035),
                        tabletop.FINGER,
                        True,
                        name,
                    )
                )
        along = (env.bar[1] - env.bar[0]) / 0.24
        for share in (0.3, 0.5, 0.7):
            for off, red in (
                (-0.011, True),
                (0, True),
                (0.011, True),
                (-0.021, False),
                (0.021, False),
            ):
                point = env.bar[0] + share * 0.24 * along + off * np.array([-along[1], along[0]])
                points.append(((*point, 0.015), tabletop.BAR, red, None))
        pictures = env.observe()
        for name, (position, target, focal) in views.items():
            for point, colour, same, owner in points:
                u, v = pinhole(point, position, target, focal, size)
                # A wrist camera sees the other hand from the side; its own covers the lower part.
                covered = name != "cam_head" and (
                    owner not in (name, None) or (owner is None and v > 0.62 * size[0])
                )
                if 1 < u < size[1] - 1 and 1 < v < size[0] - 1 and not covered:
                    pixel = pictures[f"observation.images.{name}"][int(v), int(u)].astype(int)
                    assert (np.abs(pixel - colour).max() < 45) == same, (
                        seed,
                        name,
                        point,
                        colour,
                        pixel,
                    )
                    seen[name] += 1
    assert min(seen.values()) > 60


def test_table_has_squares_of_10_cm_and_its_tint():
    env = Tabletop((192, 192))
    picture = env.reset(seed=0)[0]["observation.images.cam_head"]
    shades = np.clip(tabletop.WOOD * env.tint, 0, 255)
    bare = [(1, 3), (2, 3), (7, 3), (8, 3), *((column, 5) for column in range(1, 9))]
    for column, row in bare:
        u, v = pinhole(
            (0.1 * column - 0.45, 0.1 * row - 0.35, 0),
            (0, -0.5, 1),
            (0, 0, 0),
            1.22,
            env.image_size,
        )
        np.testing.assert_allclose(picture[int(v), int(u)], shades[(column + row) % 2], atol=2)


def test_mirrored_world_gives_mirrored_pictures():
    env = Tabletop((96, 96))
    env.reset(seed=1)
    env.grips[:] = 0.7
    env.grippers = np.array([[-0.2, 0.05], [-0.05, -0.1]])
    pictures = env.observe()
    flip = np.array([-1, 1])
    env.grippers, env.bar = env.grippers[::-1] * flip, env.bar[::-1] * flip
    env.pillars, env.goal, env.table_top = env.pillars * flip, env.goal * flip, None
    mirrored = env.observe()
    blue, orange = np.array(tabletop.LEFT), np.array(tabletop.RIGHT)
    wood = np.clip(tabletop.WOOD * env.tint, 0, 255)
    for name, other in zip(CAMERAS, ("cam_head", "cam_right", "cam_left"), strict=True):
        a = pictures[f"observation.images.{name}"].astype(float)
        b = mirrored[f"observation.images.{other}"][:, ::-1].astype(float)
        # The chequers swap shades in a mirror, and the arms their colours.
        explained = np.abs(a - b).max(-1) <= np.abs(wood[0] - wood[1]).max() + 2
        for own, opposite in ((blue, orange), (orange, blue)):
            explained |= (np.abs(a - own).max(-1) < 60) & (np.abs(b - opposite).max(-1) < 60)
        assert explained.mean() > 0.97


def test_no_camera_sees_the_horizon():
    for size in ((96, 96), (96, 256)):
        env = Tabletop(size)
        env.render_observations = False
        env.reset(seed=0)
        for env.grippers in (
            np.array([[-0.5, -0.4], [0.5, 0.4]]),
            np.array([[0.5, 0.4], [-0.5, -0.4]]),
        ):
            for projection in env.cameras().values():
                back = np.linalg.inv(projection[:, [0, 1, 3]])
                corners = np.array([[u, v, 1] for u in (0, size[1]) for v in (0, size[0])])
                assert (back @ corners.T)[2].min() > 0  # positive depth of the table's plane


def test_polygons_behind_the_camera_are_clipped():
    points = np.array([[0.0, 0, 1], [1, 0, 1], [1, 1, -1], [0, 1, -1]])
    kept = geometry.clip_near(points, near=0.5)
    np.testing.assert_allclose(kept, [[0, 0, 1], [1, 0, 1], [1, 0.25, 0.5], [0, 0.25, 0.5]])
    assert geometry.clip_near(points - [0, 0, 2]).shape == (0, 3)


def test_generated_actions_replay_to_success(tmp_path):
    root = tmp_path / "demos"
    generate(root, episodes=3, image_size=(48, 48))
    info = json.loads((root / "meta/info.json").read_text())
    assert (info["total_episodes"], info["fps"], info["robot_type"]) == (3, 20, "tabletop")
    table = pq.read_table(next(Path(root).glob("data/**/*.parquet"))).to_pydict()
    episode_index = np.array(table["episode_index"])
    states, actions = (np.array(table[key], np.float32) for key in ("observation.state", "action"))
    for episode in range(3):  # no seed up to here fails, so episode i is reset seed i
        rows = np.flatnonzero(episode_index == episode)
        env = Tabletop()
        env.render_observations = False
        observation, _ = env.reset(seed=episode)
        for row in rows:
            np.testing.assert_array_equal(observation["observation.state"], states[row])
            observation, _, terminated, _, result = env.step(actions[row])
            assert terminated == (row == rows[-1])
        assert result["success"]
    # The first frame of the video is the first observation, up to x264's loss.
    with av.open(next(root.glob("videos/observation.images.cam_head/**/*.mp4"))) as container:
        frame = next(container.decode(video=0)).to_ndarray(format="rgb24")
    expected = Tabletop((48, 48)).reset(seed=0)[0]["observation.images.cam_head"]
    assert np.abs(frame.astype(int) - expected).mean() < 8
