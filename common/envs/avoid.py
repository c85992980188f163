"""A point robot passes three rows of discs, each through any gap: 24 ways to succeed, all equally good.

State only, so that a policy trains in a minute; the number of discs per row and of ways is that of Jia et al. 2024
(arXiv:2402.14606), task Avoiding. World frame in metres: the robot starts near (0, 0), the finish lies along y.
"""

from itertools import product

import gymnasium
import numpy as np
from PIL import Image, ImageDraw

TASK = "Pass the three rows of discs and cross the finish line."
RADIUS = 0.06  # m; the robot is a point
ROWS = (
    (0.25, (0.0,)),
    (0.5, (-0.2, 0.2)),
    (0.75, (-0.4, 0.0, 0.4)),
)  # y, and x of the discs from the left
ROW_Y = np.array([y for y, _ in ROWS])
DISCS = np.array([(x, y, RADIUS) for y, row in ROWS for x in row])
CENTRES = (
    (-0.2, 0.2),
    (-0.4, 0.0, 0.4),
    (-0.6, -0.2, 0.2, 0.6),
)  # x of each row's gaps from the left
GAPS = np.array(
    list(product(*(range(len(row)) for row in CENTRES)))
)  # (24, 3): gap taken in each row, per mode
FPS, STEP_LIMIT, FINISH = 10, 0.25, 0.95  # Hz, m per step, m
STEPS, NOISE, PACE = (
    25,
    0.03,
    0.015,
)  # of a demonstration; standard deviation at each row: of x, of y when due, m
DEMONSTRATIONS, FIRST_EVALUATION_SEED = 960, 50_000
VIEW, SCALE = (
    (-0.8, 1.1, 0.8, -0.1),
    240,
)  # left, top, right, bottom of the picture in m; pixels per metre
BACKGROUND, DISC, GOAL, PATH, ROBOT = (
    (250, 250, 247),
    (108, 108, 118),
    (186, 226, 187),
    (37, 90, 217),
    (206, 32, 32),
)


def collides(paths):
    """Whether each of the polylines `paths` (N, T, 2) enters a disc -> (N,) bool. Exact: segments, not samples."""
    paths = np.asarray(paths, float)[:, :, None]
    move, centre = np.diff(paths, axis=1), DISCS[:, :2] - paths[:, :-1]  # (N, T - 1, 1 or discs, 2)
    along = (centre * move).sum(-1) / np.maximum((move**2).sum(-1), 1e-300)
    nearest = centre - np.clip(along, 0, 1)[..., None] * move
    return (np.hypot(nearest[..., 0], nearest[..., 1]) < DISCS[:, 2]).any((1, 2))


def modes(paths):
    """Labels (N,) like "0-2-3" of `paths` (N, T >= 2, 2): each row's gap from the left, where it was crossed last.

    The outer gaps have no outer end. None for a path that has not crossed every row. Repeated points change nothing.
    """
    paths = np.asarray(paths, float)
    number, labels, complete = np.arange(len(paths)), [], np.ones(len(paths), bool)
    for row, discs in ROWS:
        crosses = np.diff(paths[..., 1] < row, axis=1)
        last = crosses.shape[1] - 1 - crosses[:, ::-1].argmax(1)
        (x, y), (dx, dy) = paths[number, last].T, (paths[number, last + 1] - paths[number, last]).T
        at = x + dx * (row - y) / np.where(dy == 0, 1, dy)  # dy is 0 only where no step crosses
        labels.append((at[:, None] > discs).sum(1))
        complete &= crosses.any(1)
    names = ["-".join(map(str, gaps)) for gaps in zip(*labels, strict=True)]
    return np.where(complete, np.array(names, object), None)


