"""Columns of a dataset at another rate, each number as its kind demands."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common import schema
from common.config import ConfigError, nearest
from common.data.columns import (
    Kind,
    kinds,
    label,
    maybe_angle,
    maybe_deltas,
    period_of,
    rows_before_another,
)

TREATED = {  # what is said of the numbers of each kind
    "discrete": "few values: the nearest one is taken",
    "angle": "an angle that wraps: interpolated the short way round",
    "quaternion": "a quaternion: interpolated as a rotation",
    "delta": "deltas of the state: added up over each step",
}
DOUBTS = {  # what may be of another kind
    "angle": "perhaps an angle that wraps, because it jumps by about a turn",
    "delta": "perhaps deltas, by name or because it follows the motion of the state",
}


@dataclass
class Grid:
    """A time grid in each episode of a dataset.

    For each point: frame, its place in the episode in frames of the dataset; start and end, first
    and last row of the episode. ratio: frames from one point to the next. last: rows of the ends of
    all episodes.

    From these: the rows below and above, the share of the one above, and the nearest row (half goes
    up).
    """

    frame: np.ndarray
    start: np.ndarray
    end: np.ndarray
    ratio: float
    last: np.ndarray

    def __post_init__(self):
        rounded = np.floor(self.frame + 0.5).astype(np.int64)
        floor = np.floor(self.frame + 1e-6).astype(np.int64)
        self.nearest = np.minimum(self.start + rounded, self.end)
        self.below = np.minimum(self.start + floor, self.end)
        self.above = np.minimum(self.below + 1, self.end)
        share = np.clip(self.frame - (self.below - self.start), 0, 1)
        self.share = share.astype(np.float32)[:, None]

    def resampled(self, values: np.ndarray, kinds: Sequence[Kind]) -> np.ndarray:
        """values (rows, dim) -> (points, dim), each number by its kind; see columns.kinds().

        linear: interpolated. discrete: the nearest value. angle: interpolated the short way round.
        quaternion: the shorter of the two rotations between neighbours, at constant speed; the sign
        is that of the nearest row. delta: the sum over the time until the next point.
        """
        made = (1 - self.share) * values[self.below] + self.share * values[self.above]
        for i, kind in enumerate(kinds):
            if kind == "discrete":
                made[:, i] = values[self.nearest, i]
            elif kind == "angle":
                made[:, i] = self._angle(values[:, i])
            elif kind == "delta":
                made[:, i] = self._sums(values[:, i])
        turning = [i for i, kind in enumerate(kinds) if kind == "quaternion"]
        for group in zip(*[iter(turning)] * 4, strict=True):
            made[:, group] = self._quaternion(values[:, group])
        return made

    def _angle(self, column):
        below = column[self.below]
        found = period_of(column, rows_before_another(self.last))
        period, begin = found or (np.inf, 0.0)
        way = column[self.above].astype(np.float64) - below
        way -= period * np.round(way / period) if found else 0
        moved = below + self.share[:, 0] * way
        wrapped = begin + (moved - begin) % period if found else moved
        return np.where(self.share[:, 0] > 0, wrapped, below)

    def _quaternion(self, values):
        below = values[self.below].astype(np.float64)
        above = values[self.above].astype(np.float64)
        cosine = (below * above).sum(1, keepdims=True)
        sign = np.where(cosine < 0, -1, 1)
        angle = np.arccos(np.minimum(np.abs(cosine), 1))
        # Below some angle sines lose digits, and the arc is straight.
        sine = np.where(angle < 1e-4, 1, np.sin(angle))
        left = np.where(angle < 1e-4, 1 - self.share, np.sin((1 - self.share) * angle) / sine)
        right = np.where(angle < 1e-4, self.share, np.sin(self.share * angle) / sine)
        made = left * below + right * sign * above
        made /= np.linalg.norm(made, axis=1, keepdims=True)
        made *= np.where((self.nearest == self.above)[:, None], sign, 1)
        return np.where(self.share > 0, made, below)

    def _sums(self, column):
        column = column.astype(np.float64)
        total = np.cumsum(column) - column

        def until(frame):
            i = np.minimum(np.floor(frame).astype(np.int64), self.end - self.start)
            row = self.start + i
            return total[row] + np.minimum(frame - i, 1) * column[row]

        return until(self.frame + self.ratio) - until(self.frame)


def given_kinds(
    resample: Mapping[str, Kind], hold: Sequence[str], names: Mapping[str, Sequence[str]]
) -> dict[str, list[Kind | None]]:
    """Column -> kind of each of its numbers, as far as data.resample and data.hold_keys say.

    names: column -> the dataset's name of each number. data.resample takes such a name, a label
    like action[3], or a column; the first that is given counts. Raises ConfigError for others, and
    for a part of a quaternion.
    """
    given = {}
    known = set(names)
    for key, own in names.items():
        titles = [(name, f"{key}[{i}]", key) for i, name in enumerate(own)]
        known.update(title for options in titles for title in options)
        held: Kind | None = "discrete" if key in hold else None
        given[key] = [
            next((resample[title] for title in options if title in resample), held)
            for options in titles
        ]
        turning = given[key].count("quaternion")
        if turning % 4:
            raise ConfigError(
                f"data.resample: {turning} numbers of {key} are said to be quaternions, which have "
                "4 each"
            )
    for title in resample:
        if title not in known:
            raise ConfigError(
                f"data.resample: {title!r} is no column in use and no number of one"
                f"{nearest(title, known)}"
            )
    return given


def chosen_kinds(
    cfg: schema.Data,
    fps: float,
    columns: Mapping[str, np.ndarray],
    names: Mapping[str, Sequence[str]],
    first: np.ndarray,
    last: np.ndarray,
) -> dict[str, list[Kind]]:
    """Column -> kind of each of its numbers: given by hand, or recognised, which is printed.

    columns (rows, dim) at the rate fps; names: see given_kinds(). first, last: rows of the ends of
    each episode. Warns of numbers that may be of another kind than they are taken for.
    """
    before = rows_before_another(last)
    given = given_kinds(cfg.resample, cfg.hold_keys, names)
    chosen = {key: _filled(given[key], kinds(columns[key], first, last)) for key in columns}
    parts = [unwrapped(columns[key], chosen[key], before) for key in cfg.state_keys]
    state = np.concatenate(parts, 1)
    key = cfg.action_key
    action = columns[key]
    chosen[key] = _filled(given[key], kinds(action, first, last, state))
    follows = maybe_deltas(action, first, last, state, fps)

    treated = {kind: [] for kind in TREATED}
    doubtful = {kind: [] for kind in DOUBTS}
    for key, values in columns.items():
        for i, name in enumerate(names[key]):
            kind = chosen[key][i]
            if given[key][i] is not None:
                continue
            if kind in treated:
                treated[kind].append(label(key, i, name))
            if kind == "linear" and maybe_angle(values[:, i], before):
                doubtful["angle"].append(label(key, i, name))
            named = "delta" in f"{key} {name}".lower()
            if key == cfg.action_key and kind != "delta" and (follows[i] or named):
                doubtful["delta"].append(label(key, i, name))
    rates = f"resampling from {fps:g} to {cfg.HZ:g} Hz"
    for kind, titles in treated.items():
        if titles:
            print(f"{rates}: {', '.join(titles)}: {TREATED[kind]} (data.resample changes it)")
    for kind, titles in doubtful.items():
        if titles:
            example = f"""data.resample='{{"{titles[0].split()[0]}": {kind}}}'"""
            print(
                f"warning: {rates}: {', '.join(titles)}: {DOUBTS[kind]}: confirm with {example}, "
                "or deny it with linear or discrete there"
            )
    return chosen


def _filled(given, found):
    return [by_hand or kind for by_hand, kind in zip(given, found, strict=True)]


def unwrapped(values: np.ndarray, kinds: Sequence[Kind], before: np.ndarray) -> np.ndarray:
    """values (rows, dim) in float64, without the jumps of angles."""
    values = values.astype(np.float64)
    for i, kind in enumerate(kinds):
        turn = period_of(values[:, i], before) if kind == "angle" else None
        if turn:
            values[:, i] = np.unwrap(values[:, i], period=turn[0])
    return values
