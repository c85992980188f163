"""Statistics of state and action, and the way to and from normalised units."""

import numpy as np
import torch
from torch import Tensor, nn


def statistics(state: np.ndarray, action: np.ndarray) -> dict[str, Tensor]:
    """state_mean, state_std, ..., action_q99: (dim,) over rows (N, dim); warns of constant dimensions."""
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
        stats |= {f"{name}_{key}": torch.from_numpy(value).float() for key, value in values.items()}
        if constant := np.flatnonzero(values["max"] == values["min"]).tolist():
            print(f"warning: {name} dimensions {constant} are constant over the training episodes")
    return stats


class Normalizer(nn.Module):
    """Per-dimension statistics of state and action, and the way to and from normalised units.

    mean_std: (x - mean) / max(std, 0.01); quantile: [q01, q99] -> [-1, 1]. Saved as dataset_stats.safetensors.
    """

    FLOOR = 1e-2  # in raw units: a joint that hardly moves is not blown up to unit variance

    def __init__(self, mode: str, stats: dict[str, Tensor]):
        super().__init__()
        self.mode = mode
        for key, value in stats.items():
            self.register_buffer(key, value)

    def affine(self, name: str) -> tuple[Tensor, Tensor]:
        """Offset and scale (dim,) of normalised units."""
        if self.mode == "quantile":
            low, high = getattr(self, f"{name}_q01"), getattr(self, f"{name}_q99")
            return (low + high) / 2, ((high - low) / 2).clamp(min=self.FLOOR)
        return getattr(self, f"{name}_mean"), getattr(self, f"{name}_std").clamp(min=self.FLOOR)

    def normalize(self, name: str, x: Tensor) -> Tensor:
        """name: state or action; x (..., dim) in the dataset's units."""
        offset, scale = self.affine(name)
        return (x - offset) / scale

    def denormalize(self, name: str, x: Tensor) -> Tensor:
        """The inverse, after a clip to +-5 or, where that is wider, to the range of the training data."""
        offset, scale = self.affine(name)
        low, high = (self.normalize(name, getattr(self, f"{name}_{end}")) for end in ("min", "max"))
        return torch.clamp(x, low.clamp(max=-5), high.clamp(min=5)) * scale + offset