def states(paths):
    """What a robot on `paths` (N, T, 2) observes: (N, T, 4) float32 x, y (m) and the last step's velocity (m/s).

    It enters straight ahead at the demonstrations' speed: a standing start would be an outlier among the states.
    """
    paths = np.asarray(paths, float)
    before = paths[:, :1] - np.array([0, 1 / STEPS])
    return np.concatenate([paths, np.diff(paths, axis=1, prepend=before) * FPS], -1).astype(
        np.float32
    )


def expert(starts, chosen, rng):
    """Demonstrated paths (n, 26, 2) float32 from x `starts` (n,), in the modes with the indices `chosen` (n,).

    Through a noisy middle of each gap at an even pace, noisy too; x goes by smoothsteps, y by straight lines. A path is
    drawn again while it enters a disc, asks for a longer step than the robot takes, or ends before the finish.
    """
    middles = np.stack(
        [np.array(row)[gaps] for row, gaps in zip(CENTRES, GAPS[chosen].T, strict=True)], 1
    )
    time = 4 * np.arange(STEPS + 1) / STEPS  # knots at 0, 1, ..., 4
    knot = np.minimum(time, 3).astype(int)
    share = time - knot
    paths, left = np.empty((len(starts), STEPS + 1, 2), np.float32), np.arange(len(starts))
    while len(left):
        noise = rng.normal(0, 1, (len(left), 4, 2)) * (NOISE, PACE)
        passes = middles[left] + noise[:, :3, 0]
        x = np.column_stack([starts[left], passes, passes[:, 2] + noise[:, 3, 0]])
        y = np.column_stack([np.zeros(len(left)), np.arange(1, 5) / 4 + noise[..., 1]])
        paths[left, :, 0] = x[:, knot] + share**2 * (3 - 2 * share) * (x[:, knot + 1] - x[:, knot])
        paths[left, :, 1] = y[:, knot] + share * (y[:, knot + 1] - y[:, knot])
        moves = np.diff(paths[left].astype(float), axis=1)
        bad = collides(paths[left]) | (np.hypot(moves[..., 0], moves[..., 1]) > STEP_LIMIT).any(1)
        left = left[bad | (paths[left, -1, 1] < FINISH)]
    return paths


