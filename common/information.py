"""How much each transition contributes to I(S; A), from nearest neighbours in two latent spaces; the best episodes.

After Hejna et al. 2025 (arXiv:2502.08623): a demonstration is worth keeping where what it does follows from what it
sees, and what it sees is not what all the others see.
"""

import hashlib

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from tqdm import tqdm

from common.config import DataError
from common.data.scores import COLUMNS
from common.noise import seed_of

ACTIVE = 0.01  # variance of its mean over the data above which a latent dimension is used (arXiv:1509.00519, 5.2)
SAME = 1e-5  # distance below which two points are one, of points whose total variance is 1


def ksg(s: Tensor, a: Tensor, episode: Tensor, time: Tensor, k=(5, 6, 7), window=0.0) -> Tensor:
    """s (N, D), a (N, E), episode (N,), time (N,) in s -> contribution of each point to I(S; A), (N,) nats, float64.

    c_i = -mean over k of psi(n_s + 1) + psi(n_a + 1), where n_s and n_a count the points nearer than the k-th
    neighbour in max(d_s, d_a): the first estimator of Kraskov et al. 2004 (arXiv:cond-mat/0305641, eq. 8), whose
    I(S; A) is mean psi(k) + psi(N) + mean c_i. Unlike there, points of the same episode within `window` seconds, the
    point itself among them, are no neighbours: what follows each other is alike, whatever is done. Where the k-th
    neighbour is the same point, k is how many are the same (Gao et al. 2017, arXiv:1709.06212, algorithm 1): to wait
    where all wait is worth little. Raises DataError where fewer than k neighbours are left.
    """
    close = own(episode, time, max(k), window)
    with torch.autocast(s.device.type, enabled=False):
        # Not by way of a matrix product, which in float32 loses the short distances.
        exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}
        d_s, d_a = (torch.cdist(x.float(), x.float(), **exact) for x in (s, a))
    d_s, d_a = (d.masked_fill_(close, torch.inf) for d in (d_s, d_a))
    joint, total = torch.maximum(d_s, d_a), 0.0
    reach, same = joint.topk(max(k), largest=False).values.clamp(min=SAME), (joint < SAME).sum(1)
    psi = torch.arange(
        1, len(s) + 1, dtype=torch.float64, device=s.device
    ).digamma()  # psi[n] is psi(n + 1)
    for i in k:
        total += psi[same.clamp(min=i) - 1] - psi[i - 1]
        total -= sum(psi[(d < reach[:, i - 1, None]).sum(1)] for d in (d_s, d_a))
    return total / len(k)


def own(episode: Tensor, time: Tensor, k, window) -> Tensor:
    """Pairs (N, N) of the same episode within `window` seconds. Raises DataError where less than k others are left."""
    close = (episode[:, None] == episode) & ((time[:, None] - time).abs() <= window + 1e-6)
    if (left := int((~close).sum(1).min())) < k:
        raise DataError(
            f"too few transitions for k = {k}: among {len(time)} one has {left} neighbours that are not of its own "
            f"episode within {window:g} s; give more episodes, or lower scoring.k or scoring.window"
        )
    return close


