import math
from itertools import pairwise, product

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import evaluate
from common.data.lerobot import LeRobotDataset
from common.data.loader import Data
from common.envs import avoid, registry  # noqa: F401 (gymnasium ids)
from common.envs.avoid import (
    Avoid,
    AvoidSkewed,
    collides,
    demonstrations,
    expert,
    generate,
    generate_skewed,
    modes,
)
from common.schema import Data as Settings

# The world again, by hand.
DISCS = [(0, 0.25), (-0.2, 0.5), (0.2, 0.5), (-0.4, 0.75), (0, 0.75), (0.4, 0.75)]
GAPS = {0.25: (-0.2, 0.2), 0.5: (-0.4, 0, 0.4), 0.75: (-0.6, -0.2, 0.2, 0.6)}
ROUTES = {f"{a}-{b}-{c}": (a, b, c) for a, b, c in product(range(2), range(3), range(4))}


def route(gaps, shift=0.0):
    """Up through the middle of each gap (plus shift), sideways between the rows: (8, 2)."""
    points = [(0, 0)]
    for y, gap in zip(GAPS, gaps, strict=True):
        points += [(GAPS[y][gap] + shift, y - 0.1), (GAPS[y][gap] + shift, y + 0.1)]
    return np.array([*points, (points[-1][0], 1.0)])


def drive(env, points):
    """Step towards each point until the robot is there or the episode ends; the last result."""
    for point in points:
        for _ in range(9):
            result = env.step(point)
            if result[2] or result[3]:
                return result
            if np.allclose(env.path[-1], point, atol=1e-6):
                break
    return result


def placed(x, y, **settings):
    """A robot that starts at (x, y)."""
    env = Avoid(**settings)
    env.reset(seed=0)
    env.path = np.array([[x, y]], np.float32)
    return env


@pytest.fixture(
    scope="module",
    params=[(Avoid, generate), (AvoidSkewed, generate_skewed)],
    ids=["even", "skewed"],
)
def written(request, tmp_path_factory):
    """(class, folder) of a dataset."""
    env, write = request.param
    root = tmp_path_factory.mktemp(env.__name__) / "demos"
    write(root)
    return env, root


@pytest.mark.filterwarnings("ignore:.*(render|Box).*:UserWarning")
@pytest.mark.parametrize(("kind", "name"), [(Avoid, "Avoid-v0"), (AvoidSkewed, "AvoidSkewed-v0")])
def test_gymnasium_accepts_it(kind, name):
    env = gymnasium.make(name)
    assert type(env.unwrapped) is kind
    assert env.metadata["render_fps"] == 10
    check_env(env.unwrapped)


def test_world_is_as_described():
    discs = Avoid().obstacles()
    assert sorted(map(tuple, discs[:, :2].tolist())) == sorted(DISCS)
    assert (discs[:, 2] == 0.06).all()
    assert list(ROUTES) == list(Avoid.MODES)


@pytest.mark.parametrize("shift", [-0.13, 0, 0.13])  # 0.2 - 0.13 is just clear of a disc
def test_all_24_modes_by_hand(shift):
    paths = np.stack([route(gaps, shift) for gaps in ROUTES.values()])
    assert modes(paths).tolist() == list(ROUTES)


def test_all_24_modes_in_the_environment():
    for name, gaps in ROUTES.items():
        _, reward, terminated, truncated, info = drive(placed(0, 0), route(gaps))
        assert (reward, terminated, truncated) == (1, True, False)
        assert (info["success"], info["mode"], info["failure"]) == (True, name, None)


def test_mode_is_that_of_the_last_crossing():
    up = route((0, 1, 2))
    # Back below row 1 and up on the right.
    around = [(-0.2, 0.4), (-0.2, 0.1), (0.2, 0.1), (0.2, 0.4), (0, 0.4)]
    twice = np.concatenate([up[:3], around, up[4:]])
    assert modes(twice[None]).tolist() == ["1-1-2"]
    back = np.concatenate([up, [(0.6, 1.0), (0.6, 0.6), (-0.2, 0.6), (-0.2, 1)]])
    assert modes(back[None]).tolist() == ["0-1-1"]


