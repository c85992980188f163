"""The contribution of each transition to I(S; A), by nearest neighbours in two latent spaces.

After Hejna et al. 2025 (arXiv:2502.08623): a demonstration is worth keeping if its actions follow
from its states, and its states differ from those of the other demonstrations.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from common.config import DataError
from common.data.scores import COLUMNS
from common.data.windows import Windows
from common.noise import seed_of
from common.progress import progress

# A latent dimension is active if its mean varies more than this (arXiv:1509.00519, 5.2).
ACTIVE = 0.01
SAME = 1e-5  # distance below which two points are one, of points whose total variance is 1


def ksg(
    s: Tensor,
    a: Tensor,
    episode: Tensor,
    time: Tensor,
    k: Sequence[int] = (5, 6, 7),
    window: float = 0.0,
) -> Tensor:
    """Contribution of each point to I(S; A), (N,) in nats, float64.

    s (N, D), a (N, E), episode (N,), time (N,) in s.

    c_i = -mean over k of psi(n_s + 1) + psi(n_a + 1), where n_s and n_a count the points nearer
    than the k-th neighbour in max(d_s, d_a): the first estimator of Kraskov et al. 2004
    (arXiv:cond-mat/0305641, eq. 8), whose I(S; A) is mean psi(k) + psi(N) + mean c_i. Unlike there,
    points of the same episode within `window` seconds, the point itself among them, are no
    neighbours: consecutive transitions are alike, whatever the policy. If the k-th neighbour is the
    same point, k is the number of points that are the same (Gao et al. 2017, arXiv:1709.06212,
    algorithm 1): waiting is worth little if all demonstrations wait. Raises DataError if fewer than
    k neighbours are left.
    """
    excluded = same_moment(episode, time, max(k), window)
    d_s = distances(s, excluded)
    d_a = distances(a, excluded)
    joint = torch.maximum(d_s, d_a)
    same = (joint < SAME).sum(1)
    reach = joint.topk(max(k), largest=False).values.clamp(min=SAME)
    numbers = torch.arange(1, len(s) + 1, dtype=torch.float64, device=s.device)
    psi = numbers.digamma()  # psi[n] is psi(n + 1)
    total = torch.zeros_like(psi)
    for i in k:
        total += psi[same.clamp(min=i) - 1] - psi[i - 1]
        nearer = reach[:, i - 1, None]
        total -= psi[(d_s < nearer).sum(1)] + psi[(d_a < nearer).sum(1)]
    return total / len(k)


def distances(x: Tensor, excluded: Tensor) -> Tensor:
    """Distances (N, N) of points (N, D), infinite for the excluded pairs.

    A matrix product in float32, or in the precision of autocast, would lose the short distances.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return d.masked_fill_(excluded, torch.inf)


def same_moment(episode: Tensor, time: Tensor, k: int, window: float) -> Tensor:
    """Pairs (N, N) of one episode within `window` s. Raises DataError if k others are not left."""
    close = (time[:, None] - time).abs() <= window + 1e-6
    close &= episode[:, None] == episode
    left = int((~close).sum(1).min())
    if left < k:
        raise DataError(
            f"too few transitions for k = {k}: among {len(time)} one has {left} neighbours that "
            f"are not of its own episode within {window:g} s; give more episodes, or lower "
            "scoring.k or scoring.window"
        )
    return close