class Avoid(gymnasium.Env):
    """Observation (4,): see states(). Action (2,): the next position (m), which the robot moves straight towards.

    A step is at most STEP_LIMIT long. Success, reward 1: y has reached FINISH. Failures: "disc" (the way of a step
    enters one) or "timeout". Positions are float32, as actions are: a demonstration replays to the bit.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}  # noqa: RUF012 (gymnasium's own declaration)
    MODES = tuple("-".join(map(str, gaps)) for gaps in GAPS)
    COUNTS = (DEMONSTRATIONS // len(MODES),) * len(MODES)  # demonstrations of each mode
    MODE_SHARES = tuple(count / DEMONSTRATIONS for count in COUNTS)

    def __init__(self, render_mode="rgb_array", max_steps=32):
        self.render_mode, self.max_steps = render_mode, max_steps
        self.action_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        state = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32)
        self.observation_space = gymnasium.spaces.Dict({"observation.state": state})

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.path = np.array([[self.np_random.uniform(-0.1, 0.1), 0]], np.float32)
        self.success, self.mode, self.failure = False, None, None
        return self._observation(), self._info()

    def step(self, action):
        target = np.asarray(action, float)
        if target.shape != (2,) or not np.isfinite(target).all():
            raise ValueError(
                f"action must be two finite numbers, the next x and y in metres, got {action}"
            )
        move = target - self.path[-1]
        distance = np.hypot(*move)
        reached = (
            target if distance <= STEP_LIMIT else self.path[-1] + move * (STEP_LIMIT / distance)
        )
        self.path = np.concatenate([self.path, reached[None].astype(np.float32)])
        if np.diff(
            self.path[-2:, 1, None] < ROW_Y, axis=0
        ).any():  # the mode changes where a row is crossed
            self.mode = modes(self.path[None])[0]
        if collides(self.path[None, -2:])[0]:
            self.failure = "disc"
        self.success = bool(self.failure is None and self.path[-1, 1] >= FINISH)
        terminated = self.success or self.failure is not None
        truncated = not terminated and len(self.path) > self.max_steps
        if truncated:
            self.failure = "timeout"
        return self._observation(), float(self.success), terminated, truncated, self._info()

    def _observation(self):
        return {"observation.state": states(self.path[None, -2:])[0, -1]}

    def _info(self):
        position = self.path[-1].astype(float)
        return {
            "success": self.success,
            "mode": self.mode,
            "failure": self.failure,
            "position": position,
        }

    def obstacles(self):
        """Discs (6, 3): x, y, radius in metres."""
        return DISCS.copy()

    def render(self):
        """The world from above with the way so far (h, w, 3) uint8; drawn at twice the size and reduced."""
        left, top, right, bottom = VIEW
        image = Image.new(
            "RGB", [round(2 * SCALE * side) for side in (right - left, top - bottom)], BACKGROUND
        )
        draw = ImageDraw.Draw(image)

        def pixel(x, y):
            return 2 * SCALE * (x - left), 2 * SCALE * (top - y)

        draw.rectangle([*pixel(left, top), *pixel(right, FINISH)], fill=GOAL)
        for x, y, radius in DISCS:
            draw.ellipse(
                [*pixel(x - radius, y + radius), *pixel(x + radius, y - radius)], fill=DISC
            )
        draw.line([pixel(*point) for point in self.path], fill=PATH, width=5)
        x, y = self.path[-1]
        draw.ellipse([*pixel(x - 0.015, y + 0.015), *pixel(x + 0.015, y - 0.015)], fill=ROBOT)
        return np.array(image.reduce(2))


class AvoidSkewed(Avoid):
    """The same world, whose demonstrations take mode k with a frequency of exp(-k / 6), rounded to whole episodes."""

    ENDS = np.cumsum(np.exp(-np.arange(len(Avoid.MODES)) / 6))
    COUNTS = tuple(
        np.diff(np.round(DEMONSTRATIONS * ENDS / ENDS[-1]), prepend=0).astype(int).tolist()
    )
    MODE_SHARES = tuple(count / DEMONSTRATIONS for count in COUNTS)


def demonstrations(counts, seed=0):
    """counts[k] demonstrations of every mode k, shuffled: reset seeds (n,), mode indices (n,), paths (n, 26, 2)."""
    rng, env = np.random.default_rng(seed), Avoid()
    chosen = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    seeds = rng.choice(FIRST_EVALUATION_SEED, len(chosen), replace=False)
    starts = np.array(
        [env.reset(seed=number)[0]["observation.state"][0] for number in seeds.tolist()]
    )
    return seeds, chosen, expert(starts, chosen, rng)


def generate(root, seed=0, env=Avoid):
    """Write 960 demonstrations of 25 steps to `root` as a LeRobot v3.0 dataset: 40 of each mode, in random order.

    They go on to y = 1, a step past where the environment ends.
    """
    from common.data.writer import (
        DatasetWriter,
    )  # here: acting in the environment needs neither pyarrow nor av

    state = {"dtype": "float32", "shape": [4], "names": ["x", "y", "vx", "vy"]}
    features = {
        "observation.state": state,
        "action": {"dtype": "float32", "shape": [2], "names": ["x", "y"]},
    }
    writer, paths = DatasetWriter(root, FPS, features, "avoid"), demonstrations(env.COUNTS, seed)[2]
    for state, action in zip(states(paths)[:, :-1], paths[:, 1:], strict=True):
        writer.add_episode({"observation.state": state, "action": action}, task=TASK)
    writer.finish()


def generate_skewed(root, seed=0):
    """The same with AvoidSkewed's frequencies."""
    generate(root, seed, AvoidSkewed)


gymnasium.register("Avoid-v0", "common.envs.avoid:Avoid")
gymnasium.register("AvoidSkewed-v0", "common.envs.avoid:AvoidSkewed")
