"""Registers the environments with gymnasium, and their demonstrations as values of data.root.

Importing it registers. Entry points are text: an environment's module is imported on first use.
"""

import gymnasium

from common.data import generated

ENVIRONMENTS = {  # evaluate.py --env -> gymnasium id
    "tabletop": "Tabletop-v0",
    "tabletop-hard": "TabletopHard-v0",
    "avoid": "Avoid-v0",
    "avoid-skewed": "AvoidSkewed-v0",
}

gymnasium.register("Avoid-v0", "common.envs.avoid:Avoid")
gymnasium.register("AvoidSkewed-v0", "common.envs.avoid:AvoidSkewed")
# gymnasium's checker rejects a first step() without pictures (render_observations = False).
gymnasium.register("Tabletop-v0", "common.envs.tabletop:Tabletop", disable_env_checker=True)
gymnasium.register(
    "TabletopHard-v0",
    "common.envs.tabletop_hard:TabletopHard",
    disable_env_checker=True,
)

generated.register("tabletop", "common.envs.tabletop:generate")
generated.register("tabletop-hard", "common.envs.tabletop_hard:generate")
generated.register("tabletop-mixed", "common.envs.mixed:generate_tabletop")
generated.register("avoid", "common.envs.avoid:generate")
generated.register("avoid-skewed", "common.envs.avoid:generate_skewed")
generated.register("avoid-mixed", "common.envs.mixed:generate_avoid")