def test_crossing_is_interpolated():
    # From (-0.3, 0.2) to (0.1, 0.4): at y = 0.25 it is a quarter of the way, x = -0.2. Neither end
    # says so alone: to (1.1, 0.4), x is 0.05 there, right of the disc at 0.
    for end, gap in ((0.1, 0), (1.1, 1)):
        path = [(0, 0), (-0.3, 0.2), (end, 0.4), (0, 0.4), (0, 0.7), (0.2, 0.7), (0.2, 1)]
        assert modes(np.array([path])).tolist() == [f"{gap}-1-2"]
    # Along a row after reaching it: it was crossed on arrival.
    level = [(0, 0), (-0.2, 0.25), (0.2, 0.25), (0.2, 0.4)]
    level += [(0, 0.4), (0, 0.6), (0.2, 0.7), (0.2, 1)]
    assert modes(np.array([level])).tolist() == ["0-1-2"]


def test_no_mode_before_all_rows_are_passed():
    whole = route((1, 2, 3))
    assert [modes(whole[None, :n])[0] for n in range(2, 9)] == [None] * 5 + ["1-2-3"] * 2
    env = placed(0, 0)
    for point in np.repeat(whole[1:], 2, 0):
        before, mode = env.path[-1, 1] >= 0.75, env.step(point)[4]["mode"]
        assert mode == ("1-2-3" if env.path[-1, 1] >= 0.75 else None)
        if before:
            break
    assert before


def test_modes_of_many_are_those_of_each():
    rng = np.random.default_rng(0)
    paths = np.cumsum(rng.normal([0, 0.05], [0.1, 0.1], (500, 30, 2)), 1)
    together = modes(paths).tolist()
    assert together == [modes(path[None])[0] for path in paths]
    assert together == modes(np.concatenate([paths, np.repeat(paths[:, -1:], 5, 1)], 1)).tolist()
    assert set(together) > {None, "0-1-2"}
    for path, found in zip(paths, together, strict=True):  # the same by looking at every step
        gaps = {}
        for row, centres in GAPS.items():
            for (x0, y0), (x1, y1) in pairwise(path):
                if y0 < row <= y1 or y1 < row <= y0:
                    x = np.interp(row, *((y0, y1), (x0, x1)) if y0 < y1 else ((y1, y0), (x1, x0)))
                    gaps[row] = int(np.argmin([abs(x - c) for c in centres]))
        assert found == ("-".join(map(str, gaps.values())) if len(gaps) == 3 else None)


def test_collision_against_dense_sampling():
    rng = np.random.default_rng(0)
    paths = rng.uniform([-0.7, 0], [0.7, 1], (2000, 1, 2)) + np.cumsum(
        rng.normal(0, 0.1, (2000, 4, 2)), 1
    )
    share = np.linspace(0, 1, 1001)[:, None]
    nearest = np.empty(len(paths))
    for n, path in enumerate(paths):
        points = np.concatenate([start + share * (end - start) for start, end in pairwise(path)])
        nearest[n] = min(np.hypot(*(points - disc).T).min() for disc in DISCS)
    clear = np.abs(nearest - 0.06) > 1e-6  # samples 0.5 mm apart are off by less than that
    found = collides(paths)
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(found[clear], nearest[clear] < 0.06)
    ends_clear = (
        np.min([np.hypot(*(paths - disc).transpose(2, 0, 1)).min(1) for disc in DISCS], 0) > 0.06
    )
    assert (found & ends_clear).sum() > 50  # no corner inside, but a segment goes through
    assert found.tolist() == [collides(path[None])[0] for path in paths]


