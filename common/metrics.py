"""What an evaluation measures. `counts`: successes per mode, of every mode, zeros included."""

import math
import time
from collections import Counter

import numpy as np
from tqdm import tqdm

from common.data.loader import to_device
from common.noise import RowNoise


def wilson(successes: int, n: int, z=1.959963984540054) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    p, spread = successes / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    return max((p + spread / 2 - half) / (1 + spread), 0.0), min(
        (p + spread / 2 + half) / (1 + spread), 1.0
    )


def entropy(counts) -> float | None:
    """Entropy of the modes as a share of its maximum, log of the number of modes; None without a success."""
    p = np.array(counts) / max(sum(counts), 1)
    return (
        abs(float((p[p > 0] * np.log(p[p > 0])).sum()) / math.log(len(p)))
        if p.any() and len(p) > 1
        else None
    )


def coverage(counts) -> float:
    """Share of the modes that were taken at least once."""
    return float(np.mean(np.array(counts) > 0))


def kl(counts, shares) -> float | None:
    """KL(modes of the successes || shares of the demonstrations) in nats; None without a success, or where it has no
    end because the demonstrations lack a mode."""
    p, q = np.array(counts) / max(sum(counts), 1), np.array(shares, float)
    if not p.any() or (q[p > 0] == 0).any():
        return None
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


def information(table) -> float | None:
    """Mutual information of rows and columns of a table of counts, as a share of its maximum, log of the shorter side;
    None without counts."""
    joint = np.array(table, float) / max(np.sum(table), 1e-12)
    expected = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    some = joint > 0
    nats = float((joint[some] * np.log(joint[some] / expected[some])).sum())
    return (
        max(nats, 0.0) / math.log(min(joint.shape)) if some.any() and min(joint.shape) > 1 else None
    )


def experts(episodes, names, count) -> dict:
    """Which of `count` experts drove which mode, for a row of results.json: "experts", {mode: what each expert drove of
    its successes}; "expert_information" of the two; "least_load", the least used expert's share in even shares."""
    table = {name: np.zeros(count) for name in names}
    for episode in episodes:
        if episode.success and episode.mode in table:  # one that changes its expert counts in parts
            table[episode.mode] += np.bincount(episode.experts, minlength=count) / len(
                episode.experts
            )
    drove = np.array([*table.values()])
    return {
        "experts": {mode: row.round(6).tolist() for mode, row in table.items()},
        "expert_information": information(drove),
        "least_load": float(drove.sum(0).min() * count / max(drove.sum(), 1e-12)),
    }


def auc(good, poor) -> float:
    """Share of the pairs (a good one, a poor one) in which the good one scores higher; ties count half."""
    ahead = np.asarray(good)[:, None] - np.asarray(poor)
    return float(((ahead > 0) + 0.5 * (ahead == 0)).mean())


def summary(episodes, names, shares, times) -> dict:
    """One row of results.json: of episodes at one NFE and times (s) of single chunks.

    Entropy, coverage and KL are of the successes whose mode is among `names`, the environment's, and None unless those
    (for KL, their `shares`, too) are known.
    """
    successes = [episode for episode in episodes if episode.success]
    taken = Counter(episode.mode for episode in successes if episode.mode is not None)
    counts = [taken[name] for name in names or ()]
    return {
        "episodes": len(episodes),
        "success": len(successes) / len(episodes),
        "interval": wilson(len(successes), len(episodes)),
        "entropy": entropy(counts) if names else None,
        "coverage": coverage(counts) if names else None,
        "kl": kl(counts, shares) if names and shares is not None else None,
        "modes": dict(zip(names, counts, strict=True))
        if names
        else dict(sorted(taken.items(), key=str)),
        "failures": dict(
            sorted(Counter(episode.failure for episode in episodes if not episode.success).items())
        ),
        "ms_per_chunk": 1000 * float(np.median(times)),
        "ms_p95": 1000 * float(np.quantile(times, 0.95)),
    }


def table(rows, names) -> str:
    """Rows of results.json as Markdown."""
    lines = [
        "| NFE | success | 95 % interval | entropy | KL | modes of successes | failures | ms per chunk (p95) |"
    ]
    lines.append("|" + "---|" * 8)
    for row in rows:
        low, high = row["interval"]
        numbers = ["-" if row[key] is None else f"{row[key]:.3f}" for key in ("entropy", "kl")]
        taken = {name: n for name, n in row["modes"].items() if n}
        lists = [
            ", ".join(f"{k} {v}" for k, v in some.items()) or "-"
            for some in (taken, row["failures"])
        ]
        if len(taken) > 8:
            lists[0] = f"{len(taken)} of {len(names or taken)}"
        ms = f"{row['ms_per_chunk']:.1f} ({row['ms_p95']:.1f})"
        cells = [row["nfe"], f"{row['success']:.3f}", f"{low:.3f}-{high:.3f}", *numbers, *lists, ms]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def times(chunk, calls=50, seconds=5.0) -> list[float]:
    """Times (s) of up to `calls` single chunks as a robot has them: one after the other, warm, for about `seconds`."""
    spent, began = [], time.perf_counter()
    while len(spent) < 4 or (len(spent) <= calls and time.perf_counter() - began < seconds):
        started = time.perf_counter()
        chunk()
        spent.append(time.perf_counter() - started)
    return spent[1:]


def velocity_loss(policy, data, seed, bins=10) -> dict[str, list[float]]:
    """Flow-matching loss on held-out windows, mean squared error of the normalised velocity, at the middle of each bin.

    {"t": [...], "posterior": [...], "prior": [...]}, by where the latent is from (posterior: policies with infer()),
    or {"t", "none"} of a policy without; all with the same noise, without guidance. The gap is what z settles.
    """
    t, sums, entries = [(k + 0.5) / bins for k in range(bins)], {}, 0
    unguided = {"w": 1.0} if hasattr(getattr(policy, "sampling", None), "guidance") else {}
    device = next(policy.parameters()).device
    for rows in tqdm(
        np.array_split(data.val_rows, -(-len(data.val_rows) // 64)),
        desc="velocity loss",
        leave=None,
    ):
        batch = to_device(data.windows[rows], device)
        memory, x1 = policy.encode(batch), policy.stats.normalize("action", batch["action"])
        keys = list(zip(["velocity"] * len(rows), [seed] * len(rows), rows.tolist(), strict=True))
        x0 = RowNoise([(*key, "x0") for key in keys], device).normal(*x1.shape)
        valid = ~batch["action_is_pad"][..., None]
        entries += valid.sum().item() * x1.shape[2]
        latents = {"prior": policy.latent(memory, RowNoise(keys, device))}
        if latents["prior"] is None:
            latents = {"none": None}
        elif hasattr(policy, "infer"):
            latents = {"posterior": policy.infer(memory, x1, RowNoise(keys, device))[0], **latents}
        for arm, z in latents.items():
            probe = _probe(x1, valid, t, sums.setdefault(arm, [0.0] * bins))
            policy.sample(memory, x0, bins, z, solver=probe, **unguided)
    return {"t": t, **{arm: [value / entries for value in values] for arm, values in sums.items()}}


def _probe(x1, valid, t, sums):
    """In place of a solver, which a policy hands its velocity with all else bound: adds the squared errors to sums."""

    def solver(velocity, x0, steps):
        for k, now in enumerate(t):
            error = velocity((1 - now) * x0 + now * x1, now) - (x1 - x0)
            sums[k] += (error.double().square() * valid).sum().item()
        return x0

    return solver
