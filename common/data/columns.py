"""What the columns of a dataset mean: the names of their numbers, and what kind of values they are.

Kinds are recognised from the values, for resampling: joints are interpolated, but a gripper command
is not half closed between open and closed, and an angle that wraps does not pass through zero.
"""

import math
from typing import Any, Literal

import numpy as np

Kind = Literal["linear", "discrete", "angle", "quaternion", "delta"]
PERIODS = (2 * math.pi, 360.0, 4096.0)  # of angles, in radians, degrees, and ticks of 12 bits
LEVELS = 8  # most values of a discrete dimension
LAG = 3  # most steps between a delta and the motion that it asks for
ROWS = 200_000  # deltas are looked for in so many
TINY = 1e-30  # in place of a divisor of 0


def joint_names(features: dict[str, Any], key: str, count: int) -> list[str]:
    """The dataset's names of a column's `count` numbers; key[i] where it has none that fit.

    Datasets nest names in lists or mappings: the innermost ones along the first entries count.
    """
    names = features.get(key, {}).get("names") or []
    inner = names
    while isinstance(inner, list | dict) and inner:
        names = inner
        inner = next(iter(inner.values() if isinstance(inner, dict) else inner))
    if len(names) == count:
        return [str(name) for name in names]
    return [f"{key}[{i}]" for i in range(count)]


def label(key: str, i: int, name: str = "") -> str:
    """Number i of a column as messages show it, with the dataset's name: action[3] (gripper)."""
    return f"{key}[{i}]" if not name or name.endswith(f"[{i}]") else f"{key}[{i}] ({name})"


def kinds(
    values: np.ndarray, first: np.ndarray, last: np.ndarray, state: np.ndarray | None = None
) -> list[Kind]:
    """The kind of each number of a column (rows, dim), as far as its values show it.

    first, last: rows of the ends of each episode. state (rows, S), angles unwrapped: for columns
    that may be deltas of it. discrete: at most 8 values, each held for a while. angle: wraps at its
    period. quaternion: one of 4 numbers whose norm is 1 in every row. delta: its sum is how far a
    number of the state has moved. linear: all others.
    """
    found: list[Kind] = ["linear"] * values.shape[1]
    before = rows_before_another(last)
    for i, column in enumerate(values.T):
        if is_discrete(column, first, before):
            found[i] = "discrete"
        elif any(is_angle(column, before, period) for period in PERIODS):
            found[i] = "angle"
    i = 0
    while i + 4 <= len(found):
        if "discrete" not in found[i : i + 4] and are_quaternions(values[:, i : i + 4]):
            for k in range(i, i + 4):
                found[k] = "quaternion"
            i += 4
        else:
            i += 1
    if state is not None:
        for i in np.flatnonzero(deltas(values, first, last, state)):
            found[i] = "delta"
    return found


def rows_before_another(last: np.ndarray) -> np.ndarray:
    """Rows that have a next one in their episode; last: those that have none."""
    return np.setdiff1d(np.arange(last[-1]), last)


def is_discrete(column: np.ndarray, first: np.ndarray, before: np.ndarray) -> bool:
    """Whether a column has two values, or a few of which each is held for 3 rows on average.

    Values that differ by less than a hundredth of the range count as one.
    """
    span = np.ptp(column)
    if not span or len(_levels(column[:10_000], span)) > LEVELS:
        return False
    starts = _levels(column, span)
    if len(starts) > LEVELS or len(column) < 4 * len(starts):
        return False
    level = np.searchsorted(starts, column, side="right") - 1
    ends = [column[level == i].max() for i in range(len(starts))]
    if np.max(ends - starts) > 0.02 * span:
        return False
    begins = [level[first], level[before + 1][level[before + 1] != level[before]]]
    runs = np.bincount(np.concatenate(begins), minlength=len(starts))
    return len(starts) == 2 or bool((np.bincount(level) >= 3 * runs).all())


def _levels(column, span):
    """The smallest value of each group of values that gaps of a hundredth of the span divide."""
    values = np.unique(column)
    return values[np.diff(values, prepend=-np.inf) > 0.01 * span]


def is_angle(column: np.ndarray, before: np.ndarray, period: float) -> bool:
    """Whether a column wraps: it jumps by about the period, as if it went on at the same speed."""
    if np.ptp(column) > 1.01 * period:
        return False
    steps = np.abs(column[before + 1] - column[before])
    jumps = np.flatnonzero(steps > 0.75 * period)
    if not len(jumps) or len(jumps) > 0.3 * len(steps):
        return False
    if (steps > 0.25 * period).sum() > len(jumps):
        return False
    wrapped = np.minimum(steps, np.abs(period - steps))
    around = np.maximum(wrapped[np.maximum(jumps - 1, 0)], wrapped[(jumps + 1) % len(wrapped)])
    smooth = wrapped[jumps] <= np.maximum(3 * around, 0.01 * period)
    return bool(smooth.mean() > 0.8)


def period_of(column: np.ndarray, before: np.ndarray) -> tuple[float, float] | None:
    """Period of an angle, and where its turn begins; None if it does not wrap.

    The usual turns are [-period / 2, period / 2) and [0, period).
    """
    low = column.min()
    high = column.max()
    largest = np.abs(column[before + 1] - column[before]).max(initial=0)
    fitting = [p for p in PERIODS if high - low <= 1.01 * p and largest > 0.5 * p]
    if not fitting:
        return None
    period = fitting[0]
    for start in (-period / 2, 0.0):
        if low >= start - 0.01 * period and high <= start + 1.01 * period:
            return period, start
    return period, (low + high - period) / 2


