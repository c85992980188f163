"""Measures of an evaluation. `counts` are successes per mode, of every mode, zeros included."""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.data.loader import to_device
from common.data.windows import Windows
from common.noise import RowNoise
from common.policy import ActionPolicy
from common.progress import progress


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    z = 1.959963984540054
    p = successes / n
    spread = z * z / n
    half = z * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    low = (p + spread / 2 - half) / (1 + spread)
    high = (p + spread / 2 + half) / (1 + spread)
    return max(low, 0.0), min(high, 1.0)


def entropy(counts: Sequence[int]) -> float | None:
    """Entropy of the modes as a share of its maximum, log of their number; None: no success."""
    p = np.array(counts) / max(sum(counts), 1)
    if not p.any() or len(p) < 2:
        return None
    taken = p[p > 0]
    return abs(float((taken * np.log(taken)).sum()) / math.log(len(p)))


def coverage(counts: Sequence[int]) -> float:
    """Share of the modes that were taken at least once."""
    return float(np.mean(np.array(counts) > 0))


def kl(counts: Sequence[int], shares: Sequence[float]) -> float | None:
    """KL(modes of the successes || shares of the demonstrations) in nats.

    None without a success, or where a mode is taken that the demonstrations lack.
    """
    p = np.array(counts) / max(sum(counts), 1)
    q = np.array(shares, float)
    taken = p > 0
    if not p.any() or (q[taken] == 0).any():
        return None
    return float((p[taken] * np.log(p[taken] / q[taken])).sum())


def information(table: Any) -> float | None:
    """Mutual information of rows and columns of a table of counts, as a share of its maximum.

    The maximum is the log of the shorter side. None without counts.
    """
    joint = np.array(table, float) / max(np.sum(table), 1e-12)
    some = joint > 0
    if not some.any() or min(joint.shape) < 2:
        return None
    expected = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    nats = float((joint[some] * np.log(joint[some] / expected[some])).sum())
    return max(nats, 0.0) / math.log(min(joint.shape))


def experts(episodes: Sequence[Any], names: Sequence[str], count: int) -> dict[str, Any]:
    """Which of `count` experts drove which mode, for a row of results.json.

    experts: mode -> successes that each expert drove; expert_information: mutual information of
    mode and expert; least_load: share of the least used expert, in even shares.
    """
    table = {name: np.zeros(count) for name in names}
    for episode in episodes:
        if episode.success and episode.mode in table:  # one that changes its expert counts in parts
            drove = np.bincount(episode.experts, minlength=count)
            table[episode.mode] += drove / len(episode.experts)
    drove = np.array([*table.values()])
    return {
        "experts": {mode: row.round(6).tolist() for mode, row in table.items()},
        "expert_information": information(drove),
        "least_load": float(drove.sum(0).min() * count / max(drove.sum(), 1e-12)),
    }


def auc(good: Sequence[float], poor: Sequence[float]) -> float:
    """Share of the pairs (good, poor) in which the good one scores higher; ties count half."""
    ahead = np.asarray(good)[:, None] - np.asarray(poor)
    return float(((ahead > 0) + 0.5 * (ahead == 0)).mean())


def summary(
    episodes: Sequence[Any],
    names: Sequence[str] | None,
    shares: Sequence[float] | None,
    times: Sequence[float],
) -> dict[str, Any]:
    """One row of results.json: of episodes at one NFE and times (s) of single chunks.

    Entropy, coverage and KL are of the successes whose mode is among `names`, the environment's,
    and None unless those (for KL, their `shares`, too) are known.
    """
    successes = [episode for episode in episodes if episode.success]
    taken = Counter(episode.mode for episode in successes if episode.mode is not None)
    failures = Counter(episode.failure for episode in episodes if not episode.success)
    counts = [taken[name] for name in names or ()]
    modes = dict(sorted(taken.items(), key=str))
    if names:
        modes = dict(zip(names, counts, strict=True))
    return {
        "episodes": len(episodes),
        "success": len(successes) / len(episodes),
        "interval": wilson(len(successes), len(episodes)),
        "entropy": entropy(counts) if names else None,
        "coverage": coverage(counts) if names else None,
        "kl": kl(counts, shares) if names and shares is not None else None,
        "modes": modes,
        "failures": dict(sorted(failures.items())),
        "ms_per_chunk": 1000 * float(np.median(times)),
        "ms_p95": 1000 * float(np.quantile(times, 0.95)),
    }