@pytest.mark.parametrize(("gap", "touches"), [(1e-4, False), (-1e-4, True)])
def test_disc_contact(gap, touches):
    reach = 0.06 + gap
    passing = [(-0.1, 0.25 - reach), (0.1, 0.25 - reach)]
    aside = np.array([0.3, 0.4]) * 2 * reach
    slanted = [
        (0.2 + aside[0] - 0.04, 0.5 + aside[1] + 0.03),
        (0.2 + aside[0] + 0.04, 0.5 + aside[1] - 0.03),
    ]
    stopping = [(-0.4, 0.6), (-0.4, 0.75 - reach)]
    leaving = [(0.4 + reach, 0.75), (0.6, 0.75)]
    still = [(0.0, 0.75 + reach)] * 2
    for path in (passing, slanted, stopping, leaving, still):
        assert collides(np.array([path])).tolist() == [touches]
        env = placed(*path[0])
        _, reward, terminated, truncated, info = env.step(path[1])
        assert (reward, terminated, truncated, info["success"]) == (0, touches, False, False)
        assert info["failure"] == ("disc" if touches else None)


def test_step_is_straight_and_limited():
    env = placed(0.05, 0)
    observation = env.step([0.05 + 3, 4])[0]["observation.state"]
    np.testing.assert_allclose(observation, [0.05 + 0.15, 0.2, 1.5, 2.0], atol=1e-6)
    observation, *rest, info = env.step([0.2, 0.18])
    np.testing.assert_allclose(observation["observation.state"], [0.2, 0.18, 0, -0.2], atol=1e-6)
    assert rest == [0, False, False]
    np.testing.assert_array_equal(info["position"], observation["observation.state"][:2])
    np.testing.assert_array_equal(
        env.step([0.2, 0.18])[0]["observation.state"], np.float32([0.2, 0.18, 0, 0])
    )
    for distance, reached in ((0.249, 0.249), (0.25, 0.25), (0.251, 0.25)):
        assert placed(0, 0).step([-distance, 0])[0]["observation.state"][0] == np.float32(-reached)


def test_finish_line():
    for y, success in ((0.949, False), (0.951, True)):
        _, reward, terminated, _, info = placed(0.2, 0.9).step([0.2, y])
        assert (reward, terminated, info["success"]) == (float(success), success, success)


def test_reset_forgets_the_last_episode():
    env, finished = placed(0, 0), []
    for points in (route((0, 1, 2)), route((0, 1, 2), shift=0.15)):
        finished.append(drive(env, points)[4])
        assert env.reset(seed=0)[1] | {"position": None} == dict.fromkeys(finished[0]) | {
            "success": False
        }
        assert len(env.path) == 1
        assert not env.step([0, 0])[4]["success"]
        env.path = np.zeros((1, 2), np.float32)
    assert [info["failure"] for info in finished] == [None, "disc"]


@pytest.mark.parametrize("limit", [None, 5])
def test_timeout(limit):
    env = placed(0, 0, **({"max_steps": limit} if limit else {}))
    for _ in range((limit or 32) - 1):
        _, _, terminated, truncated, info = env.step([0, 0])
        assert (terminated, truncated, info["failure"]) == (False, False, None)
    _, reward, terminated, truncated, info = env.step([0, 0])
    assert (reward, terminated, truncated, info["success"]) == (0, False, True, False)
    assert info["failure"] == "timeout"


@pytest.mark.parametrize(("x", "failure"), [(0.2, None), (0.4, "disc")])
def test_disc_comes_before_the_finish_and_both_before_timeout(x, failure):
    env = placed(x, 0.8, max_steps=1)
    _, reward, terminated, truncated, info = env.step([x, 1])
    assert (reward, terminated, truncated) == (float(failure is None), True, False)
    assert (info["success"], info["failure"]) == (failure is None, failure)