def maybe_angle(column: np.ndarray, before: np.ndarray) -> bool:
    """Whether a column jumps by about a period, as far as its range allows it to be an angle."""
    largest = np.abs(column[before + 1] - column[before]).max(initial=0)
    return any(largest > 0.9 * p and np.ptp(column) <= 1.01 * p for p in PERIODS)


def are_quaternions(values: np.ndarray) -> bool:
    """Whether 4 numbers a row (rows, 4) have norm 1 in each of at least 4 rows, and move."""
    norms = np.linalg.norm(values, axis=1)
    moves = np.ptp(values, axis=0) > 0
    return len(values) >= 4 and bool(moves.any() and (np.abs(norms - 1) < 1e-3).all())


def deltas(
    values: np.ndarray, first: np.ndarray, last: np.ndarray, state: np.ndarray
) -> np.ndarray:
    """Which numbers of a column add up to how far a number of the state has moved: bool (dim,).

    Both the sums since the start of the episode and the single steps must agree with the state.
    """
    sums, moved, pairs = _motion(values, first, last, state)
    sizes = np.sqrt((sums**2).sum(0)[:, None] * (moved**2).sum(0))
    products = sums.T @ moved
    agree = products >= 0.95 * sizes
    gain = products / np.maximum((moved**2).sum(0), TINY)
    agree &= (gain > 0.7) & (gain < 1.4) & (sizes > 0)
    correlation, _ = _best_lag(pairs, -1)
    # Few steps may agree by chance.
    needed = 0.6 if len(pairs[0][0]) >= 30 else 0.99
    return (agree & (correlation >= needed)).any(1)


def maybe_deltas(
    values: np.ndarray, first: np.ndarray, last: np.ndarray, state: np.ndarray, fps: float
) -> np.ndarray:
    """Which numbers of a column follow the motion of the state, not where it is: bool (dim,).

    They may be deltas in other units or of other coordinates. Velocities per second are none.
    """
    _, _, pairs = _motion(values, first, last, state)
    # Smooth curves correlate by chance, but their changes do not.
    correlation, gain = _best_lag(pairs, 0.4)
    action, step, level, inside = pairs[0]
    if len(inside) < 50:  # too few to tell
        return np.zeros(values.shape[1], bool)
    # Of a smooth position, levels and steps may look alike for a while.
    alike = (correlation >= 0.8) & (_correlation(action, level)[0] < 0.9)
    velocity = np.abs(gain / fps - 1) < 0.3
    known = (alike & velocity).any(1)
    combined = np.zeros(values.shape[1], bool)
    if len(inside) > 20 * state.shape[1]:
        by_steps = _explained(action, step)
        combined = by_steps >= np.maximum(0.8, _explained(action, level) + 0.3)
        combined &= _explained(*_changes(action, step, inside)) >= 0.5
    return (alike.any(1) | combined) & ~known


def _motion(values, first, last, state):
    """How a column and the state move in each episode.

    Sums (rows, dim) of the column before each row, how far the state has moved (rows, S), and for
    each lag up to LAG: the values, the step and level of the state so much later, and the places of
    those that have another of their episode after them.
    """
    last = last[last < max(ROWS, last[0] + 1)]
    first = first[: len(last)]
    lengths = last - first + 1
    start = np.repeat(first, lengths)
    rows = np.arange(len(start))
    values = values[rows].astype(np.float64)
    state = state[rows].astype(np.float64)
    sums = np.cumsum(values, 0) - values
    sums -= sums[start]
    moved = state - state[start]
    end = np.repeat(last, lengths)
    pairs = []
    for lag in range(LAG + 1):
        at = np.flatnonzero(rows + lag < end)
        step = state[at + lag + 1] - state[at + lag]
        inside = np.flatnonzero(np.diff(at) == 1)
        pairs.append((values[at], step, state[at + lag], inside))
    return sums, moved, pairs


def _best_lag(pairs, least):
    """Largest correlation (dim, S) of values with steps of the state, over lags, and its slope.

    Only of lags where the changes of both correlate, too, by `least`.
    """
    best = np.zeros((pairs[0][0].shape[1], pairs[0][1].shape[1]))
    slope = np.zeros_like(best)
    for action, step, _, inside in pairs:
        if len(inside) < 4:
            continue
        correlation, gain = _correlation(action, step)
        changes, _ = _correlation(*_changes(action, step, inside))
        better = (correlation > best) & (changes >= least)
        best = np.where(better, correlation, best)
        slope = np.where(better, gain, slope)
    return best, slope


def _changes(x, y, inside):
    return x[inside + 1] - x[inside], y[inside + 1] - y[inside]


def _correlation(x, y):
    """Correlation (X, Y) of the columns of x (rows, X) and y (rows, Y); slope of x on y."""
    x = x - x.mean(0)
    y = y - y.mean(0)
    product = x.T @ y
    squares = (y**2).sum(0)
    sizes = np.sqrt((x**2).sum(0)[:, None] * squares)
    return product / np.maximum(sizes, TINY), product / np.maximum(squares, TINY)


def _explained(values, by):
    """Share of the variance (dim,) of values that a linear function of other columns explains."""
    values = values - values.mean(0)
    by = by - by.mean(0)
    by = by / np.maximum(by.std(0), TINY)
    residual = values - by @ np.linalg.lstsq(by, values, rcond=None)[0]
    variance = (values**2).sum(0)
    return np.where(variance > 0, 1 - (residual**2).sum(0) / np.maximum(variance, TINY), 0)
