"""Statistics of state and action, and the conversion to and from normalised units."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from common.data.columns import label

NOISE = 1e-6  # spread of rounding errors of float32: so much of the magnitude, or of 1 if below


def statistics(
    state: np.ndarray, action: np.ndarray, names: dict[str, list[str]] | None = None
) -> dict[str, Tensor]:
    """state_mean, ..., action_q99: (dim,) over rows (N, dim); warns of constant dimensions.

    names: state and action -> a name per dimension.
    """
    stats = {}
    for name, x in (("state", state), ("action", action)):
        x = x.astype(np.float64)
        q01, q99 = np.quantile(x, [0.01, 0.99], axis=0)
        values = {
            "mean": x.mean(0),
            "std": x.std(0),
            "min": x.min(0),
            "max": x.max(0),
            "q01": q01,
            "q99": q99,
        }
        for key, value in values.items():
            stats[f"{name}_{key}"] = torch.from_numpy(value).float()
        still = constant(stats[f"{name}_mean"], stats[f"{name}_std"])
        still = torch.nonzero(still).flatten().tolist()
        if still:
            own = {i: names[name][i] for i in still} if names else {}
            named = [title for i, title in own.items() if f"[{i}]" not in title]
            print(
                f"warning: {name} dimensions {still} are constant over the training episodes"
                + (f": {', '.join(named)}" if named else "")
            )
    return stats


def constant(mean: Tensor, std: Tensor) -> Tensor:
    """Whether each dimension moves by rounding errors at most: bool (dim,)."""
    return std <= rounding(mean)


def rounding(x: Tensor) -> Tensor:
    """The spread of rounding errors of values near x."""
    return NOISE * x.abs().clamp(min=1)


def differences(
    trained: dict[str, Tensor], found: dict[str, Tensor], names: dict[str, list[str]] | None = None
) -> list[str]:
    """One line per dimension that other statistics show to be of another kind than in training.

    trained, found: as statistics() returns them; names: state and action -> a name per dimension.
    A dimension is named if its mean lies more than five standard deviations off, or if its spread
    is more than five times as large or as small. Another number of dimensions is one line.
    """
    lines = []
    for name in ("state", "action"):
        was_mean, was_std = (trained[f"{name}_{key}"].cpu().double() for key in ("mean", "std"))
        mean, std = (found[f"{name}_{key}"].cpu().double() for key in ("mean", "std"))
        if len(mean) != len(was_mean):
            lines.append(f"{name}: {len(mean)} numbers, in training {len(was_mean)}")
            continue
        # A dimension that was constant may differ a little without being another one.
        floor = torch.where(constant(was_mean, was_std), 0.01 * was_mean.abs() + 1e-3, 0)
        ratio = std.clamp(min=floor) / was_std.clamp(min=floor)
        far = (mean - was_mean).abs() > 5 * was_std.clamp(min=floor)
        for i in torch.nonzero(far | (ratio > 5) | (ratio < 0.2)).flatten().tolist():
            title = label(name, i, names[name][i] if names else "")
            here = f"mean {mean[i]:.3g} with a spread of {std[i]:.3g}"
            before = f"in training {was_mean[i]:.3g} with {was_std[i]:.3g}"
            lines.append(f"{title}: {here}, {before}: {_likely(ratio[i].item(), floor[i].item())}")
    return lines


UNITS = {  # ratio of the spreads -> likely cause
    180 / math.pi: "degrees, in training radians?",
    math.pi / 180: "radians, in training degrees?",
    1000.0: "millimetres, in training metres?",
    0.001: "metres, in training millimetres?",
}


def _likely(ratio, floor):
    if floor:
        return "constant in training"
    if not ratio:
        return "constant here"
    for factor, cause in UNITS.items():
        if 0.7 < ratio / factor < 1.4:
            return f"other units ({cause})"
    return "other units?"


class Normalizer(nn.Module):
    """Converts states and actions to normalised units and back. Saved as dataset_stats.safetensors.

    mode mean_std: (x - mean) / std; quantile: [q01, q99] -> [-1, 1], scaled by std where q01 = q99.
    min_std: smallest scale, in raw units. If it is 0, constant dimensions have scale 1, and are
    denormalised to the range that they had in training.
    """

    def __init__(self, mode: str, stats: dict[str, Tensor], min_std: float = 0.0):
        super().__init__()
        self.mode = mode
        self.min_std = min_std
        for key, value in stats.items():
            self.register_buffer(key, value.clone())

    def constant(self, name: str) -> Tensor:
        """Dimensions that are not scaled: bool (dim,)."""
        mean = getattr(self, f"{name}_mean")
        std = getattr(self, f"{name}_std")
        return constant(mean, std) & (self.min_std == 0)

    def affine(self, name: str) -> tuple[Tensor, Tensor]:
        """Offset and scale (dim,) of normalised units; name: state or action."""
        if self.mode == "quantile":
            low = getattr(self, f"{name}_q01")
            high = getattr(self, f"{name}_q99")
            offset = (low + high) / 2
            scale = (high - low) / 2
            if not self.min_std:
                std = getattr(self, f"{name}_std")
                scale = torch.where(scale <= rounding(offset), std, scale)
        else:
            offset = getattr(self, f"{name}_mean")
            scale = getattr(self, f"{name}_std")
        return offset, scale.clamp(min=self.min_std).masked_fill(self.constant(name), 1)

    def normalize(self, name: str, x: Tensor) -> Tensor:
        """name: state or action; x (..., dim) in the dataset's units."""
        offset, scale = self.affine(name)
        return (x - offset) / scale

    def denormalize(self, name: str, x: Tensor) -> Tensor:
        """The inverse, after a clip to +-5 or, if wider, to the range of the training data."""
        low = self.normalize(name, getattr(self, f"{name}_min"))
        high = self.normalize(name, getattr(self, f"{name}_max"))
        still = self.constant(name)
        low = torch.where(still, low, low.clamp(max=-5))
        high = torch.where(still, high, high.clamp(min=5))
        offset, scale = self.affine(name)
        return torch.clamp(x, low, high) * scale + offset


