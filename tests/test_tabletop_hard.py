from collections import Counter
from itertools import pairwise

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from helpers import carry, pinhole, still

from common.data.loader import Data
from common.envs import registry, tabletop  # noqa: F401 (gymnasium ids)
from common.envs.tabletop_hard import TabletopHard, generate
from common.schema import Data as Settings

SEEN = "observation.environment_state"
GAPS = {  # x of the gaps of each mode, without the rows' shifts
    "LLL": (-0.1, -0.2, -0.3),
    "LLR": (-0.1, -0.2, -0.1),
    "LRL": (-0.1, 0.0, -0.1),
    "LRR": (-0.1, 0.0, 0.1),
    "RLL": (0.1, 0.0, -0.1),
    "RLR": (0.1, 0.0, 0.1),
    "RRL": (0.1, 0.2, 0.1),
    "RRR": (0.1, 0.2, 0.3),
}


def arranged(bar, angle=1.5, held=True):
    """A bar at hand-made middle x, y in both grippers, without pictures."""
    env = TabletopHard(max_steps=1000)
    env.render_observations = False
    env.reset(seed=0)
    half = 0.04 * np.array([np.cos(angle), np.sin(angle)])
    env.bar = env.grippers = np.array([bar - half, bar + half])
    if held:
        env.grips, env.held, env.grasped = np.ones(2), np.ones(2, bool), True
    return env


def play(seed, mode=None):
    """(first observation, actions, info) of an expert's episode."""
    env = TabletopHard()
    env.render_observations = False
    first, info = env.reset(seed=seed)
    expert, actions, done = env.expert(mode, np.random.default_rng([seed, 1])), [], False
    while not done:
        actions.append(expert())
        _, _, terminated, truncated, info = env.step(actions[-1])
        done = terminated or truncated
    return first, np.array(actions), info


def replay(env, actions):
    """(observations, info) of carrying out actions, without another reset."""
    observations = []
    for action in actions:
        observation, _, terminated, truncated, info = env.step(action)
        observations.append(observation)
        if terminated or truncated:
            break
    return observations, info


@pytest.mark.filterwarnings("ignore:.*render.*:UserWarning")
def test_gymnasium_accepts_it():
    env = gymnasium.make("TabletopHard-v0", image_size=(48, 64)).unwrapped
    check_env(env)
    assert env.metadata["render_fps"] == 10
    assert list(env.MODES) == list(GAPS)
    env.render_observations = False
    assert set(env.reset(seed=0)[0]) == set(env.step(still(env))[0]) == {"observation.state", SEEN}
    env.render_observations = True
    assert env.observe() in env.observation_space
    assert env.MODE_SHARES == (0.125,) * 8


def test_seed_decides_everything():
    env = TabletopHard((48, 48))
    first, again, other = env.reset(seed=3)[0], env.reset(seed=3)[0], env.reset(seed=4)[0]
    for key, value in first.items():
        np.testing.assert_array_equal(value, again[key])
        assert not np.array_equal(value, other[key])
    for a, b in zip(play(5)[:2], play(5)[:2], strict=True):
        np.testing.assert_equal(a, b)


def test_pillars_are_a_galton_board():
    env = TabletopHard()
    env.render_observations = False
    env.reset(seed=8)
    at = [(0, -0.2), (-0.1, 0.04), (0.1, 0.04), (-0.2, 0.28), (0, 0.28), (0.2, 0.28)]
    off = env.pillars - at
    np.testing.assert_allclose(off[:, 0], env.shifts[[0, 1, 1, 2, 2, 2]], atol=1e-12)
    np.testing.assert_allclose(off[:, 1], 0, atol=1e-12)
    np.testing.assert_array_equal(env.obstacles(), [(*pillar, 0.03) for pillar in env.pillars])
    drawn = np.array([env.reset(seed=seed)[0][SEEN] for seed in range(200)])
    np.testing.assert_allclose(drawn.min(0)[3:], [-0.01, -0.01, -0.01, 0.42], atol=0.0005)
    np.testing.assert_allclose(drawn.max(0)[3:], [0.01, 0.01, 0.01, 0.44], atol=0.0005)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(7)).max() < 0.3  # one number each


