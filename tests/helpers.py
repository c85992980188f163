"""Helpers that several test modules share."""

import numpy as np

# environments


def still(env, grip=None):
    """The action that holds the grippers where they are, at `grip` or the present one."""
    grips = env.grips if grip is None else np.full(2, grip)
    return np.column_stack([env.grippers, grips]).ravel()


def carry(env, *centres, angle=0.0, steps=30):
    """Move the held bar through `centres` in straight lines at one angle; the last result."""
    half = env.bar_length / 2 * np.array([np.cos(angle), np.sin(angle)])
    for centre in centres:
        start = env.grippers.mean(0)
        for share in np.linspace(0, 1, steps + 1)[1:]:
            middle = start + share * (np.array(centre) - start)
            result = env.step([*(middle - half), 1, *(middle + half), 1])
            if result[2] or result[3]:
                return result
    return result


def pinhole(point, position, target, focal, size):
    """Pixel of a world point by angles: yaw, then pitch. Written without geometry.camera()."""
    dx, dy, dz = np.subtract(target, position)
    yaw, pitch = np.arctan2(dx, dy), np.arctan2(-dz, np.hypot(dx, dy))
    x, y, z = np.subtract(point, position)
    x, y = x * np.cos(yaw) - y * np.sin(yaw), x * np.sin(yaw) + y * np.cos(yaw)
    y, z = y * np.cos(pitch) - z * np.sin(pitch), y * np.sin(pitch) + z * np.cos(pitch)
    return size[1] / 2 + focal * size[0] * x / y, size[0] / 2 - focal * size[0] * z / y
