"""Two grippers carry a bar around a pillar, on either side: a bimanual task with two right answers.

World frame: x to the right, y away from the robot, metres, origin in the middle of the table.
Motion is planar and kinematic. Pictures are polygons under pinhole cameras, drawn by Pillow at
twice the size and reduced: no GL needed.
"""

import os
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from numpy.random import Generator
from PIL import Image, ImageDraw

from common.envs.demonstrations import Observation, vector, write
from common.envs.geometry import camera, capsules, clip_near, length
from common.progress import progress

CAMERAS = ("cam_head", "cam_left", "cam_right")
BAR_RADIUS = 0.015  # m
GRIPPER_RADIUS = 0.02  # m
BASES = np.array([[-0.4, -0.62], [0.4, -0.62]])  # a gripper points away from the base of its arm
FOCAL = {"cam_head": 1.22, "cam_left": 0.72, "cam_right": 0.72}  # in picture heights
TEXTURE = 1000  # pixels per metre of the table top
BACKGROUND = (30, 30, 30)
GOAL = (90, 184, 92)
RIM = (64, 64, 72)
PILLAR = (108, 108, 118)
WOOD = np.array([[212, 182, 144], [196, 168, 132]])
ARM = (141, 142, 154)
BAR = (206, 32, 32)
FINGER = (24, 24, 24)
LEFT = (37, 90, 217)
RIGHT = (238, 128, 20)


def state_vector(grippers: np.ndarray, grips: np.ndarray | float) -> np.ndarray:
    """State or action (6,) float32 of `grippers` (2, 2) and `grips`, (2,) or one for both."""
    return np.column_stack([grippers, np.broadcast_to(grips, 2)]).ravel().astype(np.float32)


