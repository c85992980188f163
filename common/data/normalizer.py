"""Statistics of state and action, and the conversion to and from normalised units."""

import math

import numpy as np
import torch
from torch import Tensor, nn


def statistics(state: np.ndarray, action: np.ndarray) -> dict[str, Tensor]:
    """state_mean, ..., action_q99: (dim,) over rows (N, dim); warns of constant dimensions."""
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
        constant = np.flatnonzero(values["max"] == values["min"]).tolist()
        if constant:
            print(f"warning: {name} dimensions {constant} are constant over the training episodes")
    return stats


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
        floor = torch.where(was_std > 1e-6 * was_mean.abs(), 0, 0.01 * was_mean.abs() + 1e-3)
        ratio = std.clamp(min=floor) / was_std.clamp(min=floor)
        far = (mean - was_mean).abs() > 5 * was_std.clamp(min=floor)
        for i in torch.nonzero(far | (ratio > 5) | (ratio < 0.2)).flatten().tolist():
            title = label(name, i, names)
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


def label(name: str, i: int, names: dict[str, list[str]] | None = None) -> str:
    """Dimension i of state or action as messages name it: action[3] (left_gripper)."""
    known = (names or {}).get(name)
    own = known[i] if known else ""
    return f"{name}[{i}]" if not own or own.endswith(f"[{i}]") else f"{name}[{i}] ({own})"


class Normalizer(nn.Module):
    """Converts states and actions to normalised units and back. Saved as dataset_stats.safetensors.

    mode mean_std: (x - mean) / max(std, 0.01); quantile: [q01, q99] -> [-1, 1].
    """

    FLOOR = 1e-2  # in raw units: a joint that hardly moves is not blown up to unit variance

    def __init__(self, mode: str, stats: dict[str, Tensor]):
        super().__init__()
        self.mode = mode
        for key, value in stats.items():
            self.register_buffer(key, value)

    def affine(self, name: str) -> tuple[Tensor, Tensor]:
        """Offset and scale (dim,) of normalised units; name: state or action."""
        if self.mode == "quantile":
            low = getattr(self, f"{name}_q01")
            high = getattr(self, f"{name}_q99")
            offset = (low + high) / 2
            scale = (high - low) / 2
        else:
            offset = getattr(self, f"{name}_mean")
            scale = getattr(self, f"{name}_std")
        return offset, scale.clamp(min=self.FLOOR)

    def normalize(self, name: str, x: Tensor) -> Tensor:
        """name: state or action; x (..., dim) in the dataset's units."""
        offset, scale = self.affine(name)
        return (x - offset) / scale

    def denormalize(self, name: str, x: Tensor) -> Tensor:
        """The inverse, after a clip to +-5 or, if wider, to the range of the training data."""
        low = self.normalize(name, getattr(self, f"{name}_min"))
        high = self.normalize(name, getattr(self, f"{name}_max"))
        clipped = torch.clamp(x, low.clamp(max=-5), high.clamp(min=5))
        offset, scale = self.affine(name)
        return clipped * scale + offset
