"""Two grippers carry a bar around a pillar, on either side, and set it down: a bimanual task with two right answers.

World frame: x to the right, y away from the robot, metres, origin in the middle of the table. Motion is planar and
kinematic; pictures are polygons under pinhole cameras, drawn by Pillow at twice the size and reduced: no GL needed.
"""

import os
from functools import partial
from multiprocessing import get_context

import gymnasium
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

CAMERAS = ("cam_head", "cam_left", "cam_right")
BAR_RADIUS, GRIPPER_RADIUS = 0.015, 0.02  # m; neither may touch a pillar
BASES = np.array([[-0.4, -0.62], [0.4, -0.62]])  # a gripper points away from the base of its arm
FOCAL = {"cam_head": 1.22, "cam_left": 0.72, "cam_right": 0.72}  # in picture heights
TEXTURE = 1000  # pixels per metre of the table top
BACKGROUND, GOAL, RIM, PILLAR = (30, 30, 30), (90, 184, 92), (64, 64, 72), (108, 108, 118)
WOOD = np.array([[212, 182, 144], [196, 168, 132]])
ARM, BAR, FINGER, LEFT, RIGHT = (
    (141, 142, 154),
    (206, 32, 32),
    (24, 24, 24),
    (37, 90, 217),
    (238, 128, 20),
)


def camera(position, target, focal, size):
    """Projection (3, 4) from the world (m, homogeneous) to picture x, y (pixels, scaled by depth) and depth (m).

    `position` and `target` (3,) in metres, `focal` in picture heights, `size` (h, w) in pixels.
    """
    height, width = size
    forward = np.subtract(target, position) / np.linalg.norm(np.subtract(target, position))
    right = np.array([forward[1], -forward[0], 0.0]) / np.hypot(forward[0], forward[1])
    rotation = np.stack([right, np.cross(forward, right), forward])
    lens = np.array([[focal * height, 0, width / 2], [0, focal * height, height / 2], [0, 0, 1.0]])
    return lens @ np.column_stack([rotation, -rotation @ position])


def capsules(start, end, radius, height, points=7):
    """Outlines (k, 2 points, 3) of k flat capsules from `start` to `end` (k, 2); `radius` and `height` (k,); in m."""
    along = (end - start) / np.linalg.norm(end - start, axis=1, keepdims=True)
    across = np.stack([-along[:, 1], along[:, 0]], 1)
    angle = np.linspace(-np.pi / 2, np.pi / 2, points)
    arc = radius[:, None, None] * (
        np.cos(angle)[:, None] * along[:, None] + np.sin(angle)[:, None] * across[:, None]
    )
    outline = np.concatenate([end[:, None] + arc, start[:, None] - arc], 1)
    return np.concatenate(
        [outline, np.broadcast_to(height[:, None, None], (*outline.shape[:2], 1))], 2
    )


def clip_near(points, near=0.02):
    """The part of a convex polygon (n, 3), homogeneous pixels, that lies at least `near` metres before the camera."""
    kept = []
    for a, b in zip(points, np.roll(points, -1, axis=0), strict=True):
        if a[2] >= near:
            kept.append(a)
        if (a[2] >= near) != (b[2] >= near):
            kept.append(a + (b - a) * (near - a[2]) / (b[2] - a[2]))
    return np.array(kept).reshape(-1, 3)


