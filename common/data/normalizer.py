"""Statistics of state and action, and the conversion to and from normalised units."""

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