def test_low_dimensional_observation_is_the_whole_world():
    for seed in range(4):
        first, actions, info = play(seed)
        env, other = TabletopHard(), TabletopHard()
        env.reset(seed=seed)
        other.reset(seed=seed + 100)
        x, y, angle, *shifts, goal = first[SEEN].astype(float)
        other.grippers = first["observation.state"].astype(float).reshape(2, 3)[:, :2]
        half = np.array([[-0.04], [0.04]]) * [np.cos(angle), np.sin(angle)]
        other.bar, other.goal = np.array([x, y]) + half, np.array([0, goal])
        rows = [(0, -0.2)], [(-0.1, 0.04), (0.1, 0.04)], [(-0.2, 0.28), (0, 0.28), (0.2, 0.28)]
        other.pillars = np.concatenate(
            [row + np.array([shift, 0]) for row, shift in zip(rows, shifts, strict=True)]
        )
        other.shifts, other.tint, other.table_top = np.array(shifts), env.tint, None
        for key, picture in env.observe().items():
            assert np.abs(picture.astype(float) - other.observe()[key]).mean() < 0.2, key
        env.render_observations = False
        other.render_observations = False
        (a, info_a), (b, info_b) = replay(env, actions), replay(other, actions)
        assert info_a["success"]
        assert info["mode"] == info_a["mode"] == info_b["mode"]
        assert info_b["success"]
        for key in ("observation.state", SEEN):
            np.testing.assert_allclose([o[key] for o in a], [o[key] for o in b], atol=1e-5)


def test_environment_state_follows_the_bar():
    env = arranged((-0.1, -0.35), angle=0.5)
    observation, _, _, _, info = env.step(still(env))
    np.testing.assert_allclose(observation[SEEN][:3], [-0.1, -0.35, 0.5], atol=1e-6)
    env.grippers = env.grippers[::-1]  # the ends swap places: half a turn
    observation, _, _, _, info = env.step(still(env))
    np.testing.assert_allclose(observation[SEEN][:3], [-0.1, -0.35, 0.5 - np.pi], atol=1e-6)
    np.testing.assert_allclose(info["position"], [-0.1, -0.35])


@pytest.mark.parametrize("mode", GAPS)
def test_mode_of_a_path_made_by_hand(mode):
    a, b, c = GAPS[mode]
    env = arranged((a, -0.35))
    assert (
        carry(env, (a, -0.08), (b, -0.08), (b, 0.16), (c, 0.16), (c, 0.279), angle=1.5)[4]["mode"]
        is None
    )
    info = carry(env, (c, 0.281), angle=1.5)[4]
    assert (info["mode"], info["failure"]) == (mode, None)


def test_mode_counts_the_last_passage_of_each_row():
    env = arranged((-0.1, -0.35))
    there = [(-0.1, -0.08), (0, -0.08), (0, 0.16), (0.1, 0.16), (0.1, 0.34)]
    assert carry(env, *there, angle=1.5)[4]["mode"] == "LRR"
    assert carry(env, *there[::-1], (-0.1, -0.35), (0.1, -0.35), angle=1.5)[4]["mode"] == "LRR"
    info = carry(env, (0.1, -0.08), *there[1:], angle=1.5)[4]
    assert (info["mode"], info["failure"]) == ("RLR", None)


@pytest.mark.parametrize(
    ("gaps", "mode"),
    [((-0.1, 0.2, -0.3), "LRL"), ((0.1, -0.2, 0.3), "RLR"), ((0.1, -0.2, -0.3), "RLL")],
)
def test_detours_are_named_by_the_side_they_take(gaps, mode):
    a, b, c = gaps
    env = arranged((a, -0.35))
    info = carry(env, (a, -0.08), (b, -0.08), (b, 0.16), (c, 0.16), (c, 0.34), angle=1.5)[4]
    assert (info["mode"], info["failure"]) == (mode, None)


