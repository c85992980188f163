"""Plane vectors, and shapes of the table as a pinhole camera sees them."""

import numpy as np


def length(vectors: np.ndarray) -> np.ndarray:
    """Euclidean length (...) of `vectors` (..., 2)."""
    return np.hypot(vectors[..., 0], vectors[..., 1])


def camera(position: tuple, target: tuple, focal: float, size: tuple[int, int]) -> np.ndarray:
    """Projection (3, 4) from the world to a picture.

    It takes (x, y, z, 1) in metres to picture x, y (pixels), multiplied by depth, and depth (m).
    `position` and `target` (3,) in metres, `focal` in picture heights, `size` (h, w) in pixels.
    """
    height, width = size
    offset = np.subtract(target, position)
    forward = offset / np.linalg.norm(offset)
    x, y, _ = forward
    right = np.array([y, -x, 0.0]) / np.hypot(x, y)
    down = np.cross(forward, right)
    rotation = np.stack([right, down, forward])
    lens = np.array(
        [
            [focal * height, 0, width / 2],
            [0, focal * height, height / 2],
            [0, 0, 1.0],
        ]
    )
    shift = -rotation @ position
    return lens @ np.column_stack([rotation, shift])


def capsules(start: np.ndarray, end: np.ndarray, radius: float, height: float) -> np.ndarray:
    """Outlines (k, 14, 3) of flat capsules from `start` to `end` (k, 2) at `height`; in metres."""
    move = end - start
    along = move / np.linalg.norm(move, axis=1, keepdims=True)
    across = np.stack([-along[:, 1], along[:, 0]], 1)
    angle = np.linspace(-np.pi / 2, np.pi / 2, 7)[:, None]
    arc = radius * (np.cos(angle) * along[:, None] + np.sin(angle) * across[:, None])
    outline = np.concatenate([end[:, None] + arc, start[:, None] - arc], 1)
    z = np.full_like(outline[..., :1], height)
    return np.concatenate([outline, z], 2)


def clip_near(points: np.ndarray, near: float = 0.02) -> np.ndarray:
    """The part of a convex polygon at least `near` metres before the camera, (m, 3) of (n, 3).

    Points are picture x, y and depth, as camera() projects them.
    """
    if points[:, 2].min() >= near:
        return points
    kept = []
    following = np.roll(points, -1, axis=0)
    for a, b in zip(points, following, strict=True):
        depth_a = a[2]
        depth_b = b[2]
        if depth_a >= near:
            kept.append(a)
        if (depth_a >= near) != (depth_b >= near):
            kept.append(a + (b - a) * (near - depth_a) / (depth_b - depth_a))
    return np.array(kept).reshape(-1, 3)
