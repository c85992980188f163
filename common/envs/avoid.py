"""A point robot passes three rows of discs, each through any gap: 24 ways to succeed.

State only, so that a policy trains in a minute. The numbers of discs per row and of ways are those
of the task Avoiding of Jia et al. 2024 (arXiv:2402.14606). World frame in metres: the robot starts
near (0, 0), the finish is a line of constant y.
"""

from functools import partial
from itertools import product
from pathlib import Path

import gymnasium
import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from common.envs.demonstrations import Observation, vector, write
from common.envs.geometry import length

RADIUS = 0.06  # of a disc, m; the robot is a point
ROWS = {  # y of a row -> x of its discs, from the left
    0.25: (0.0,),
    0.5: (-0.2, 0.2),
    0.75: (-0.4, 0.0, 0.4),
}
DISCS = np.array([(x, y, RADIUS) for y, row in ROWS.items() for x in row])
GAPS = (  # x of the middles of each row's gaps, from the left
    (-0.2, 0.2),
    (-0.4, 0.0, 0.4),
    (-0.6, -0.2, 0.2, 0.6),
)
MIDDLES = np.array(list(product(*GAPS)))  # (24, 3): x at each row, of every mode
STEP_LIMIT = 0.25  # m per step
FINISH = 0.95  # y of the line, m
STEPS = 25  # of a demonstration
NOISE = 0.03  # standard deviation of x at each row of a demonstration, m
PACE = 0.015  # standard deviation of y at the time when a row is due, m
DEMONSTRATIONS = 960
FIRST_EVALUATION_SEED = 50_000
FEATURES = {
    "observation.state": vector(["x", "y", "vx", "vy"]),
    "action": vector(["x", "y"]),
}
VIEW = (-0.8, 1.1, 0.8, -0.1)  # left, top, right, bottom of the picture, m
SCALE = 240  # pixels per metre
BACKGROUND = (250, 250, 247)
DISC = (108, 108, 118)
GOAL = (186, 226, 187)
PATH = (37, 90, 217)
ROBOT = (206, 32, 32)


def collides(paths: np.ndarray) -> np.ndarray:
    """Which of `paths` (N, T, 2) enter a disc -> (N,) bool. Exact: segments, not samples."""
    paths = np.asarray(paths, float)[:, :, None]
    move = np.diff(paths, axis=1)  # (N, T - 1, 1, 2)
    centre = DISCS[:, :2] - paths[:, :-1]  # (N, T - 1, discs, 2)
    along = (centre * move).sum(-1) / np.maximum((move**2).sum(-1), 1e-300)
    nearest = centre - np.clip(along, 0, 1)[..., None] * move
    return length(nearest).min((1, 2)) < RADIUS


def feasible(paths: np.ndarray) -> np.ndarray:
    """Which of `paths` (N, T, 2) reach the finish without disc or too long a step -> (N,) bool."""
    leaps = length(np.diff(paths.astype(float), axis=1)) > STEP_LIMIT
    return ~collides(paths) & ~leaps.any(1) & (paths[:, -1, 1] >= FINISH)


def modes(paths: np.ndarray) -> np.ndarray:
    """Labels (N,) like "0-2-3" of `paths` (N, T >= 2, 2): each row's gap where it was crossed last.

    Gaps count from the left; the outer ones have no outer end. The label is None if a row was not
    crossed. Repeated points change nothing.
    """
    paths = np.asarray(paths, float)
    number = np.arange(len(paths))
    complete = np.ones(len(paths), bool)
    labels = []
    for row, discs in ROWS.items():
        crosses = np.diff(paths[..., 1] < row, axis=1)
        last = crosses.shape[1] - 1 - crosses[:, ::-1].argmax(1)
        x, y = paths[number, last].T
        dx, dy = (paths[number, last + 1] - paths[number, last]).T
        at = x + dx * (row - y) / np.where(dy == 0, 1, dy)  # dy is 0 only where no step crosses
        labels.append((at[:, None] > discs).sum(1))
        complete &= crosses.any(1)
    names = ["-".join(map(str, gaps)) for gaps in zip(*labels, strict=True)]
    named = np.array(names, object)
    named[~complete] = None
    return named


def states(paths: np.ndarray) -> np.ndarray:
    """Observations (N, T, 4) float32 on `paths` (N, T, 2): x, y (m) and last velocity (m/s).

    The robot enters straight ahead at the demonstrations' speed: a standing start would be an
    outlier among the states.
    """
    paths = np.asarray(paths, float)
    before = paths[:, :1] - [0, 1 / STEPS]
    velocity = np.diff(paths, axis=1, prepend=before) * Avoid.fps
    return np.concatenate([paths, velocity], -1).astype(np.float32)


def expert(starts: np.ndarray, chosen: np.ndarray, rng: Generator) -> np.ndarray:
    """Demonstrated paths (n, 26, 2) float32 from x `starts` (n,), in the modes `chosen` (n,) int.

    They pass a noisy middle of each gap at an even pace, noisy too: x by smoothsteps, y by straight
    lines. A path that is not feasible is drawn again.
    """
    time = 4 * np.arange(STEPS + 1) / STEPS  # knots at 0, 1, ..., 4
    knot = np.minimum(time, 3).astype(int)
    share = time - knot
    weight = np.stack([share**2 * (3 - 2 * share), share], 1)
    paths = np.empty((len(starts), STEPS + 1, 2), np.float32)
    left = np.arange(len(starts))
    while len(left):
        noise = rng.normal(0, 1, (len(left), 4, 2)) * (NOISE, PACE)
        passes = MIDDLES[chosen[left]] + noise[:, :3, 0]
        x = np.column_stack([starts[left], passes, passes[:, 2] + noise[:, 3, 0]])
        y = np.column_stack([np.zeros(len(left)), np.arange(1, 5) / 4 + noise[..., 1]])
        knots = np.stack([x, y], -1)
        paths[left] = knots[:, knot] + weight * (knots[:, knot + 1] - knots[:, knot])
        left = left[~feasible(paths[left])]
    return paths