@pytest.mark.parametrize("mode", GAPS)
def test_expert_succeeds_in_every_mode(mode):
    episodes = [play(seed, mode) for seed in range(25)]
    assert [(info["success"], info["mode"]) for _, _, info in episodes] == [(True, mode)] * 25
    assert all(30 < len(actions) <= 44 for _, actions, _ in episodes)


def test_drawn_modes_are_uniform_and_shuffled():
    env = TabletopHard()
    env.render_observations = False
    env.reset(seed=0)
    drawn = [env.expert(None, np.random.default_rng([seed, 1])).mode for seed in range(800)]
    counts = np.array([Counter(drawn)[mode] for mode in GAPS])
    assert ((counts - 100) ** 2 / 100).sum() < 24.3  # chi-square of 7 degrees, 99.9 %
    demonstrated = [env.demonstrated_mode(seed) for seed in range(1000)]
    assert Counter(demonstrated) == dict.fromkeys(GAPS, 125)
    assert len(Counter(pairwise(demonstrated))) == 64  # in no order


def test_actions_one_centimetre_off_still_succeed():
    rng, results = np.random.default_rng(0), []
    for seed in range(40):
        _, actions, _ = play(seed)
        env = TabletopHard()
        env.render_observations = False
        env.reset(seed=seed)
        x, y = rng.normal(0, 0.01, 2)
        off = actions + np.array([x, y, 0, x, y, 0])
        results.append(replay(env, [*off, off[-1], off[-1]])[1])
    assert np.mean([info["success"] for info in results]) >= 0.95


@pytest.mark.parametrize("pillar", range(6))
def test_straight_through_a_pillar_fails_at_any_speed(pillar):
    for speed in (0.02, 0.07, 0.5):  # m per step; 0.07 is the limit
        x, y = arranged((0, -0.3)).pillars[pillar]
        env = arranged((x, y - 0.12))
        result = replay(
            env, [still(env) + k * speed * np.array([0, 1, 0, 0, 1, 0]) for k in range(1, 15)]
        )[1]
        assert (result["failure"], result["success"]) == ("pillar", False)
        assert env.bar[:, 1].mean() < y


def test_a_fast_gripper_does_not_skip_what_it_touches_between_two_steps():
    for reach, touches in ((0.04, True), (0.051, False)):
        env = arranged((0.3, -0.35), held=False)
        x, y = env.pillars[0]
        env.grippers = np.array([(x - 0.035, y - reach), (0.4, -0.3)])
        assert env.step(still(env))[4]["failure"] is None
        # 5 cm from the pillar's middle only on the way.
        info = env.step([x + 0.035, y - reach, 0, 0.4, -0.3, 0])[4]
        assert info["failure"] == ("pillar" if touches else None)


def test_a_step_lasts_a_tenth_of_a_second():
    env = arranged((0.3, -0.35), held=False)
    env.grippers = np.array([[-0.4, -0.3], [0.4, -0.3]])
    state = env.step([0.5, -0.3, 1, 0.37, -0.3, 0.3])[0]["observation.state"]
    np.testing.assert_allclose(
        state, [-0.33, -0.3, 0.5, 0.37, -0.3, 0.3], atol=1e-6
    )  # 0.7 m/s; 5/s
    seen, physics = [], env._carry
    env._carry = lambda: seen.append(env.grippers[:, 0]) or physics()
    env.step([-0.33, -0.3, 1, 0.31, -0.3, 0.3])
    env.step([-0.31, -0.3, 1, 0.31, -0.25, 0.3])
    np.testing.assert_allclose(
        seen, [(-0.33, 0.34), (-0.33, 0.31), (-0.32, 0.31), (-0.31, 0.31)], atol=1e-9
    )


def test_an_episode_has_60_steps():
    env = TabletopHard()
    env.render_observations = False
    env.reset(seed=0)
    results = [env.step(still(env)) for _ in range(60)]
    assert [r[3] for r in results] == [False] * 59 + [True]
    assert results[-1][4]["failure"] == "no_grasp"