@pytest.mark.parametrize(
    "action", [0.5, np.zeros(3), np.zeros((1, 2)), [0, np.nan], [np.inf, 0], None]
)
def test_bad_actions_are_refused(action):
    with pytest.raises(ValueError, match="two finite numbers"):
        placed(0, 0).step(action)


def test_seed_decides_everything():
    env, other = Avoid(), AvoidSkewed()
    first, info = env.reset(seed=3)
    assert info.pop("position").tolist() == first["observation.state"][:2].tolist()
    assert info == {"success": False, "mode": None, "failure": None}
    env.step([0, 0.2])
    for again in (env.reset(seed=3)[0], other.reset(seed=3)[0]):
        np.testing.assert_array_equal(first["observation.state"], again["observation.state"])
    assert env.reset(seed=4)[0]["observation.state"][0] != first["observation.state"][0]
    assert env.reset()[0]["observation.state"][0] != env.reset()[0]["observation.state"][0]
    starts = np.array([env.reset(seed=seed)[0]["observation.state"] for seed in range(2000)])
    # At y = 0, straight ahead at the demonstrations' speed.
    assert (starts[:, 1:] == np.float32([0, 0, 0.4])).all()
    counts, _ = np.histogram(starts[:, 0], 10, (-0.1, 0.1))
    assert counts.sum() == 2000  # none outside
    assert 140 < counts.min() <= counts.max() < 260  # 200 +- 4.5 standard deviations


def test_expert_takes_every_mode_step_by_step():
    rng = np.random.default_rng(7)
    env = Avoid()
    for mode, name in enumerate(ROUTES):
        starts = [env.reset(seed=seed)[0]["observation.state"][0] for seed in range(60_000, 60_012)]
        for seed, path in enumerate(expert(np.array(starts), np.full(12, mode), rng), 60_000):
            assert path.shape == (26, 2)
            np.testing.assert_array_equal(path[0], env.reset(seed=seed)[0]["observation.state"][:2])
            for action in path[1:]:
                observation, _, terminated, _, info = env.step(action)
                np.testing.assert_array_equal(observation["observation.state"][:2], action)
                assert terminated == info["success"] == (action[1] >= np.float32(0.95))
                if terminated:
                    break
            assert (info["mode"], info["failure"]) == (name, None)


def test_expert_path_is_smoothsteps_through_noisy_gaps():
    n = 4000
    paths = expert(
        np.full(n, 0.08), np.full(n, Avoid.MODES.index("0-1-2")), np.random.default_rng(0)
    ).astype(float)
    begin, draws, pace = np.full(n, 0.08), [], []
    for y, middle in {0.25: -0.2, 0.5: 0, 0.75: 0.2, 1.0: None}.items():
        # Between knots, x = a + s (b - a) with s = 3 u^2 - 2 u^3: least squares find a and b.
        steps = np.arange(math.ceil(25 * (y - 0.25)), math.floor(25 * y) + 1)
        u = 4 * (steps / 25 - y + 0.25)
        s = 3 * u**2 - 2 * u**3
        (start, end), residual, _, _ = np.linalg.lstsq(
            np.stack([1 - s, s], 1), paths[:, steps, 0].T, rcond=None
        )
        np.testing.assert_allclose(start, begin, atol=1e-5)
        assert residual.max() < 1e-10
        draws.append(end - (begin if middle is None else middle))
        begin = end
        # y is straight between knots: so many steps before it is due, it is that share of the way.
        at = paths[:, steps[[0, -1]], 1]
        pace.append(at[:, 1] + (at[:, 1] - at[:, 0]) * (1 - u[-1]) / (u[-1] - u[0]) - y)
    np.testing.assert_allclose(np.cov(draws), np.eye(4) * 0.03**2, atol=1e-4)
    np.testing.assert_allclose(np.mean(draws, 1), 0, atol=0.002)
    np.testing.assert_allclose(np.cov(pace), np.eye(4) * 0.015**2, atol=3e-5)


