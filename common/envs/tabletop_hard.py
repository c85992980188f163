"""Two grippers carry a short bar through three rows of pillars: a task with eight right answers.

A Galton board: row i has i + 1 pillars, so behind every gap the next row has a pillar straight
ahead and a way past it on either side. Frames, grippers, actions and failures are those of
common.envs.tabletop.
"""

from functools import partial
from itertools import pairwise, product
from typing import Any

import numpy as np
from numpy.random import Generator

from common.envs import tabletop
from common.envs.demonstrations import shuffled

ROWS = np.array([-0.2, 0.04, 0.28])  # y of the rows of pillars, m
SPACING = 0.2  # of the pillars of a row, m
UPRIGHT = 1.5  # angle of the carried bar, its left end towards the robot, rad


class TabletopHard(tabletop.Tabletop):
    """The bar goes left or right of one pillar in each row: the modes are "LLL", "LLR", ... "RRR".

    observation.environment_state (7,) is the rest of the state: the bar's middle x, y (m) and angle
    (rad, from the left end to the right one), each row's shift along x (m), and the y of the goal
    strip's middle (m). With observation.state it determines the world except for the table's tint.
    Control rate 10 Hz, physics 20 Hz. Success: the whole bar lies released in the strip, at any x;
    if upright, its middle within 4 cm of the strip's.
    """

    name = "tabletop-hard"
    task = "Carry the bar past three rows of pillars and set it down in the green strip."
    MODES = tuple(map("".join, product("LR", repeat=3)))
    MODE_SHARES = (1 / 8,) * 8
    ENVIRONMENT_NAMES = ("bar_x", "bar_y", "bar_angle", "shift_1", "shift_2", "shift_3", "goal_y")
    fps = 10
    ticks = 2
    metadata = {"render_modes": ["rgb_array"], "render_fps": fps}  # noqa: RUF012
    table = (0.5, 0.54)
    bar_length = 0.08
    pillar_radius = 0.03
    goal_half = (0.5, 0.07)
    head_view = ((0.0, -0.6, 1.15), (0.0, -0.06, 0.0))

    def __init__(
        self,
        image_size: tuple[int, int] = (64, 64),
        render_mode: str = "rgb_array",
        max_steps: int = 60,
    ):
        super().__init__(image_size, render_mode, max_steps)

    def expert(self, mode: str | None, rng: Generator) -> "Expert":
        return Expert(self, mode, rng)

    @classmethod
    def demonstrated_mode(cls, seed: int) -> str:
        """The mode of the demonstration reset with `seed`: each once in every eight seeds."""
        return cls.MODES[shuffled(seed, len(cls.MODES))]

    def layout(self) -> None:
        """Draw grippers, bar, the rows' shifts (3,), the goal strip's y and the table's tint."""
        random = self.np_random
        starts = np.array([[-0.14, -0.42], [0.14, -0.42]])
        self.grippers = starts + random.uniform(-0.03, 0.03, (2, 2))
        middle = random.uniform([-0.03, -0.39], [0.03, -0.37])
        self.bar = self.ends(middle, random.uniform(-0.35, 0.35))
        self.shifts = random.uniform(-0.01, 0.01, 3)
        pillars = []
        for row, shift in enumerate(self.shifts):
            for k in range(row + 1):
                pillars.append((shift + SPACING * (k - row / 2), ROWS[row]))
        self.pillars = np.array(pillars)
        self.goal = np.array([0.0, random.uniform(0.42, 0.44)])
        self.tint = random.uniform(0.85, 1.1) * random.uniform(0.94, 1.06, 3)

    def mode(self) -> str | None:
        """The side of the pillar ahead that the bar passed at each row; None until it passed all.

        Gap k of a row leads to pillar k of the next row. A detour to another gap counts as the side
        it went to.
        """
        if not self.sides.all():
            return None
        gaps = [0]  # number of pillars left of the bar, in each row
        for row in np.split(self.sides, [1, 3]):
            gaps.append((row > 0).sum())
        return "".join("R" if after > before else "L" for before, after in pairwise(gaps))

    def observe(self) -> dict[str, np.ndarray]:
        rest = np.array([*self.bar_pose(), *self.shifts, self.goal[1]], np.float32)
        return super().observe() | {"observation.environment_state": rest}


class Expert(tabletop.Expert):
    """Scripted demonstrator: raises the bar upright and carries it through the gaps of its mode."""

    speed = (0.36, 0.42)
    smooth = 3

    def _poses(self):
        """Bar poses: as grasped, before and behind each row, in the goal strip."""
        env: Any = self.env  # a TabletopHard
        noise = self.rng.normal
        knots = [env.bar_pose()]
        gap = 0
        for row, side in enumerate(self.mode):
            gap += side == "R"
            x = env.shifts[row] + SPACING * (gap - (row + 1) / 2) + noise(0, 0.006)
            knots.append((x, ROWS[row] - 0.09, UPRIGHT))
            knots.append((x, ROWS[row] + 0.09, UPRIGHT))
        knots.append((x, env.goal[1] + noise(0, 0.006), UPRIGHT))
        return np.array(knots)


generate = partial(
    tabletop.generate,
    episodes=1000,
    image_size=(64, 64),
    env_type=TabletopHard,
)