@pytest.mark.parametrize(
    ("off", "success"),
    [(0.0, True), (0.039, True), (-0.039, True), (0.042, False), (-0.042, False)],
)
@pytest.mark.parametrize("x", [-0.45, 0.0, 0.45])
def test_goal_is_a_strip(off, success, x):
    env = arranged((x, 0.43), angle=np.pi / 2)
    env.goal[1] = 0.43 - off
    for _ in range(2):
        assert not env.success
        info = env.step(still(env, 0))[4]
    assert info["success"] == success


def test_everything_is_in_view():
    env = TabletopHard((192, 192))
    for seed in range(6):
        picture = env.reset(seed=seed)[0]["observation.images.cam_head"]
        things = [((*pillar, 0), tabletop.PILLAR) for pillar in env.pillars]
        things += [
            ((x, env.goal[1] + y, 0), tabletop.GOAL)
            for x in (-0.48, 0, 0.48)
            for y in (-0.065, 0.065)
        ]
        things += [
            ((*(env.bar[0] + share * (env.bar[1] - env.bar[0])), 0.015), tabletop.BAR)
            for share in (0, 0.5, 1)
        ]
        for point, colour in things:
            u, v = pinhole(point, (0, -0.6, 1.15), (0, -0.06, 0), 1.22, env.image_size)
            assert 1 < u < 191, point
            assert 1 < v < 191, point
            assert np.abs(picture[int(v), int(u)].astype(int) - colour).max() < 45, (seed, point)
        for x, y in ((-0.2, -0.47), (0.2, -0.47), (-0.4, 0.5), (0.4, 0.5)):  # where grippers may be
            assert all(
                1 < at < 191
                for at in pinhole((x, y, 0), (0, -0.6, 1.15), (0, -0.06, 0), 1.22, (192, 192))
            )


def test_no_camera_sees_the_horizon():
    env = TabletopHard()
    env.render_observations = False
    env.reset(seed=0)
    for env.grippers in (
        np.array([[-0.5, -0.54], [0.5, 0.54]]),
        np.array([[0.5, 0.54], [-0.5, -0.54]]),
    ):
        for projection in env.cameras().values():
            back = np.linalg.inv(projection[:, [0, 1, 3]])
            assert (back @ np.array([[u, v, 1] for u in (0, 64) for v in (0, 64)]).T)[2].min() > 0


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_dataset_is_read_back(tmp_path):
    root = tmp_path / "demos"
    generate(root, episodes=4, image_size=(32, 32))
    cameras = {name: f"observation.images.{name}" for name in tabletop.CAMERAS}
    given = {
        "cameras": cameras,
        "state_keys": ["observation.state", SEEN],
        "image_size": [32, 32],
        "HZ": 10.0,
    }
    given |= {"action_horizon": 44, "obs_proprio_history": 1, "val_episodes": 0.25, "batch_size": 8}
    data = Data(Settings(root=str(root), **given))
    assert (data.facts["state_dim"], data.facts["action_dim"], data.val_episodes) == (13, 6, [3])
    modes = []
    for episode in range(4):  # no seed up to here fails, so episode i is reset seed i
        sample = data.windows[data.windows.rows([episode])[:1]]
        env = TabletopHard((32, 32))
        first = env.reset(seed=episode)[0]
        np.testing.assert_array_equal(
            sample["observation.state"][0, 0], [*first["observation.state"], *first[SEEN]]
        )
        for key in cameras.values():
            assert (
                np.abs(sample[key][0].permute(1, 2, 0).numpy().astype(float) - first[key]).mean()
                < 12
            )
        # One chunk is the whole episode.
        actions = sample["action"][0, ~sample["action_is_pad"][0]].numpy()
        assert len(actions) == len(data.windows.rows([episode]))
        env.render_observations = False
        _, info = replay(env, actions)
        assert info["success"]
        modes.append(info["mode"])
    assert modes == [TabletopHard.demonstrated_mode(seed) for seed in range(4)]