class Tabletop(gymnasium.Env):
    """Observation: state and pictures (h, w, 3) uint8. Action: absolute targets, as the state.

    State (6,): left x, y (m), grip (0 open .. 1 closed), then right. Control rate 20 Hz. A gripper
    takes its own end of the bar, the left one the left end, if its grip passes 0.5 within 5 cm of
    it, and holds it until it opens. Success, reward 1: the bar lies in the goal zone, released
    after both had held it. Failures: "pillar" (bar or gripper touches one), "dropped" (both hold
    the bar, their distance 8 cm off its length), "timeout", or "no_grasp": a timeout before both
    ever held it. With `render_observations = False` observations hold no pictures.
    """

    name = "tabletop"
    task = "Carry the bar around the pillar and set it down in the green zone."
    MODES: tuple[str, ...] = ("left", "right")
    MODE_SHARES: tuple[float, ...] = (0.5, 0.5)
    STATE_NAMES = ("left_x", "left_y", "left_grip", "right_x", "right_y", "right_grip")
    ENVIRONMENT_NAMES: tuple[str, ...] = ()  # of observation.environment_state, if there is one
    fps = 20  # control rate, Hz
    ticks = 1  # of the physics per step
    metadata = {"render_modes": ["rgb_array"], "render_fps": fps}  # noqa: RUF012
    speed_limit = 0.7  # m/s
    grip_speed = 5.0  # 1/s
    grasp_distance = 0.05  # m
    stretch_limit = 0.08  # m
    table = (0.5, 0.4)  # half extents, m
    bar_length = 0.24  # m
    pillar_radius = 0.06  # m
    goal_half = (0.17, 0.06)  # half extents, m
    goal_tolerance = 0.01  # m
    head_view = ((0.0, -0.5, 1.0), (0.0, 0.0, 0.0))  # head camera's position and target, m

    def __init__(
        self,
        image_size: tuple[int, int] = (96, 96),
        render_mode: str = "rgb_array",
        max_steps: int = 150,
    ):
        self.image_size = tuple(image_size)
        self.render_mode = render_mode
        self.max_steps = max_steps
        self.render_observations = True
        half_x, half_y = self.table
        low = np.array([-half_x, -half_y, 0] * 2, np.float32)
        high = np.array([half_x, half_y, 1] * 2, np.float32)
        self.limits = (low, high)
        self.action_space = Box(low, high)
        spaces: dict[str, gymnasium.Space] = {"observation.state": Box(low, high)}
        for name in CAMERAS:
            picture = Box(0, 255, (*self.image_size, 3), np.uint8)
            spaces[f"observation.images.{name}"] = picture
        if self.ENVIRONMENT_NAMES:
            rest = Box(-np.pi, np.pi, (len(self.ENVIRONMENT_NAMES),))
            spaces["observation.environment_state"] = rest
        self.observation_space = gymnasium.spaces.Dict(spaces)

    def expert(self, mode: str | None, rng: Generator) -> "Expert":
        """A demonstrator of the episode that reset() began, in `mode`, or one drawn if None."""
        return Expert(self, mode, rng)

    @classmethod
    def demonstrated_mode(cls, seed: int) -> str | None:
        """The mode of the demonstration reset with `seed`; None: its expert draws one."""
        return None

    def layout(self) -> None:
        """Draw grippers and bar ends (2, 2), pillars (n, 2), goal centre (2,), table tint (3,)."""
        random = self.np_random
        starts = np.array([[-0.28, -0.33], [0.28, -0.33]])
        self.grippers = starts + random.uniform(-0.03, 0.03, (2, 2))
        middle = random.uniform([-0.1, -0.24], [0.1, -0.2])
        self.bar = self.ends(middle, random.uniform(-0.35, 0.35))
        self.pillars = random.uniform([-0.03, -0.02], [0.03, 0.02])[None]
        self.goal = random.uniform([-0.1, 0.28], [0.1, 0.31])
        self.tint = random.uniform(0.85, 1.1) * random.uniform(0.94, 1.06, 3)

    def ends(self, middle: np.ndarray, angle: float) -> np.ndarray:
        """The ends (2, 2), left one first, of a bar with its middle at `middle` (2,)."""
        half = self.bar_length / 2 * np.array([np.cos(angle), np.sin(angle)])
        return np.array([middle - half, middle + half])

    def bar_pose(self) -> tuple[float, float, float]:
        """The bar's middle x, y (m) and angle (rad), from the left end to the right one."""
        along = self.bar[1] - self.bar[0]
        return *self.bar.mean(0), np.arctan2(along[1], along[0])

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[Observation, dict]:
        super().reset(seed=seed)
        self.layout()
        self.grips = np.zeros(2)
        self.held = np.zeros(2, bool)
        self.grasped = False  # whether both grippers ever held the bar
        # The side on which the bar's middle last passed each pillar: -1 left, 1 right, 0 not yet.
        self.sides = np.zeros(len(self.pillars), int)
        self.steps = 0
        self.success = False
        self.failure = None
        self.table_top = None
        return self.observe(), self._info()

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict]:
        target = np.asarray(action, float)
        if target.shape != (6,) or not np.isfinite(target).all():
            raise ValueError(f"action must be six finite numbers (see action_space), got {action}")
        target = np.clip(target, *self.limits).reshape(2, 3)
        self.steps += 1
        for left in range(self.ticks, 0, -1):
            if self.failure is None and not self.success:
                self._tick(target, left)
        terminated = self.success or self.failure is not None
        truncated = not terminated and self.steps >= self.max_steps
        if truncated:
            self.failure = "timeout" if self.grasped else "no_grasp"
        return self.observe(), float(self.success), terminated, truncated, self._info()

    def _tick(self, target, left):
        """One tick of the physics towards `target` (2, 3), to be reached in `left` ticks."""
        rate = self.fps * self.ticks
        move = target[:, :2] - self.grippers
        share = np.minimum(1 / left, self.speed_limit / rate / (length(move) + 1e-12))
        self.grippers = self.grippers + move * share[:, None]
        change = self.grip_speed / rate
        grips = self.grips + np.clip(target[:, 2] - self.grips, -change, change)
        near = length(self.grippers - self.bar) <= self.grasp_distance
        self.held = (grips >= 0.5) & (self.held | (near & (self.grips < 0.5)))
        self.grips = grips
        self.grasped |= bool(self.held.all())
        self.failure = self._carry()
        off = np.abs(self.bar - self.goal)
        in_goal = (off <= np.add(self.goal_half, self.goal_tolerance)).all()
        released = self.grasped and not self.held.any()
        self.success = bool(self.failure is None and released and in_goal)

    def _carry(self):
        """Move the bar with the grippers that hold it; the failure that this causes, or None."""
        if self.held.any():
            if self.held.all():
                span = self.grippers[1] - self.grippers[0]
                if abs(length(span) - self.bar_length) >= self.stretch_limit:
                    return "dropped"
                bar = span / length(span) * self.bar_length
                middle = self.grippers.mean(0)
            else:  # the free end trails behind the held one
                end = int(self.held[1])
                span = (self.bar[1 - end] - self.grippers[end]) * (1 - 2 * end)
                bar = span / length(span) * self.bar_length
                middle = self.grippers[end] + bar * (0.5 - end)
            half = bar / 2
            _, before = self.bar.mean(0)
            self.bar = np.array([middle - half, middle + half])
            x, after = self.bar.mean(0)
            pillar_x, pillar_y = self.pillars.T
            passes = (before < pillar_y) & (after >= pillar_y)
            self.sides[passes] = np.where(x < pillar_x, -1, 1)[passes]
        return "pillar" if self._touches_pillar() else None

    def _touches_pillar(self):
        along = self.bar[1] - self.bar[0]
        share = np.clip((self.pillars - self.bar[0]) @ along / (along @ along), 0, 1)
        to_bar = self.bar[0] + share[:, None] * along - self.pillars
        to_grippers = self.grippers[:, None] - self.pillars
        bar_touches = length(to_bar).min() < self.pillar_radius + BAR_RADIUS
        return bar_touches or length(to_grippers).min() < self.pillar_radius + GRIPPER_RADIUS

    def mode(self) -> str | None:
        """The side on which the bar passed the pillar, one of MODES; None until it has passed."""
        return self.MODES[int(self.sides[0] > 0)] if self.sides.all() else None

    def _info(self):
        return {
            "success": self.success,
            "mode": self.mode(),
            "failure": self.failure,
            "position": self.bar.mean(0),
        }

    def obstacles(self) -> np.ndarray:
        """The pillars (n, 3): x, y and radius in metres."""
        return np.column_stack([self.pillars, np.full(len(self.pillars), self.pillar_radius)])

    def observe(self) -> dict[str, np.ndarray]:
        """The present observation, with pictures if `render_observations`."""
        observation = {"observation.state": state_vector(self.grippers, self.grips)}
        if self.render_observations:
            observation |= self._pictures()
        return observation

    def render(self) -> np.ndarray:
        """The three pictures side by side (h, 3 w, 3) uint8."""
        return np.concatenate(list(self._pictures().values()), axis=1)

    def cameras(self) -> dict[str, np.ndarray]:
        """Projections (3, 4) of CAMERAS; a wrist camera looks forward over its gripper."""
        views = {"cam_head": self.head_view}
        for name, at, heading in zip(CAMERAS[1:], self.grippers, self._headings(), strict=True):
            views[name] = ((*(at - 0.08 * heading), 0.2), (*(at + 0.1 * heading), 0.0))
        return {name: camera(*view, FOCAL[name], self.image_size) for name, view in views.items()}

    def _headings(self):
        headings = self.grippers - BASES
        return headings / np.linalg.norm(headings, axis=1, keepdims=True)

    def _paint_table(self):
        """The table top seen from above, with goal and pillars: the same for a whole episode."""
        half = np.array(self.table)
        width, depth = (2 * half * TEXTURE).round().astype(int)
        column = np.arange(width) * 10 // TEXTURE  # squares of 10 cm
        row = np.arange(depth) * 10 // TEXTURE
        wood = np.clip(WOOD * self.tint, 0, 255).astype(np.uint8)
        image = Image.fromarray(wood[(column + row[:, None]) % 2])
        draw = ImageDraw.Draw(image)

        def box(centre, size):
            middle = (half + centre) * TEXTURE
            reach = np.multiply(size, TEXTURE)
            return [*(middle - reach), *(middle + reach)]

        draw.rectangle(box(self.goal, self.goal_half), fill=GOAL)
        for pillar in self.pillars:
            draw.ellipse(box(pillar, (self.pillar_radius,) * 2), fill=RIM)
            draw.ellipse(box(pillar, (self.pillar_radius * 0.8,) * 2), fill=PILLAR)
        return image

    def _pictures(self):
        self.table_top = table_top = self.table_top or self._paint_table()
        shapes = list(self._shapes())
        pictures = {}
        for name, projection in self.cameras().items():
            pictures[f"observation.images.{name}"] = self._picture(table_top, projection, shapes)
        return pictures

    def _shapes(self):
        """Outlines (14, 3) in metres of arms, bar, hands and fingers, with their colours."""
        headings = self._headings()
        across = np.stack([headings[:, 1], -headings[:, 0]], 1)
        wrist = self.grippers - 0.065 * headings
        palm = self.grippers - 0.05 * headings
        tip = self.grippers + 0.015 * headings
        side = 0.03 * across
        spread = (0.012 + 0.016 * (1 - self.grips))[:, None] * across
        parts = [  # starts, ends, radius, height, colours
            (BASES, wrist, 0.018, 0.03, (ARM, ARM)),
            (self.bar[:1], self.bar[1:], BAR_RADIUS, 0.015, (BAR,)),
            (palm - side, palm + side, 0.016, 0.03, (LEFT, RIGHT)),
            (palm - spread, tip - spread, 0.006, 0.035, (FINGER, FINGER)),
            (palm + spread, tip + spread, 0.006, 0.035, (FINGER, FINGER)),
        ]
        for start, end, radius, height, colours in parts:
            yield from zip(capsules(start, end, radius, height), colours, strict=True)

    def _picture(self, table_top, projection, shapes):
        """The picture (h, w, 3) uint8 of one camera, drawn at twice the size and reduced."""
        height, width = self.image_size
        half_x, half_y = self.table
        to_metres = np.array([[1 / TEXTURE, 0, -half_x], [0, 1 / TEXTURE, -half_y], [0, 0, 1]])
        projection = projection * np.array([[2], [2], [1]])
        to_texture = np.linalg.inv(projection[:, [0, 1, 3]] @ to_metres)
        to_texture = to_texture / to_texture[2, 2]  # finite: no camera sees the horizon
        image = table_top.transform(
            (2 * width, 2 * height),
            Image.Transform.PERSPECTIVE,
            to_texture.ravel()[:8].tolist(),
            fillcolor=BACKGROUND,
        )
        draw = ImageDraw.Draw(image)
        for outline, colour in shapes:
            points = clip_near(outline @ projection[:, :3].T + projection[:, 3])
            if len(points):
                draw.polygon((points[:, :2] / points[:, 2:]).ravel().tolist(), fill=colour)
        return np.array(image.reduce(2))