def shuffled_batches(transitions: int, scoring: Any, seed: int) -> Iterator[Tensor]:
    """Rows of each batch of each shuffle: scoring.batch or more, as no remainder is dropped."""
    count = max(transitions // scoring.batch, 1)
    for shuffle in range(scoring.shuffles):
        order = np.random.default_rng(seed_of("score", seed, shuffle)).permutation(transitions)
        for rows in np.array_split(order, count):
            yield torch.from_numpy(rows)


def contributions(
    s: Tensor, a: Tensor, episode: np.ndarray, time: np.ndarray, scoring: Any, seed: int
) -> tuple[np.ndarray, float]:
    """Points s (N, D), a (N, E) of transitions -> contributions (N,) and I(S; A), in nats.

    Neighbours are those within a shuffled batch; results are means over scoring.shuffles shuffles.
    The same seed gives the same bits. Raises DataError if a batch has too few neighbours for k.
    """
    episodes = torch.from_numpy(episode).to(s.device)
    times = torch.from_numpy(time).to(s.device)
    k = scoring.k
    total = torch.zeros(len(s), dtype=torch.float64)
    nats = []
    batches = list(shuffled_batches(len(s), scoring, seed))
    for rows in progress(batches, desc="neighbours", unit="batch"):
        there = rows.to(s.device)
        found = ksg(s[there], a[there], episodes[there], times[there], k, scoring.window).cpu()
        total[rows] += found / scoring.shuffles
        psi = torch.tensor([len(rows), *k], dtype=torch.float64).digamma()
        nats.append((found.mean() + psi[0] + psi[1:].mean()).item())
    return total.numpy(), float(np.mean(nats))


def latent_points(mu: Tensor, logvar: Tensor, name: str, least: int) -> Tensor:
    """Means, log variances (N, D) of posteriors -> points (N, D) to measure distances between.

    Each dimension is in units of its posteriors' deviation, the resolution at which the decoder
    reads it: a dimension that carries little information counts little, while unit variance would
    make all count alike. The points' total variance is 1. Raises DataError if the latent has
    collapsed to noise: fewer dimensions are active than `least`, or than there are.
    """
    spread = mu.var(0)
    active = int((spread > ACTIVE).sum())
    if active < min(least, mu.shape[1]):
        raise DataError(
            f"the {name} latent has collapsed: {active} of {mu.shape[1]} dimensions are active "
            f"(variance of their means above {ACTIVE}; the largest is {spread.max():.2g}); train "
            f"longer, or lower loss.{name}_beta"
        )
    points = mu / logvar.exp().mean(0).sqrt()
    return points / points.var(0).sum().sqrt()


def rank(values: np.ndarray, episode: np.ndarray, listed: Sequence[int] | None = None) -> pa.Table:
    """Contributions (N,) of transitions, the episode of each -> a row per episode, the best first.

    Contributions are clipped to the 1st and 99th percentile and standardised; an episode's score is
    the mean over its transitions, its quantile the share of episodes that score no more. listed:
    the episodes that get a row; None: all.
    """
    values = np.clip(values, *np.quantile(values, [0.01, 0.99]))
    values = (values - values.mean()) / max(values.std(), 1e-12)
    episodes, position, transitions = np.unique(episode, return_inverse=True, return_counts=True)
    score = np.bincount(position, values) / transitions
    if listed is not None:
        chosen = np.isin(episodes, listed)
        episodes = episodes[chosen]
        transitions = transitions[chosen]
        score = score[chosen]
    quantile = np.searchsorted(np.sort(score), score, side="right") / len(score)
    best_first = np.lexsort((episodes, -score))
    columns = (episodes, transitions, score, quantile)
    return pa.table([column[best_first] for column in columns], names=COLUMNS)


def check_scorable(windows: Windows, scoring: Any, seed: int) -> None:
    """Raises DataError if actions never change, episodes are copies, or transitions are too few."""
    action = windows.action
    noise = 1e-5 * np.abs(action).max(0)  # resampling leaves rounding errors
    if (np.ptp(action, axis=0) <= noise).all():
        raise DataError(
            f"data.action_key: {windows.cfg.action_key} never changes in {len(windows.first)} "
            "episodes: all alike"
        )
    copies = copied_episodes(windows)
    if copies:
        superfluous = sorted(number for numbers in copies for number in numbers[1:])
        raise DataError(
            f"episodes {', '.join(map(str, copies))} are copies of each other, and copies score "
            f"too well: leave {superfluous} out with data.episodes"
        )
    episode = torch.from_numpy(windows.episode_index)
    time = torch.from_numpy(windows.time)
    for rows in shuffled_batches(len(windows), scoring, seed):
        same_moment(episode[rows], time[rows], max(scoring.k), scoring.window)


def copied_episodes(windows: Windows) -> list[list[int]]:
    """Groups of two or more episodes with the same states and actions."""
    groups = {}
    for first, last in zip(windows.first, windows.last, strict=True):
        rows = slice(first, last + 1)
        content = windows.state[rows].tobytes() + windows.action[rows].tobytes()
        digest = hashlib.sha256(content).digest()
        groups.setdefault(digest, []).append(int(windows.episode_index[first]))
    return [numbers for numbers in groups.values() if len(numbers) > 1]