class Avoid(gymnasium.Env):
    """Observation (4,): see states(). Action (2,): the next position (m), approached straight.

    A step is at most STEP_LIMIT long. Success, reward 1: y has reached FINISH. Failures: "disc" (a
    step enters one) or "timeout". Positions are float32, as actions are: a demonstration replays to
    the bit.
    """

    name = "avoid"
    task = "Pass the three rows of discs and cross the finish line."
    fps = 10  # Hz
    metadata = {"render_modes": ["rgb_array"], "render_fps": fps}  # noqa: RUF012
    MODES = tuple("-".join(gaps) for gaps in product("01", "012", "0123"))
    COUNTS = (DEMONSTRATIONS // len(MODES),) * len(MODES)  # demonstrations of each mode
    MODE_SHARES = tuple(count / DEMONSTRATIONS for count in COUNTS)

    def __init__(self, render_mode: str = "rgb_array", max_steps: int = 32):
        self.render_mode = render_mode
        self.max_steps = max_steps
        self.action_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        state = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32)
        self.observation_space = gymnasium.spaces.Dict({"observation.state": state})

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[Observation, dict]:
        super().reset(seed=seed)
        self.path = np.array([[self.np_random.uniform(-0.1, 0.1), 0]], np.float32)
        self.success = False
        self.mode = None
        self.failure = None
        return self._observation(), self._info()

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict]:
        target = np.asarray(action, float)
        if target.shape != (2,) or not np.isfinite(target).all():
            raise ValueError(
                f"action must be two finite numbers, the next x and y in metres, got {action}"
            )
        move = target - self.path[-1]
        distance = length(move)
        if distance > STEP_LIMIT:
            target = self.path[-1] + move * (STEP_LIMIT / distance)
        self.path = np.concatenate([self.path, target[None].astype(np.float32)])
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
        return {
            "success": self.success,
            "mode": self.mode,
            "failure": self.failure,
            "position": self.path[-1].astype(float),
        }

    def obstacles(self) -> np.ndarray:
        """Discs (6, 3): x, y, radius in metres."""
        return DISCS.copy()

    def render(self) -> np.ndarray:
        """The world from above with the path so far (h, w, 3) uint8; drawn at twice the size."""
        left, top, right, bottom = VIEW
        size = [round(2 * SCALE * side) for side in (right - left, top - bottom)]
        image = Image.new("RGB", size, BACKGROUND)
        draw = ImageDraw.Draw(image)

        def pixel(x, y):
            return 2 * SCALE * (x - left), 2 * SCALE * (top - y)

        def circle(disc, colour):
            x, y, radius = disc
            box = [*pixel(x - radius, y + radius), *pixel(x + radius, y - radius)]
            draw.ellipse(box, fill=colour)

        draw.rectangle([*pixel(left, top), *pixel(right, FINISH)], fill=GOAL)
        for disc in DISCS:
            circle(disc, DISC)
        draw.line([pixel(*point) for point in self.path], fill=PATH, width=5)
        circle((*self.path[-1], 0.015), ROBOT)
        return np.array(image.reduce(2))


class AvoidSkewed(Avoid):
    """The same world; mode k is demonstrated with a frequency of exp(-k / 6), in whole episodes."""

    ENDS = np.cumsum(np.exp(-np.arange(len(Avoid.MODES)) / 6))  # of the modes' shares, unscaled
    COUNTS = tuple(
        np.diff(np.round(DEMONSTRATIONS * ENDS / ENDS[-1]), prepend=0).astype(int).tolist()
    )
    MODE_SHARES = tuple(count / DEMONSTRATIONS for count in COUNTS)


def demonstrations(counts: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, ...]:
    """counts[k] demonstrations of every mode k, shuffled.

    Returns their reset seeds (n,), mode numbers (n,) and paths (n, 26, 2).
    """
    rng = np.random.default_rng(seed)
    env = Avoid()
    chosen = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    seeds = rng.choice(FIRST_EVALUATION_SEED, len(chosen), replace=False)
    first = [env.reset(seed=number)[0]["observation.state"] for number in seeds.tolist()]
    return seeds, chosen, expert(np.array(first)[:, 0], chosen, rng)


def columns(path: np.ndarray) -> dict:
    """The dataset's columns of a path (T, 2): T - 1 states and actions."""
    return {"observation.state": states(path[None])[0, :-1], "action": path[1:]}


def generate(root: Path, seed: int = 0, env_type: type[Avoid] = Avoid) -> None:
    """Write 960 demonstrations of 25 steps to `root`: COUNTS of each mode, in random order.

    They go on to y = 1, a step past the end of an episode in the environment.
    """
    _, _, paths = demonstrations(env_type.COUNTS, seed)
    write(root, env_type, FEATURES, map(columns, paths))


generate_skewed = partial(generate, env_type=AvoidSkewed)