class Expert:
    """Scripted demonstrator: reads the simulator's state and plays one episode after reset().

    mode: one of the environment's MODES, or None to draw one.
    """

    speed = (0.3, 0.36)  # range from which it is drawn, m/s
    smooth = 9  # steps over which corners are rounded

    def __init__(self, env: Tabletop, mode: str | None, rng: Generator):
        self.env = env
        self.rng = rng
        self.mode = mode or env.MODES[rng.integers(len(env.MODES))]
        self.script = self._script()

    def __call__(self) -> np.ndarray:
        """The next action (6,) float32."""
        return next(self.script)

    def _script(self):
        """Yield the actions of approach, grasp, carry and release."""
        env = self.env
        step = self.rng.uniform(*self.speed) / env.fps
        ends = env.bar + self.rng.normal(0, 0.006, (2, 2))
        travel = [length(ends - env.grippers).max()]
        approach = np.stack([env.grippers.ravel(), ends.ravel()])
        for grippers in self._path(approach, travel, step):
            yield state_vector(grippers.reshape(2, 2), 0)
        while env.grips.min() < 1:
            yield state_vector(ends, 1)
        poses = self._poses()
        change = np.diff(poses, axis=0)
        travel = length(change) + env.bar_length / 2 * np.abs(change[:, 2])
        for pose in self._path(poses, travel, step):
            ends = env.ends(pose[:2], pose[2])
            yield state_vector(ends, 1)
        while True:
            yield state_vector(ends, 0)

    def _poses(self):
        """Bar poses (knots, 3), as bar_pose(): as grasped, beside the pillar, past it, in the goal.

        Beside the pillar the bar's outer end goes first.
        """
        env = self.env
        noise = self.rng.normal
        pillar_x, pillar_y = env.pillars[0]
        side = 1 if self.mode == "right" else -1
        x = pillar_x + side * (0.2 + noise(0, 0.008))
        upright = side * (1.4 + noise(0, 0.05))
        knots = [
            env.bar_pose(),
            (x, pillar_y - 0.12 + noise(0, 0.008), upright),
            (x, pillar_y + 0.2 + noise(0, 0.008), upright),
            (*(env.goal + noise(0, 0.008, 2)), noise(0, 0.06)),
        ]
        return np.array(knots)

    def _path(self, knots, travel, step):
        """Points (n, d) through `knots` (k, d), with rounded corners.

        They are `step` apart by the distances `travel` (k - 1,) between knots.
        """
        time = np.concatenate([[0], np.cumsum(travel)]) / step
        reach = self.smooth // 2
        at = np.clip(np.arange(-reach, np.ceil(time[-1]) + 2 * reach + 1), 0, time[-1])
        kernel = np.full(self.smooth, 1 / self.smooth)
        columns = [np.interp(at, time, column) for column in knots.T]
        return np.stack([np.convolve(column, kernel, "valid") for column in columns], 1)