class Tabletop(gymnasium.Env):
    """Observation: the state and pictures (h, w, 3) uint8. Action: absolute targets at 20 Hz, laid out as the state.

    State (6,): left x, y (m), grip (0 open .. 1 closed), then right. A gripper that closes (its grip passes 0.5) within
    5 cm of its own end of the bar, the left one of the left end, holds it until it opens. Success, reward 1: the bar
    lies in the goal zone, let go after both had held it. Failures: "pillar" (bar or gripper touches one), "dropped"
    (both hold it, their distance 8 cm off its length), "timeout", or "no_grasp": a timeout before both ever held it.
    With `look = False` reset() and step() give no pictures; observe() draws them whenever it is called.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012 (gymnasium's own declaration)
    name, task = "tabletop", "Carry the bar around the pillar and set it down in the green zone."
    MODES, MODE_SHARES = ("left", "right"), (0.5, 0.5)
    STATE_NAMES = ("left_x", "left_y", "left_grip", "right_x", "right_y", "right_grip")
    ENVIRONMENT_NAMES = ()  # of observation.environment_state; none: no such observation
    fps, ticks = 20, 1  # control rate, Hz; ticks of the physics per step
    speed_limit, grip_speed = 0.7, 5.0  # m/s, 1/s
    grasp_distance, stretch_limit = 0.05, 0.08  # m
    table = (0.5, 0.4)  # half extents, m
    bar_length, pillar_radius = 0.24, 0.06  # m
    goal_half, goal_tolerance = (0.17, 0.06), 0.01  # m
    head_view = (0.0, -0.5, 1.0), (0.0, 0.0, 0.0)  # m: where the head camera is, what it looks at

    def __init__(self, image_size=(96, 96), render_mode="rgb_array", max_steps=150):
        self.image_size, self.render_mode, self.max_steps, self.look = (
            tuple(image_size),
            render_mode,
            max_steps,
            True,
        )
        low, high = (
            np.float32([-self.table[0], -self.table[1], 0] * 2),
            np.float32([*self.table, 1] * 2),
        )
        self.action_space = gymnasium.spaces.Box(low, high)
        picture = gymnasium.spaces.Box(0, 255, (*self.image_size, 3), np.uint8)
        self.observation_space = gymnasium.spaces.Dict(
            {"observation.state": gymnasium.spaces.Box(low, high)}
            | {f"observation.images.{name}": picture for name in CAMERAS}
        )

    def expert(self, mode, rng):
        """A demonstrator of the episode that reset() began, in `mode` or, if None, one drawn from `rng`."""
        return Expert(self, mode, rng)

    @classmethod
    def demonstrated(cls, seed):
        """The mode of the demonstration that is reset with `seed`. Here None: its expert draws one."""

    def layout(self):
        """Draw from np_random: grippers and bar ends (2, 2), pillars (n, 2), goal centre (2,), table tint (3,)."""
        random = self.np_random
        self.grippers = np.array([[-0.28, -0.33], [0.28, -0.33]]) + random.uniform(
            -0.03, 0.03, (2, 2)
        )
        middle, angle = random.uniform([-0.1, -0.24], [0.1, -0.2]), random.uniform(-0.35, 0.35)
        self.bar = self.ends(middle, angle)
        self.pillars = random.uniform([-0.03, -0.02], [0.03, 0.02])[None]
        self.goal = random.uniform([-0.1, 0.28], [0.1, 0.31])
        self.tint = random.uniform(0.85, 1.1) * random.uniform(0.94, 1.06, 3)

    def ends(self, middle, angle):
        """The ends (2, 2), left one first, of a bar with its middle at `middle` (2,)."""
        half = self.bar_length / 2 * np.array([np.cos(angle), np.sin(angle)])
        return np.array([middle - half, middle + half])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.layout()
        self.grips, self.held, self.grasped = np.zeros(2), np.zeros(2, bool), False
        self.sides = np.zeros(
            len(self.pillars), int
        )  # -1 or 1: where the bar's centre last passed each pillar's y
        self.steps, self.success, self.failure, self.table_top = 0, False, None, None
        return self.observe(self.look), self._info()

    def step(self, action):
        target = np.asarray(action, float)
        if target.shape != (6,) or not np.isfinite(target).all():
            raise ValueError(f"action must be six finite numbers (see action_space), got {action}")
        target = np.clip(target, self.action_space.low, self.action_space.high).reshape(2, 3)
        self.steps += 1
        for left in range(self.ticks, 0, -1):
            if self.failure is None and not self.success:
                self._tick(target, left)
        terminated = self.success or self.failure is not None
        truncated = not terminated and self.steps >= self.max_steps
        if truncated:
            self.failure = "timeout" if self.grasped else "no_grasp"
        return self.observe(self.look), float(self.success), terminated, truncated, self._info()

    def _tick(self, target, left):
        """One tick of the physics towards `target` (2, 3), to be reached in `left` ticks."""
        rate = self.fps * self.ticks
        move = target[:, :2] - self.grippers
        distance = np.hypot(move[:, 0], move[:, 1])
        share = np.minimum(1 / left, self.speed_limit / rate / (distance + 1e-12))
        self.grippers = self.grippers + move * share[:, None]
        change = self.grip_speed / rate
        grips = self.grips + np.clip(target[:, 2] - self.grips, -change, change)
        near = np.hypot(*(self.grippers - self.bar).T) <= self.grasp_distance
        self.held = (grips >= 0.5) & (self.held | (near & (self.grips < 0.5)))
        self.grips = grips
        self.grasped |= bool(self.held.all())
        self.failure = self._carry()
        in_goal = (
            np.abs(self.bar - self.goal) <= np.add(self.goal_half, self.goal_tolerance)
        ).all()
        self.success = bool(
            self.failure is None and self.grasped and in_goal and not self.held.any()
        )

    def _carry(self):
        """Move the bar with what holds it; the failure this causes, or None."""
        before = self.bar.mean(0)
        if self.held.any():
            if self.held.all():
                span = self.grippers[1] - self.grippers[0]
                distance = np.hypot(*span)
                if abs(distance - self.bar_length) >= self.stretch_limit:
                    return "dropped"
                middle = self.grippers.mean(0)
            else:  # the free end trails behind the held one
                first = int(self.held[1])
                span = (self.bar[1 - first] - self.grippers[first]) * (1 - 2 * first)
                distance = np.hypot(*span)
                middle = self.grippers[first] + span / distance * self.bar_length * (0.5 - first)
            half = span / distance * self.bar_length / 2
            self.bar = np.array([middle - half, middle + half])
            after = self.bar.mean(0)
            passes = (before[1] < self.pillars[:, 1]) & (after[1] >= self.pillars[:, 1])
            self.sides = np.where(
                passes, np.where(after[0] < self.pillars[:, 0], -1, 1), self.sides
            )
        along = self.bar[1] - self.bar[0]
        share = np.clip((self.pillars - self.bar[0]) @ along / (along @ along), 0, 1)
        to_bar = self.bar[0] + share[:, None] * along - self.pillars
        to_grippers = self.grippers[:, None] - self.pillars
        touches = np.hypot(to_bar[:, 0], to_bar[:, 1]).min() < self.pillar_radius + BAR_RADIUS
        touches |= (
            np.hypot(to_grippers[..., 0], to_grippers[..., 1]).min()
            < self.pillar_radius + GRIPPER_RADIUS
        )
        return "pillar" if touches else None

    def mode(self):
        """Which way the bar went, one of MODES; None until it has passed the pillar."""
        return self.MODES[(self.sides[0] + 1) // 2] if self.sides.all() else None

    def _info(self):
        info = {"success": self.success, "mode": self.mode(), "failure": self.failure}
        return info | {"position": self.bar.mean(0)}

    def obstacles(self):
        """The pillars (n, 3): x, y and radius in metres."""
        return np.column_stack([self.pillars, np.full(len(self.pillars), self.pillar_radius)])

    def observe(self, look=True):
        """The observation of this moment, with or without pictures."""
        state = np.column_stack([self.grippers, self.grips]).ravel().astype(np.float32)
        return {"observation.state": state} | (self._pictures() if look else {})

    def render(self):
        """The three pictures side by side (h, 3 w, 3) uint8."""
        return np.concatenate(list(self._pictures().values()), axis=1)

    def cameras(self):
        """Projections (3, 4) of CAMERAS to pixels of the pictures; a wrist camera looks forward over its gripper."""
        views = {"cam_head": self.head_view}
        for name, at, heading in zip(CAMERAS[1:], self.grippers, self._headings(), strict=True):
            views[name] = (*(at - 0.08 * heading), 0.2), (*(at + 0.1 * heading), 0.0)
        return {name: camera(*view, FOCAL[name], self.image_size) for name, view in views.items()}

    def _headings(self):
        headings = self.grippers - BASES
        return headings / np.linalg.norm(headings, axis=1, keepdims=True)

    def _paint_table(self):
        """The table top seen from above, with goal and pillars: what every camera of an episode looks down on."""
        size = (2 * np.array(self.table) * TEXTURE).round().astype(int)
        x, y = (np.arange(n) * 10 // TEXTURE for n in size)  # squares of 10 cm
        wood = np.clip(WOOD * self.tint, 0, 255).astype(np.uint8)
        image = Image.fromarray(wood[(x + y[:, None]) % 2])
        draw = ImageDraw.Draw(image)

        def box(centre, half):
            corner = (np.array(self.table) + centre) * TEXTURE
            return [*(corner - np.multiply(half, TEXTURE)), *(corner + np.multiply(half, TEXTURE))]

        draw.rectangle(box(self.goal, self.goal_half), fill=GOAL)
        for pillar in self.pillars:
            draw.ellipse(box(pillar, (self.pillar_radius,) * 2), fill=RIM)
            draw.ellipse(box(pillar, (self.pillar_radius * 0.8,) * 2), fill=PILLAR)
        return image

    def _pictures(self):
        if self.table_top is None:
            self.table_top = self._paint_table()
        headings, size = self._headings(), (2 * self.image_size[1], 2 * self.image_size[0])
        across = np.stack([headings[:, 1], -headings[:, 0]], 1)
        wrist, palm = self.grippers - 0.065 * headings, self.grippers - 0.05 * headings
        spread = (0.012 + 0.016 * (1 - self.grips))[:, None] * across
        tip = self.grippers + 0.015 * headings
        starts = [BASES, self.bar[:1], palm - 0.03 * across, palm - spread, palm + spread]
        ends = [wrist, self.bar[1:], palm + 0.03 * across, tip - spread, tip + spread]
        colours = [ARM, ARM, BAR, LEFT, RIGHT, FINGER, FINGER, FINGER, FINGER]
        radius = np.array([0.018, 0.018, BAR_RADIUS, 0.016, 0.016, *[0.006] * 4])
        height = np.array([0.03, 0.03, 0.015, 0.03, 0.03, *[0.035] * 4])
        outlines = capsules(np.concatenate(starts), np.concatenate(ends), radius, height)
        to_metres = np.array(
            [[1 / TEXTURE, 0, -self.table[0]], [0, 1 / TEXTURE, -self.table[1]], [0, 0, 1]]
        )
        pictures = {}
        for name, projection in self.cameras().items():
            projection = projection * np.array([[2], [2], [1]])  # drawn at twice the size
            back = np.linalg.inv(
                projection[:, [0, 1, 3]] @ to_metres
            )  # finite: no camera sees the horizon
            back = (back / back[2, 2]).ravel()[:8].tolist()
            image = self.table_top.transform(
                size, Image.Transform.PERSPECTIVE, back, fillcolor=BACKGROUND
            )
            draw = ImageDraw.Draw(image)
            for points, colour in zip(
                outlines @ projection[:, :3].T + projection[:, 3], colours, strict=True
            ):
                points = points if points[:, 2].min() > 0.02 else clip_near(points)
                if len(points):
                    draw.polygon((points[:, :2] / points[:, 2:]).ravel().tolist(), fill=colour)
            pictures[f"observation.images.{name}"] = np.array(image.reduce(2))
        return pictures


class Expert:
    """Scripted demonstrator: reads the simulator's state, plays one episode from reset() on in `mode` (None: drawn)."""

    speed, smooth = (0.3, 0.36), 9  # m/s, drawn between; steps over which corners are rounded

    def __init__(self, env, mode, rng):
        self.env, self.rng = env, rng
        self.mode = mode or env.MODES[rng.integers(len(env.MODES))]
        self.script = self._script()

    def __call__(self):
        """The next action (6,) float32."""
        return np.array(next(self.script), np.float32)

    def _script(self):
        """Yield the actions of approach, grasp, carry and release."""
        env, rng = self.env, self.rng
        speed = rng.uniform(*self.speed) / env.fps
        ends = env.bar + rng.normal(0, 0.006, (2, 2))
        travel = [np.hypot(*(ends - env.grippers).T).max()]
        for x in self._path(np.stack([env.grippers.ravel(), ends.ravel()]), travel, speed):
            yield *x[:2], 0, *x[2:], 0
        while env.grips.min() < 1:
            yield *ends[0], 1, *ends[1], 1
        poses = self._poses()
        travel = np.hypot(*np.diff(poses[:, :2], axis=0).T) + env.bar_length / 2 * np.abs(
            np.diff(poses[:, 2])
        )
        for x, y, angle in self._path(poses, travel, speed):
            ends = env.ends((x, y), angle)
            yield *ends[0], 1, *ends[1], 1
        while True:
            yield *ends[0], 0, *ends[1], 0

    def _poses(self):
        """Bar poses (knots, 3) x, y, angle: as grasped, beside the pillar (outer end first), past it, in the goal."""
        env, noise = self.env, self.rng.normal
        side = 1 if self.mode == "right" else -1
        along = env.bar[1] - env.bar[0]
        beside, upright = (
            env.pillars[0, 0] + side * (0.2 + noise(0, 0.008)),
            side * (1.4 + noise(0, 0.05)),
        )
        knots = [
            (*env.bar.mean(0), np.arctan2(along[1], along[0])),
            (beside, env.pillars[0, 1] - 0.12 + noise(0, 0.008), upright),
            (beside, env.pillars[0, 1] + 0.2 + noise(0, 0.008), upright),
            (*(env.goal + noise(0, 0.008, 2)), noise(0, 0.06)),
        ]
        return np.array(knots)

    def _path(self, knots, travel, step):
        """Points (n, d) through `knots` (k, d), `step` apart by their distances `travel` (k - 1,); corners rounded."""
        time = np.concatenate([[0], np.cumsum(travel)]) / step
        reach = self.smooth // 2
        at = np.clip(np.arange(-reach, np.ceil(time[-1]) + 2 * reach + 1), 0, time[-1])
        kernel = np.full(self.smooth, 1 / self.smooth)
        return np.stack(
            [np.convolve(np.interp(at, time, column), kernel, "valid") for column in knots.T], 1
        )