def test_expert_draws_again_what_hits_or_is_too_fast(monkeypatch):
    monkeypatch.setattr(avoid, "NOISE", 0.1)
    starts, chosen = np.linspace(-0.1, 0.1, 480), np.tile(np.arange(24), 20)
    paths = expert(starts, chosen, np.random.default_rng(0)).astype(float)
    assert not collides(paths).any()
    assert np.hypot(*np.diff(paths, axis=1).transpose(2, 0, 1)).max() <= 0.25
    assert len(np.unique(paths[:, -1, 0])) == 480
    monkeypatch.setattr(avoid, "collides", lambda paths: np.zeros(len(paths), bool))
    first_draws = expert(starts, chosen, np.random.default_rng(0))
    assert collides(first_draws).any()  # there was something to draw again


def test_demonstrations_follow_from_the_seed():
    for a, b, c in zip(*(demonstrations(Avoid.COUNTS, seed) for seed in (0, 0, 1)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


@pytest.mark.parametrize("kind", [Avoid, AvoidSkewed])
def test_demonstrations_never_start_as_evaluation_does(kind):
    assert avoid.FIRST_EVALUATION_SEED == evaluate.FIRST_SEED
    for seed in (0, 1, 12345):
        seeds, chosen, paths = demonstrations(kind.COUNTS, seed)
        assert len(set(seeds.tolist())) == 960
        assert 0 <= seeds.min() < seeds.max() < 50_000
    env = kind()
    for k in range(0, 960, 60):
        assert paths[k, 0, 0] == env.reset(seed=int(seeds[k]))[0]["observation.state"][0]
    assert np.bincount(chosen).tolist() == list(kind.COUNTS)
    # Shuffled: among the last tenth, which is held out, a mode is about as frequent as everywhere.
    assert np.abs(np.bincount(chosen[-96:], minlength=24) - np.array(kind.COUNTS) / 10).max() < 10


def test_shares():
    assert Avoid.COUNTS == (40,) * 24
    total = sum(math.exp(-k / 6) for k in range(24))
    exact = [960 * math.exp(-k / 6) / total for k in range(24)]
    assert np.abs(np.array(AvoidSkewed.COUNTS) - exact).max() < 1
    assert sorted(AvoidSkewed.COUNTS, reverse=True) == list(AvoidSkewed.COUNTS)
    for kind in (Avoid, AvoidSkewed):
        assert sum(kind.COUNTS) == 960
        assert sum(kind.MODE_SHARES) == pytest.approx(1)
        np.testing.assert_allclose(kind.MODE_SHARES, np.array(kind.COUNTS) / 960)
        assert list(kind.MODES) == list(ROUTES)


def test_dataset_holds_what_the_expert_did(written):
    kind, root = written
    dataset = LeRobotDataset(root)
    assert (dataset.fps, dataset.robot_type, len(dataset.episodes), dataset.cameras) == (
        10,
        "avoid",
        960,
        [],
    )
    assert {episode.length for episode in dataset.episodes} == {25}
    columns = dataset.columns(["observation.state", "action"])
    state, action = (columns[key].reshape(960, 25, -1) for key in ("observation.state", "action"))
    seeds, _, paths = demonstrations(kind.COUNTS)
    np.testing.assert_array_equal(action, paths[:, 1:])
    labels = modes(np.concatenate([state[:, :1, :2], action], 1))
    assert [labels.tolist().count(mode) for mode in kind.MODES] == list(kind.COUNTS)
    env = kind()
    for episode in range(0, 960, 5):
        observation, _ = env.reset(seed=int(seeds[episode]))
        for k in range(25):
            np.testing.assert_array_equal(observation["observation.state"], state[episode, k])
            observation, _, done, _, info = env.step(action[episode, k])
            if done:
                break
        assert (info["success"], info["mode"]) == (True, labels[episode])


@pytest.mark.parametrize("cache", ["frames", "none"])
def test_loader_reads_it_without_cameras(written, cache):
    kind, root = written
    sizes = {
        "action_horizon": 25,
        "obs_proprio_history": 2,
        "batch_size": 64,
        "num_workers": 0,
        "cache": cache,
    }
    data = Data(Settings(root=str(root), cameras={}, HZ=10.0, **sizes))
    if cache == "frames":
        data.cache_frames()  # of no camera
    assert (len(data.windows), len(data.train_rows), data.val_episodes) == (
        24_000,
        21_600,
        list(range(864, 960)),
    )
    assert (data.facts["action_dim"], data.facts["state_dim"], data.facts["num_cameras"]) == (
        2,
        4,
        0,
    )
    paths = demonstrations(kind.COUNTS)[2]
    # The first moment of each episode: its whole path in one chunk.
    sample = data.windows[np.arange(0, 24_000, 25)]
    np.testing.assert_array_equal(sample["action"], paths[:, 1:])
    assert not sample["action_is_pad"].any()
    expected = np.concatenate([paths[:, :1], np.tile(np.float32([0, 0.4]), (960, 1, 1))], -1)
    np.testing.assert_array_equal(sample["observation.state"], np.repeat(expected, 2, 1))
    later = data.windows[np.arange(10, 24_000, 25)]
    np.testing.assert_array_equal(later["observation.state"][..., :2], paths[:, 9:11])
    speed = (paths[:, 10].astype(float) - paths[:, 9]) / 0.1
    np.testing.assert_allclose(later["observation.state"][:, 1, 2:], speed, atol=1e-5)
    assert later["action_is_pad"].sum(1).tolist() == [10] * 960
    assert next(iter(data.batches(0, 1, 0, 1, False)))["action"].shape == (64, 25, 2)


def test_writing_again_gives_the_same_files(written, tmp_path):
    kind, root = written
    (generate if kind is Avoid else generate_skewed)(tmp_path / "again")
    files = [path.relative_to(root) for path in root.rglob("*.*")]
    assert len(files) == 5
    for file in files:
        assert (root / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@pytest.mark.parametrize(("kind", "write"), [(Avoid, generate), (AvoidSkewed, generate_skewed)])
def test_another_seed_gives_other_demonstrations(tmp_path, monkeypatch, kind, write):
    monkeypatch.setattr(kind, "COUNTS", (1,) * 24)
    write(tmp_path / "demos", 3)
    action = LeRobotDataset(tmp_path / "demos").columns(["action"])["action"]
    np.testing.assert_array_equal(action.reshape(24, 25, 2), demonstrations((1,) * 24, 3)[2][:, 1:])


def test_picture_shows_discs_goal_and_the_way():
    env = placed(0, 0)
    drive(env, route((1, 2, 3))[1:5])
    picture = env.render()
    height, width, channels = picture.shape
    assert (picture.dtype, height % 2, width % 2, channels) == (np.uint8, 0, 0, 3)

    def pixel(x, y):  # x from -0.8 to 0.8, y from -0.1 below to 1.1 above
        return picture[int((1.1 - y) / 1.2 * height), int((x + 0.8) / 1.6 * width)].tolist()

    inside = 0.9 * 0.06
    for x, y in DISCS:
        for dx, dy in product((-0.7, 0, 0.7), repeat=2):
            assert pixel(x + dx * inside, y + dy * inside) == list(avoid.DISC)
            assert pixel(x + 1.15 * 0.06, y) == pixel(x, y - 1.15 * 0.06) == list(avoid.BACKGROUND)
    for x in (-0.7, 0, 0.7):
        assert pixel(x, 0.96) == pixel(x, 1.05) == list(avoid.GOAL)
        assert pixel(x, 0.94) == list(avoid.BACKGROUND)
    for x, y in ((0.2, 0.2), (0.2, 0.3), (0.4, 0.5)):
        assert pixel(x, y) == list(avoid.PATH)
    assert pixel(*env.path[-1]) == list(avoid.ROBOT)