def deal(transitions, scoring, seed):
    """Rows of each batch of each shuffle: scoring.batch or more, as the rest of the division is spread over them."""
    for shuffle in range(scoring.shuffles):
        order = np.random.default_rng(seed_of("score", seed, shuffle)).permutation(transitions)
        yield from map(
            torch.from_numpy, np.array_split(order, max(transitions // scoring.batch, 1))
        )


def places(windows) -> tuple[np.ndarray, np.ndarray]:
    """Of each transition the number of its episode and the time in it, in s."""
    step = np.arange(len(windows)) - windows.first[windows.episode]
    return windows.episode_index[windows.episode], step / windows.cfg.HZ


def contributions(
    s: Tensor, a: Tensor, episode: np.ndarray, time: np.ndarray, scoring, seed
) -> tuple[np.ndarray, float]:
    """Points s (N, D), a (N, E) of all transitions -> the contribution of each (N,), and I(S; A), in nats.

    Within shuffled batches (see deal), averaged over scoring.shuffles shuffles. The same seed gives the same bits.
    Raises DataError where these are too few for k.
    """
    place = [torch.from_numpy(x).to(s.device) for x in (episode, time)]
    total, k, nats = torch.zeros(len(s), dtype=torch.float64), scoring.k, []
    for rows in tqdm([*deal(len(s), scoring, seed)], desc="neighbours", unit="batch"):
        found = ksg(*(x[rows.to(s.device)] for x in (s, a, *place)), k, scoring.window).cpu()
        total[rows] += found / scoring.shuffles
        psi = torch.tensor([len(rows), *k], dtype=torch.float64).digamma()
        nats.append((found.mean() + psi[0] + psi[1:].mean()).item())
    return total.numpy(), float(np.mean(nats))


def metric(mu: Tensor, logvar: Tensor, name: str, least) -> Tensor:
    """Means and log variances (N, D) of a VAE's posteriors -> points (N, D) whose distances compare transitions.

    Each dimension in units of its posteriors' deviation, which is as finely as the decoder reads it: a dimension that
    says little counts little, where one of unit variance would count like all others. Then both latents get a total
    variance of 1. Raises DataError where fewer dimensions are active than `least`, or than there are: a collapsed
    latent, which is all noise.
    """
    spread = mu.var(0)
    active = int((spread > ACTIVE).sum())
    if active < min(least, mu.shape[1]):
        raise DataError(
            f"the {name} latent has collapsed: {active} of {mu.shape[1]} dimensions are active (variance of their "
            f"means above {ACTIVE}; the largest is {spread.max():.2g}); train longer, or lower loss.{name}_beta"
        )
    points = mu / logvar.exp().mean(0).sqrt()
    return points / points.var(0).sum().sqrt()


def rank(values: np.ndarray, episode: np.ndarray, listed=None) -> pa.Table:
    """Contributions (N,) of transitions and the episode of each -> a row per episode, the best first.

    Clipped to the 1st and 99th percentile, standardised; an episode's score is the mean over its transitions, its
    quantile the share of episodes that score no more. listed: the episodes that get a row; None: all.
    """
    values = np.clip(values, *np.quantile(values, [0.01, 0.99]))
    values = (values - values.mean()) / max(values.std(), 1e-12)
    episodes, place, transitions = np.unique(episode, return_inverse=True, return_counts=True)
    score = np.bincount(place, values) / transitions
    chosen = np.isin(episodes, episodes if listed is None else listed)
    episodes, transitions, score = (x[chosen] for x in (episodes, transitions, score))
    best = np.lexsort((episodes, -score))
    quantile = np.searchsorted(np.sort(score), score, side="right") / len(score)
    return pa.table(
        dict(zip(COLUMNS, (x[best] for x in (episodes, transitions, score, quantile)), strict=True))
    )


def look_over(windows, scoring, seed):
    """Raises DataError where neighbours would say nothing: episodes that are copies, actions that never change, or
    too few transitions for scoring.k."""
    same, action = {}, windows.action
    if (
        np.ptp(action, axis=0) <= 1e-5 * np.abs(action).max(0)
    ).all():  # resampling leaves rounding errors
        raise DataError(
            f"data.action_key: {windows.cfg.action_key} never changes in {len(windows.first)} episodes: all alike"
        )
    for number, first, last in zip(
        windows.episode_index.tolist(), windows.first, windows.last, strict=True
    ):
        rows = slice(first, last + 1)
        content = hashlib.sha256(windows.state[rows].tobytes() + action[rows].tobytes()).digest()
        same.setdefault(content, []).append(number)
    if copies := [numbers for numbers in same.values() if len(numbers) > 1]:
        raise DataError(
            f"episodes {', '.join(map(str, copies))} are copies of each other, and copies score too well: leave "
            f"{sorted(number for numbers in copies for number in numbers[1:])} out with data.episodes"
        )
    episode, time = map(torch.from_numpy, places(windows))
    for rows in deal(len(windows), scoring, seed):
        own(episode[rows], time[rows], max(scoring.k), scoring.window)