def demonstrate(seed, world, image_size, actions=None, look=True):
    """One expert episode as dataset columns {key: (n, ...)}, None where the expert failed. The seed decides it all.

    actions (m, 6): what is done in place of the expert's, the last one until the end. look: whether pictures are drawn.
    """
    env = world(image_size)
    env.look = look
    observation, info = env.reset(seed=seed)
    expert, rows, done = (
        env.expert(world.demonstrated(seed), np.random.default_rng([seed, 1])),
        [],
        False,
    )
    while not done:
        action = expert() if actions is None else actions[min(len(rows), len(actions) - 1)]
        rows.append(observation | {"action": action})
        observation, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
    return (
        {key: np.stack([row[key] for row in rows]) for key in rows[0]} if info["success"] else None
    )


def generate(
    root,
    episodes=300,
    seed=0,
    image_size=(96, 96),
    world=Tabletop,
    demonstrate=demonstrate,
    more=None,
):
    """Write `episodes` successful expert episodes of `world` to `root` as a LeRobot v3.0 dataset.

    demonstrate: what makes an episode of a seed; more: features that it adds.

    Reset seeds count up from seed * 100000; the result does not depend on the number of processes. Evaluation resets
    with 50000 and up.
    """
    from common.data.writer import (
        DatasetWriter,
    )  # here: acting in the environment needs neither pyarrow nor av

    def vector(names):
        return {"dtype": "float32", "shape": [len(names)], "names": list(names)}

    picture = {"dtype": "video", "shape": [*image_size, 3], "names": ["height", "width", "channel"]}
    features = {"observation.state": vector(world.STATE_NAMES)}
    if world.ENVIRONMENT_NAMES:
        features["observation.environment_state"] = vector(world.ENVIRONMENT_NAMES)
    features |= {f"observation.images.{name}": picture for name in CAMERAS}
    writer = DatasetWriter(
        root, world.fps, features | {"action": vector(world.STATE_NAMES)} | (more or {}), world.name
    )
    run, reset_seed = (
        partial(demonstrate, world=world, image_size=tuple(image_size)),
        seed * 100_000,
    )
    workers = min(os.cpu_count(), 16, episodes)
    with (
        get_context("spawn").Pool(workers) as pool,
        tqdm(total=episodes, desc="demonstrations") as bar,
    ):
        while bar.n < episodes:
            wave = min(
                episodes - bar.n, 32
            )  # bounds the episodes that wait for the writer in memory
            for episode in pool.imap(run, range(reset_seed, reset_seed + wave)):
                if episode is not None:
                    writer.add_episode(episode, task=world.task)
                    bar.update()
            reset_seed += wave
    writer.finish()


# gymnasium's checker takes the first step() with `look = False` for an error.
gymnasium.register("Tabletop-v0", "common.envs.tabletop:Tabletop", disable_env_checker=True)
