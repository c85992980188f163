"""Two grippers carry a short bar through three rows of pillars: a bimanual task with eight right answers.

A Galton board: row i has i + 1 pillars, so whichever gap the bar came through, the next row has a pillar straight ahead
and a way past it on either side. Frames, grippers, actions and failures are those of common.envs.tabletop.
"""

from itertools import pairwise, product

import gymnasium
import numpy as np

from common.envs import tabletop

ROWS = np.array([-0.2, 0.04, 0.28])  # y of the rows of pillars, m
SPACING = 0.2  # of the pillars of a row, m
UPRIGHT = 1.5  # rad: how the bar is carried, its left end towards the robot


class TabletopHard(tabletop.Tabletop):
    """The bar goes left or right of three pillars, one in each row: a mode is "LLL", "LLR", ... "RRR".

    observation.environment_state (7,) is what else there is to know: the bar's middle x, y (m) and angle (rad, from the
    left end to the right one), how far each row is shifted along x (m), and the y of the goal strip's middle (m). With
    observation.state it tells all that a reset draws but the tint of the table. Control rate 10 Hz, physics 20 Hz.
    Success: the whole bar lies in the strip, at any x, let go of; upright, its middle within 4 cm of the strip's.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (gymnasium's own declaration)
    name, task = (
        "tabletop-hard",
        "Carry the bar past three rows of pillars and set it down in the green strip.",
    )
    MODES, MODE_SHARES = tuple(map("".join, product("LR", repeat=3))), (1 / 8,) * 8
    ENVIRONMENT_NAMES = ("bar_x", "bar_y", "bar_angle", "shift_1", "shift_2", "shift_3", "goal_y")
    fps, ticks = 10, 2
    table = (0.5, 0.54)  # half extents, m
    bar_length, pillar_radius = 0.08, 0.03  # m
    goal_half = (0.5, 0.07)  # m
    head_view = (0.0, -0.6, 1.15), (0.0, -0.06, 0.0)  # m

    def __init__(self, image_size=(64, 64), render_mode="rgb_array", max_steps=60):
        super().__init__(image_size, render_mode, max_steps)
        everything = gymnasium.spaces.Box(-np.pi, np.pi, (len(self.ENVIRONMENT_NAMES),))
        self.observation_space["observation.environment_state"] = everything

    def expert(self, mode, rng):
        """A demonstrator of the episode that reset() began, in `mode` or, if None, one drawn from `rng`."""
        return Expert(self, mode, rng)

    @classmethod
    def demonstrated(cls, seed):
        """The mode of the demonstration that is reset with `seed`: in every eight seeds each once, shuffled."""
        block, place = divmod(seed, len(cls.MODES))
        return cls.MODES[np.random.default_rng([block, 2]).permutation(len(cls.MODES))[place]]

    def layout(self):
        """Draw from np_random: grippers and bar, the shifts of the rows (3,), the goal strip's y, table tint (3,)."""
        random = self.np_random
        self.grippers = np.array([[-0.14, -0.42], [0.14, -0.42]]) + random.uniform(
            -0.03, 0.03, (2, 2)
        )
        self.bar = self.ends(
            random.uniform([-0.03, -0.39], [0.03, -0.37]), random.uniform(-0.35, 0.35)
        )
        self.shifts = random.uniform(-0.01, 0.01, 3)
        rows = zip(range(1, 4), self.shifts, ROWS, strict=True)
        self.pillars = np.array(
            [(shift + SPACING * (k - (n - 1) / 2), y) for n, shift, y in rows for k in range(n)]
        )
        self.goal = np.array([0.0, random.uniform(0.42, 0.44)])
        self.tint = random.uniform(0.85, 1.1) * random.uniform(0.94, 1.06, 3)

    def mode(self):
        """At each row, the side on which the bar passed the pillar ahead; None until it has passed all rows.

        The pillar ahead is the one behind the gap it came through last: gap k of a row leads to pillar k of the next.
        A detour that comes to another gap counts as the side it went to.
        """
        if not self.sides.all():
            return None
        gaps = [0, *((row > 0).sum() for row in np.split(self.sides, [1, 3]))]  # from the left
        return "".join("R" if after > before else "L" for before, after in pairwise(gaps))

    def observe(self, look=True):
        """The observation of this moment, with or without pictures."""
        along = self.bar[1] - self.bar[0]
        everything = [*self.bar.mean(0), np.arctan2(along[1], along[0]), *self.shifts, self.goal[1]]
        return super().observe(look) | {
            "observation.environment_state": np.array(everything, np.float32)
        }


class Expert(tabletop.Expert):
    """Scripted demonstrator: raises the bar upright and carries it through the gaps of its mode."""

    speed, smooth = (0.36, 0.42), 3  # m/s, drawn between; steps over which corners are rounded

    def _poses(self):
        """Bar poses (knots, 3) x, y, angle: as grasped, before and behind each row, in the goal strip."""
        env, noise, gap = self.env, self.rng.normal, 0
        along = env.bar[1] - env.bar[0]
        knots = [(*env.bar.mean(0), np.arctan2(along[1], along[0]))]
        for row, letter in enumerate(self.mode):
            gap += letter == "R"
            x = env.shifts[row] + SPACING * (gap - (row + 1) / 2) + noise(0, 0.006)
            knots += [(x, ROWS[row] + dy, UPRIGHT) for dy in (-0.09, 0.09)]
        knots.append((x, env.goal[1] + noise(0, 0.006), UPRIGHT))
        return np.array(knots)


def generate(root, episodes=1000, seed=0, image_size=(64, 64)):
    """Write `episodes` successful expert episodes to `root`; see common.envs.tabletop.generate."""
    tabletop.generate(root, episodes, seed, image_size, TabletopHard)


gymnasium.register(
    "TabletopHard-v0", "common.envs.tabletop_hard:TabletopHard", disable_env_checker=True
)
