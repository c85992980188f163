"""Demonstrations of mixed quality: a third is worse, as `quality` says, and all are successful."""

import numpy as np
import pytest

from common.data.lerobot import LeRobotDataset
from common.envs import avoid, mixed, tabletop


def episodes_of(root):
    """[(quality, state, action)] as the dataset has them."""
    dataset, keys = LeRobotDataset(root), ("observation.state", "action", "quality")
    columns = [columns for _, columns in dataset.read(keys, dataset.episodes)]
    assert all(len(np.unique(c["quality"])) == 1 for c in columns)
    return [
        (mixed.QUALITIES[int(c["quality"][0, 0])], c["observation.state"], c["action"])
        for c in columns
    ]


@pytest.fixture(scope="module")
def avoided(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed") / "demos"
    mixed.generate_avoid(root)
    return episodes_of(root)


def test_a_third_is_worse_and_the_rest_untouched(avoided):
    qualities = [quality for quality, *_ in avoided]
    assert [qualities.count(quality) for quality in mixed.QUALITIES] == [642, 106, 106, 106]
    assert len(set(qualities[:20])) > 2  # in no order
    paths = avoid.demonstrations(avoid.Avoid.COUNTS)[2]
    for (quality, _, action), path in zip(avoided, paths, strict=True):
        assert (np.array_equal(action, path[1:])) == (quality == "expert")


def test_every_avoid_demonstration_succeeds(avoided):
    """Carried out in the environment, which an evaluation gives 32 steps for."""
    for _, state, action in avoided[::4]:
        env = avoid.Avoid(max_steps=50)
        env.reset(seed=0)
        env.path = state[:1, :2].copy()
        for k, target in enumerate(action):
            np.testing.assert_allclose(state[k, :2], env.path[-1], atol=1e-6)
            _, _, done, _, info = env.step(target)
            if done:
                break
        assert info["success"]


def test_each_kind_is_what_it_says(avoided):
    def of(quality):
        return [action for kind, _, action in avoided if kind == quality]

    def roughness(action):
        return np.abs(np.diff(action, 2, axis=0)).mean()

    def standing(action):
        return (np.hypot(*np.diff(action, axis=0).T) < 1e-6).sum()

    assert min(map(roughness, of("jittered"))) > 2 * np.median([*map(roughness, of("expert"))])
    assert {len(action) for action in of("expert") + of("jittered")} == {25}
    assert {standing(action) for action in of("paused")} <= set(range(10, 19))
    moving = of("expert") + of("detoured")
    assert max(standing(action) for action in moving) <= 1  # where a detour turns
    lengths = {
        quality: np.mean([np.hypot(*np.diff(a, axis=0).T).sum() for a in of(quality)])
        for quality in mixed.QUALITIES
    }
    assert lengths["paused"] == pytest.approx(lengths["expert"], rel=0.05)
    assert lengths["expert"] + 2 * 0.2 * 0.7 < lengths["detoured"] < lengths["expert"] + 2 * 0.2


def test_a_disturbance_starts_and_ends_where_the_expert_was():
    targets = np.cumsum(np.ones((40, 2, 2)), 0)
    for quality in (2, 3):
        moved, step = mixed.disturb(targets, quality, np.random.default_rng(0), reach=0.2)
        assert len(moved) == len(step) > 48
        assert set(step) == set(range(40))
        np.testing.assert_array_equal(np.sort(step), step)
        off = np.hypot(*(moved - targets[step]).reshape(-1, 2).T)
        assert (off.max() == 0) if quality == 2 else (0.13 < off.max() <= 0.2)
        np.testing.assert_allclose(moved[[0, -1]], targets[[0, -1]])


@pytest.mark.slow
def test_tabletop_s_demonstrations_succeed_and_repeat(tmp_path):
    mixed.generate_tabletop(tmp_path / "demos", episodes=9, image_size=(32, 32))
    made = episodes_of(tmp_path / "demos")
    assert sorted(quality for quality, *_ in made) == sorted(
        ["expert"] * 6 + ["jittered", "paused", "detoured"]
    )
    expert = [
        tabletop.demonstrate(seed, tabletop.Tabletop, (32, 32), render=False) for seed in range(9)
    ]
    for seed, (quality, state, action) in enumerate(made):
        assert np.array_equal(action, expert[seed]["action"]) == (quality == "expert")
        again = tabletop.demonstrate(seed, tabletop.Tabletop, (32, 32), action, render=False)
        np.testing.assert_array_equal(again["observation.state"], state)  # None if it had failed