def table(rows: Sequence[dict[str, Any]], names: Sequence[str] | None) -> str:
    """Rows of results.json as Markdown."""
    titles = ["NFE", "success", "95 % interval", "entropy", "KL", "modes of successes", "failures"]
    titles.append("ms per chunk (p95)")
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in rows:
        low, high = row["interval"]
        numbers = ["-" if row[key] is None else f"{row[key]:.3f}" for key in ("entropy", "kl")]
        taken = {name: n for name, n in row["modes"].items() if n}
        modes = _counts(taken) if len(taken) <= 8 else f"{len(taken)} of {len(names or taken)}"
        cells = [
            str(row["nfe"]),
            f"{row['success']:.3f}",
            f"{low:.3f}-{high:.3f}",
            *numbers,
            modes,
            _counts(row["failures"]),
            f"{row['ms_per_chunk']:.1f} ({row['ms_p95']:.1f})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items()) or "-"


def chunk_errors(errors: np.ma.MaskedArray, scale: np.ndarray) -> dict[str, Any]:
    """Absolute errors (samples, chunks, T, A), padding masked -> their means, for results.json.

    mae (A,) and mae_by_step (T, A) in the action's units; chunk_error of whole chunks in units of
    scale (A,): the mean over all draws, and that of the best of `samples` draws.
    """
    of_chunks = (errors / scale).mean((2, 3))
    return {
        "mae": errors.mean((0, 1, 2)).tolist(),
        "mae_by_step": errors.mean((0, 1)).tolist(),
        "chunk_error": {
            "samples": len(errors),
            "mean": float(of_chunks.mean()),
            "best": float(of_chunks.min(0).mean()),
        },
    }


def joint_table(rows: Sequence[dict[str, Any]], names: Sequence[str], scale: np.ndarray) -> str:
    """Rows of chunk_errors() as Markdown, a column per NFE; normalised by scale in brackets."""
    lines = ["| | " + " | ".join(f"NFE {row['nfe']}" for row in rows) + " |"]
    lines.append("|---" * (len(rows) + 1) + "|")
    for i, name in enumerate(names):
        cells = [f"{row['mae'][i]:.4g} ({row['mae'][i] / scale[i]:.2f})" for row in rows]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    samples = rows[0]["chunk_error"]["samples"]
    for title, key in (("whole chunk", "mean"), (f"best of {samples} draws", "best")):
        cells = [f"({row['chunk_error'][key]:.3f})" for row in rows]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def times(chunk: Callable[[], Any], calls: int = 50, seconds: float = 5.0) -> list[float]:
    """Times (s) of up to `calls` single chunks, one by one and warm, for about `seconds`."""
    spent: list[float] = []
    began = time.perf_counter()
    while len(spent) < 4 or (len(spent) <= calls and time.perf_counter() - began < seconds):
        started = time.perf_counter()
        chunk()
        spent.append(time.perf_counter() - started)
    return spent[1:]


def velocity_levels(loss: dict[str, list[float]], target: str) -> str:
    """velocity_loss() near the noise, midway and near the data, as text.

    target: what the decoder predicts. From x1 the velocity is (x1 - x_t) / (1 - t): its loss is the
    squared error of x1, divided by (1 - t)^2.
    """
    shown = (0, len(loss["t"]) // 2, len(loss["t"]) - 1)
    times = ", ".join(f"{loss['t'][k]:g}" for k in shown)
    levels = []
    for source, values in loss.items():
        if source != "t":
            levels.append(f"{source} {', '.join(f'{values[k]:.3g}' for k in shown)}")
    text = (
        f"velocity loss, normalised, at t = {times}, by source of the latent: {'; '.join(levels)}"
    )
    if target == "x1":
        text += (
            "\n    (the decoder predicts x1: this is the squared error of x1, divided by "
            "(1 - t)^2, which grows towards t = 1; compare sources at the same t)"
        )
    return text


@torch.no_grad()
def velocity_loss(
    policy: ActionPolicy, windows: Windows, rows: np.ndarray, seed: int, bins: int = 10
) -> dict[str, list[float]]:
    """Mean squared error of the normalised velocity on rows of windows, at middles of bins of t.

    {"t": [...], "posterior": [...], "prior": [...]}, by the source of the latent, or {"t", "none"}
    of a policy without one; all with the same noise, without guidance. Their gap is what z settles.
    The noise belongs to what an episode holds, whatever its number is.
    """
    t = [(k + 0.5) / bins for k in range(bins)]
    sums = defaultdict(lambda: np.zeros(bins))
    entries = 0
    device = next(policy.parameters()).device
    batches = np.array_split(rows, -(-len(rows) // 64))
    for some in progress(batches, desc="velocity loss", leave=None):
        batch = to_device(windows[some], device)
        memory = policy.encode(batch)
        x1 = policy.stats.normalize("action", batch["action"])
        episodes = [windows.hashes[number] for number in batch["episode_index"].tolist()]
        places = zip(episodes, batch["frame_index"].tolist(), strict=True)
        keys = [("velocity", seed, *place) for place in places]
        x0 = RowNoise([(*key, "x0") for key in keys], device).normal(*x1.shape)
        valid = ~batch["action_is_pad"][..., None]
        entries += valid.sum().item() * x1.shape[2]
        latents: dict[str, Tensor | None] = {"none": None}
        if policy.has_latent:
            latents = {
                "posterior": policy.posterior_latent(memory, x1, RowNoise(keys, device)),
                "prior": policy.latent(memory, RowNoise(keys, device)),
            }
        for source, z in latents.items():
            context = policy.context(memory, z)
            for k, now in enumerate(t):
                error = policy.velocity((1 - now) * x0 + now * x1, now, context) - (x1 - x0)
                sums[source][k] += (error.double().square() * valid).sum().item()
    return {"t": t, **{source: (values / entries).tolist() for source, values in sums.items()}}