def demonstrate(
    seed: int,
    env_type: type[Tabletop],
    image_size: tuple[int, int],
    actions: np.ndarray | None = None,
    render: bool = True,
) -> dict[str, np.ndarray] | None:
    """One expert episode as dataset columns {key: (n, ...)}; None if it failed.

    actions (m, 6): done instead of the expert's, the last one until the end.
    """
    env = env_type(image_size)
    env.render_observations = render
    observation, info = env.reset(seed=seed)
    expert = env.expert(env_type.demonstrated_mode(seed), np.random.default_rng([seed, 1]))
    rows = []
    done = False
    while not done:
        action = expert() if actions is None else actions[min(len(rows), len(actions) - 1)]
        rows.append(observation | {"action": action})
        observation, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
    if not info["success"]:
        return None
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def generate(
    root: Path,
    episodes: int = 300,
    image_size: tuple[int, int] = (96, 96),
    env_type: type[Tabletop] = Tabletop,
    demonstrate: Callable = demonstrate,
    extra_features: dict | None = None,
) -> None:
    """Write `episodes` successful expert episodes to `root` as a LeRobot v3.0 dataset.

    Reset seeds count up from 0; evaluation starts at 50000. The result does not depend on the
    number of processes.
    demonstrate: makes an episode, as demonstrate() does; extra_features: of columns that it adds.
    """
    features = {"observation.state": vector(env_type.STATE_NAMES)}
    if env_type.ENVIRONMENT_NAMES:
        features["observation.environment_state"] = vector(env_type.ENVIRONMENT_NAMES)
    for name in CAMERAS:
        features[f"observation.images.{name}"] = {
            "dtype": "video",
            "shape": [*image_size, 3],
            "names": ["height", "width", "channel"],
        }
    features["action"] = vector(env_type.STATE_NAMES)
    features |= extra_features or {}
    run = partial(demonstrate, env_type=env_type, image_size=tuple(image_size))
    write(root, env_type, features, _successes(run, episodes))


def _successes(run, count):
    """The first `count` of run(0), run(1), ... that are not None."""
    first = 0
    workers = min(os.cpu_count() or 1, 16, count)
    bar = progress(total=count, desc="demonstrations")
    with get_context("spawn").Pool(workers) as pool, bar:
        while bar.n < count:
            wave = min(count - bar.n, 32)  # bounds the episodes held in memory
            for episode in pool.imap(run, range(first, first + wave)):
                if episode is not None:
                    yield episode
                    bar.update()
            first += wave
