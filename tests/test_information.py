"""Contributions to mutual information against closed forms and SciPy's trees; ranks, and which episodes are kept."""

import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import write_demos
from scipy.spatial import cKDTree
from scipy.special import digamma
from torch.nn import functional as F

from common import information
from common.config import DataError, UserError
from common.data import scores
from common.data.lerobot import LeRobotDataset
from common.metrics import auc

SCORING = SimpleNamespace(k=[5, 6, 7], batch=100, shuffles=4, window=0.0)


def gaussians(rho, n, d=1, seed=0):
    """n points of two d-dimensional Gaussians, correlated component by component."""
    x, noise = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed))
    return x, rho * x + (1 - rho**2) ** 0.5 * noise


def apart(n):
    """Each point an episode of its own."""
    return torch.arange(n), torch.zeros(n)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_information_of_correlated_gaussians_is_that_of_the_formula(rho):
    n, k = 1024, (5, 6, 7)
    found = [
        information.ksg(*gaussians(rho, n, seed=seed), *apart(n), k).mean().item()
        for seed in range(8)
    ]
    found = np.mean(found) + np.mean(digamma(k)) + digamma(n)
    assert found == pytest.approx(-0.5 * np.log(1 - rho**2), abs=0.05)


@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize(("rho", "offset"), [(0.0, 0), (0.9, 0), (0.9, 200)])
def test_every_point_is_that_of_scipy_s_trees(d, rho, offset):
    s, a = (x + offset for x in gaussians(rho, 1024, d))
    expected, points, trees = np.zeros(1024), [x.double().numpy() for x in (s, a)], []
    joint = np.zeros((1024, 1024))
    for x in points:
        trees.append(cKDTree(x))
        distance, neighbour = trees[-1].query(x, 1024)
        by_point = np.empty_like(joint)
        np.put_along_axis(by_point, neighbour, distance, 1)
        joint = np.maximum(joint, by_point)
    for k in (5, 6, 7):
        reach = np.sort(joint, 1)[:, k]  # the first is the point itself
        inside = [
            tree.query_ball_point(x, reach * (1 - 1e-9), return_length=True)
            for tree, x in zip(trees, points, strict=True)
        ]
        expected -= (
            sum(digamma(number) for number in inside) / 3
        )  # of n + 1, the point itself being one of them
    np.testing.assert_allclose(information.ksg(s, a, *apart(1024)).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("noise", [0, 1e-7])
def test_points_that_are_the_same_are_worth_as_much_as_they_are_rare(noise):
    """I(S; A) of an atom of mass p in both is -p log p, and of each of its points -log p."""
    n, share = 1000, 0.3  # of points that are far from the others
    s, a = torch.randn(2, n, 1, generator=torch.Generator().manual_seed(0))
    s[:300], a[:300] = 9, -9
    found = information.ksg(
        s + noise * torch.randn(n, 1), a + noise * torch.randn(n, 1), *apart(n), (5, 6, 7)
    )
    nats = found + np.mean(digamma((5, 6, 7))) + digamma(n)
    torch.testing.assert_close(
        nats[:300], torch.full((300,), -np.log(share), dtype=torch.float64), atol=0.02, rtol=0
    )
    assert nats[300:].mean().item() == pytest.approx(
        -np.log(1 - share), abs=0.05
    )  # the others: independent


def test_neighbours_in_time_do_not_count():
    s, a = gaussians(0.7, 60, 2)
    episode, time = torch.arange(60) // 20, torch.from_numpy(np.arange(60) % 20 / 10)
    found = information.ksg(s, a, episode, time, (2, 4), window=0.5)
    for i in range(60):
        others = [j for j in range(60) if episode[j] != episode[i] or abs(i - j) > 5]
        d_s, d_a = ([(x[i] - x[j]).norm().item() for j in others] for x in (s, a))
        total = 0.0
        for k in (2, 4):
            reach = sorted(map(max, d_s, d_a))[k - 1]
            total += sum(digamma(sum(near < reach for near in d) + 1) for d in (d_s, d_a))
        assert found[i].item() == pytest.approx(-total / 2, abs=1e-9)


def test_too_few_transitions_for_k():
    s, a = gaussians(0.5, 30)
    with pytest.raises(
        DataError, match=r"too few transitions for k = 7.* among 7 one has 6 neighbours"
    ):
        information.ksg(s[:7], a[:7], *apart(7))
    assert information.ksg(s[:8], a[:8], *apart(8)).isfinite().all()
    with pytest.raises(DataError, match=r"k = 7: among 30 one has 0 neighbours .* within 3 s"):
        information.ksg(s, a, torch.zeros(30), torch.arange(30) / 10, window=3.0)


def test_contributions_repeat_and_use_every_transition_in_bounded_batches(monkeypatch):
    s, a = gaussians(0.9, 1050)
    sizes, ksg = [], information.ksg

    def watched(s, *rest):
        sizes.append(len(s))
        return ksg(s, *rest)

    monkeypatch.setattr(information, "ksg", watched)
    place = np.arange(1050), np.zeros(1050)
    values, nats = information.contributions(s, a, *place, SCORING, seed=0)
    assert sizes == [105] * 40
    assert np.isfinite(values).all()
    assert (values != 0).all()
    assert nats == pytest.approx(-0.5 * np.log(1 - 0.81), abs=0.1)
    again, _ = information.contributions(s, a, *place, SCORING, seed=0)
    assert again.tobytes() == values.tobytes()
    other, _ = information.contributions(s, a, *place, SCORING, seed=1)
    assert 0.5 < np.corrcoef(values, other)[0, 1] < 0.9999
    once = [
        information.contributions(
            s, a, *place, SimpleNamespace(**{**vars(SCORING), "shuffles": 1}), seed=0
        )[0]
    ]
    assert (
        np.corrcoef(values, other)[0, 1] > np.corrcoef(once[0], other)[0, 1]
    )  # shuffles are averaged


def test_distances_are_in_units_of_the_posteriors_deviation():
    mu, deviation = 3 + torch.randn(400, 4), torch.tensor([0.1, 0.5, 1.0, 1.0])
    spread = (
        1 + 0.9 * torch.linspace(-1, 1, 400)[:, None]
    )  # of the variances over the samples: their mean counts
    points = information.latent_points(mu, (deviation**2 * spread).log(), "state", 3)
    assert points.var(0).sum().item() == pytest.approx(1, abs=1e-5)
    expected = ((mu[0] - mu[1]) / deviation).norm() / ((mu[2] - mu[3]) / deviation).norm()
    assert (
        (points[0] - points[1]).norm() / (points[2] - points[3]).norm()
    ).item() == pytest.approx(expected.item(), rel=1e-4)
    dead = torch.cat([mu, 1e-3 * torch.randn(400, 9)], 1)  # posteriors that are the prior
    logvar = torch.cat([(deviation**2).log().expand(400, 4), torch.zeros(400, 9)], 1)
    more = information.latent_points(dead, logvar, "state", 3)
    torch.testing.assert_close(F.pdist(more), F.pdist(points), atol=1e-3, rtol=1e-2)


def test_a_collapsed_latent_is_said_so():
    alive, dead = torch.randn(50, 2), 1e-3 * torch.randn(50, 3)
    with pytest.raises(
        DataError, match=r"the action latent has collapsed: 2 of 5 dimensions.*loss.action_beta"
    ):
        information.latent_points(torch.cat([alive, dead], 1), torch.zeros(50, 5), "action", 3)
    assert information.latent_points(alive, torch.zeros(50, 2), "action", 3).shape == (
        50,
        2,
    )  # there are no more
    assert information.latent_points(
        torch.cat([alive, dead], 1), torch.zeros(50, 5), "action", 2
    ).shape == (50, 5)


def test_auc_is_the_share_of_pairs_in_order():
    good, poor = [3, 1, 2], [2, 0]
    assert auc(good, poor) == np.mean([1, 1, 0, 1, 0.5, 1])
    assert auc(poor, good) == 1 - auc(good, poor)


def test_rank():
    episode, values = np.repeat([4, 2, 9], [30, 40, 30]), np.random.default_rng(0).normal(size=100)
    values[:30] += 1
    values[0] = 1e6  # clipped
    table = information.rank(values, episode).to_pydict()
    low, high = np.percentile(values, [1, 99])
    z = np.minimum(np.maximum(values, low), high)
    z = (z - z.mean()) / z.std()
    means = {e: z[episode == e].mean() for e in (4, 2, 9)}
    order = sorted(means, key=means.get, reverse=True)
    assert order[0] == 4
    assert table["episode"] == order
    assert table["transitions"] == [{4: 30, 2: 40, 9: 30}[e] for e in order]
    np.testing.assert_allclose(table["score"], [means[e] for e in order])
    np.testing.assert_allclose(table["quantile"], [1, 2 / 3, 1 / 3])
    some = information.rank(values, episode, [2, 4]).to_pydict()
    assert some["score"] == [
        score for score, number in zip(table["score"], order, strict=True) if number != 9
    ]
    np.testing.assert_allclose(some["quantile"], [1, 1 / 2])


@pytest.fixture
def scored(demos, tmp_path):
    """(dataset, scores.parquet of it): episode 3 is the best, then 0, 4, 1, 5, 2."""
    dataset, best = LeRobotDataset(demos), [3, 0, 4, 1, 5, 2]
    values = np.linspace(1, -1, 6)
    table = pa.table({"episode": best, "transitions": [9] * 6, "score": values, "quantile": values})
    scores.save_scores(table, tmp_path / "scores.parquet", dataset)
    return dataset, tmp_path / "scores.parquet"


@pytest.mark.parametrize(
    ("share", "episodes", "kept"),
    [
        (0.5, range(6), [0, 3, 4]),
        (1.0, range(6), [0, 1, 2, 3, 4, 5]),
        (0.5, [1, 2, 5], [1, 5]),
        (0.01, [5, 2], [5]),
    ],
)
def test_the_best_are_kept(scored, share, episodes, kept, tmp_path, capsys):
    dataset, file = scored
    assert scores.best_episodes(file, share, dataset, episodes) == kept
    assert f"keeps {len(kept)} of {len(episodes)} training episodes" in capsys.readouterr().out
    shutil.copytree(dataset.root, tmp_path / "elsewhere")
    assert (
        scores.best_episodes(file, share, LeRobotDataset(tmp_path / "elsewhere"), episodes) == kept
    )


def test_of_equals_the_first_is_kept(scored):
    dataset, file = scored
    table = pq.read_table(file)
    table = table.set_column(table.column_names.index("score"), "score", pa.array(np.zeros(6)))
    scores.save_scores(table, file, dataset)
    assert scores.best_episodes(file, 0.5, dataset, [5, 4, 3, 2, 1, 0]) == [0, 1, 2]


def test_no_task_is_lost(scored, capsys):
    dataset, file = scored
    for episode in dataset.episodes:
        episode.tasks = ["pull"] if episode.index in (2, 5) else ["push"]
    assert scores.best_episodes(file, 0.3, dataset, range(6)) == [0, 3, 5]
    assert (
        "keeps 3 of 6 training episodes, 1 of them only because a task" in capsys.readouterr().out
    )


def test_scores_that_do_not_fit(scored, tmp_path):
    dataset, file = scored
    with pytest.raises(UserError, match=r"data.scores: .*gone.parquet: no such file"):
        scores.best_episodes(tmp_path / "gone.parquet", 0.5, dataset, range(6))
    with pytest.raises(UserError, match=r"is a folder, give its scores.parquet"):
        scores.best_episodes(tmp_path, 0.5, dataset, range(6))
    other = LeRobotDataset(write_demos(tmp_path / "other", seed=1))
    with pytest.raises(
        DataError, match=rf"is of another dataset than {other.root}.*{dataset.values_key}"
    ):
        scores.best_episodes(file, 0.5, other, range(6))
    scores.save_scores(pq.read_table(file)[:4], file, dataset)
    with pytest.raises(
        DataError, match=r"no score for 2 training episodes, the first of them \[2, 5\]"
    ):
        scores.best_episodes(file, 0.5, dataset, range(6))
    scores.save_scores(pq.read_table(file).drop("score"), file, dataset)
    with pytest.raises(DataError, match="no column 'score'"):
        scores.best_episodes(file, 0.5, dataset, range(6))
    file.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read"):
        scores.best_episodes(file, 0.5, dataset, range(6))