def poor_scales(
    normalizer: Normalizer,
    state: np.ndarray,
    action: np.ndarray,
    names: dict[str, list[str]] | None = None,
) -> list[str]:
    """One line per dimension that is scaled badly over rows (N, dim), with the likely cause.

    The bulk of the rows, from q01 to q99, should have a spread of about 1 in normalised units: its
    std, or with quantile half of its range. A dimension is named if the spread is below 0.3, if
    single values lie more than 50 scales off, or if all it does may be noise.
    """
    lines = []
    for name, x in (("state", state), ("action", action)):
        offset, scale = (value.numpy() for value in normalizer.affine(name))
        low, high = (getattr(normalizer, f"{name}_{key}").numpy() for key in ("q01", "q99"))
        for i in np.flatnonzero(~normalizer.constant(name).numpy()).tolist():
            column = x[:, i].astype(np.float64)
            bulk = column[(column >= low[i]) & (column <= high[i])]
            own = (high[i] - low[i]) / 2 if normalizer.mode == "quantile" else bulk.std()
            floor = bool(normalizer.min_std) and scale[i] <= np.float32(normalizer.min_std)
            farthest = np.abs(column - offset[i]).max() / scale[i]
            if own < 0.3 * scale[i]:
                found = f"98 % of the rows have a normalised spread of {own / scale[i]:.2g}"
                cause = "outliers stretch the std, or it rarely moves: try data.normalize: quantile"
                if floor:
                    cause = f"data.min_std {normalizer.min_std:g} is too large for it"
                elif own <= rounding(torch.tensor(offset[i])):
                    cause = "it rarely moves"
            elif farthest > 50:
                found = f"single values lie {farthest:.0f} scales off"
                cause = "damaged rows, or it rarely moves: try data.min_std"
            elif np.ptp(column) <= 1e-3 * np.abs(column).max() and not floor:
                found = "it moves by less than a thousandth of its size"
                cause = "noise of a joint that stands still? try data.min_std"
            else:
                continue
            title = label(name, i, names[name][i] if names else "")
            raw = f"raw {low[i]:.6g} to {high[i]:.6g}"
            ends = f"all rows {column.min():.6g} to {column.max():.6g}"
            lines.append(f"{title}: {found} ({raw}, {ends}): {cause}")
    return lines


def neighbour_scale(state: np.ndarray) -> np.ndarray:
    """Scale (dim,) of distances between states (N, dim): near the std, 1 where it is constant."""
    mean = state.mean(0)
    std = state.std(0)
    still = constant(torch.from_numpy(mean), torch.from_numpy(std)).numpy()
    return np.where(still, 1, std + np.minimum(std, 1e-2)).astype(state.dtype)
