"""Evaluate a checkpoint: closed loop in an environment, or open loop on held-out episodes.

    python evaluate.py --checkpoint ~/runs/vfp_tabletop --env tabletop --episodes 100 --nfe 1 2 4 10
    python evaluate.py --checkpoint ~/runs/my_robot

Writes results.json, plots, and in closed loop a video of the first episodes. All but the times
repeats bit for bit, for a seed and a batch size.
"""

import argparse
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from tqdm import tqdm

from common import metrics, plots, run
from common.checkpoint import find_checkpoint
from common.config import UserError, nearest, show
from common.envs.registry import ENVIRONMENTS
from common.files import require_writable, write_json
from common.open_loop import open_loop
from common.policy import ActionPolicy
from common.progress import progress
from common.robot import Observation, Robot, open_action_policy

FIRST_SEED = 50_000  # of evaluation episodes; demonstrations are reset with smaller ones
ENDS = ("success", "is_success")  # keys of info that tell how an episode ended


def whole(low: int, high: int = 10**6) -> Callable[[str], int]:
    """Reads an argument that is a whole number from low to high."""

    def read(text):
        value = int(text) if re.fullmatch(r"-?\d{1,20}", text) else None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"expected a whole number from {low} to {high}, found {show(text)}"
            )
        return value

    return read


def amount(text: str) -> float:
    """Reads an argument that is a number from 0 to a million."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1e6, found {show(text)}")
    return value


def named_path(text: str) -> tuple[str, str]:
    """Reads an argument NAME=PATH."""
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, found {show(text)}")
    return name, path


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    natural = whole(0)
    count = whole(1)
    add("--checkpoint", type=Path, required=True, help="a run folder (its newest) or a checkpoint")
    add(
        "--env",
        help=f"{', '.join(ENVIRONMENTS)}, or a gymnasium id, module:Id; left out: open loop",
    )
    add(
        "--data",
        help="open loop: the dataset, if it is no longer where it was for training; or another "
        "one, whose episodes are all new (--new_episodes)",
    )
    add(
        "--new_episodes",
        action="store_true",
        help="open loop: evaluate episodes, too, that the run neither trained on nor held out",
    )
    add(
        "--other_units",
        action="store_true",
        help="evaluate although states or actions look as if they had other units than in training",
    )
    add(
        "--samples",
        type=count,
        default=1,
        help="open loop: chunks drawn per observation; the best one is reported too (1)",
    )
    add("--episodes", type=count, default=100, help="closed loop: episodes per NFE (100)")
    add(
        "--nfe",
        type=count,
        nargs="+",
        help="evaluations per chunk, each of which is reported (1 2 4 10; open loop: 10); single "
        "episodes are drawn at the last one",
    )
    add(
        "--replan_steps",
        type=count,
        help="steps from one plan to the next (8; the whole chunk after data.first_frames: 1)",
    )
    add(
        "--delay",
        type=natural,
        default=0,
        help="steps from an observation until its chunk acts: real-time chunking (0)",
    )
    add(
        "--ensemble",
        type=amount,
        metavar="M",
        help="average the chunks that cover a step, weights exp(-M age rank)",
    )
    add(
        "--hold",
        type=amount,
        default=2.0,
        help="seconds for which a latent keeps its noise; 0: new in each plan (2)",
    )
    add("--max_steps", type=count, default=5000, help="after which an episode has failed (5000)")
    add(
        "--guidance",
        type=amount,
        metavar="W",
        help="of a policy with classifier-free guidance (as it was configured)",
    )
    add(
        "--temperature",
        type=amount,
        metavar="TAU",
        help="of such a policy's prior; 0: the most likely codes",
    )
    add(
        "--experts",
        type=count,
        metavar="K",
        help="of a mixture, that decode together (as it was configured: 1)",
    )
    add("--batch", type=count, default=50, help="episodes that run side by side (50)")
    add("--seed", type=whole(0, 2**63 - 1), default=0, help="of the policy's noise (0)")
    add("--videos", type=natural, default=6, help="episodes in the video; 0: none (6)")
    add(
        "--weights",
        type=named_path,
        nargs="*",
        default=[],
        metavar="NAME=PATH",
        help="where frozen weights are now",
    )
    add(
        "--script",
        type=Path,
        metavar="PATH",
        help="the training script of the checkpoint, if it is not beside common/: it is run",
    )
    add(
        "--plugins",
        nargs="+",
        default=[],
        metavar="NAME",
        help="modules of the checkpoint's blocks that are not the project's: they are imported",
    )
    add(
        "--out",
        type=Path,
        help="folder of the results (evaluation/<env>, or evaluation/open_loop, of the run)",
    )
    return parser.parse_args(argv)


@dataclass
class Episode:
    """How an episode went: its end, the robot's path, the expert of each plan, obstacles (n, 3).

    pictures: of the video, where it is filmed.
    """

    success: bool = False
    mode: str | None = None
    failure: str | None = None
    path: list = field(default_factory=list)
    experts: list = field(default_factory=list)
    obstacles: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))
    pictures: list = field(default_factory=list)

    def record(self, env: gymnasium.Env, info: dict[str, Any], film: bool) -> None:
        position = info.get("position")
        if np.shape(position) == (2,):
            self.path.append(np.array(position, float))
        picture = env.render() if film else None
        if picture is not None:
            self.pictures.append(picture)


def rollout(
    robot: Robot,
    args: argparse.Namespace,
    make: Callable[[], gymnasium.Env],
    seeds: Sequence[int],
    film: int,
    timed: bool,
    bar: tqdm,
) -> tuple[list[Episode], list[float]]:
    """Environments side by side in one clock -> their Episodes, times of single chunks if `timed`.

    film: how many of the first environments are filmed.
    """
    envs = [make() for _ in seeds]
    episodes = [Episode() for _ in seeds]
    robot.reset([("episode", args.seed, seed) for seed in seeds])
    observations: dict[int, dict[str, np.ndarray]] = {}
    for i, (env, seed) in enumerate(zip(envs, seeds, strict=True)):
        observations[i], info = env.reset(seed=seed)
        episodes[i].record(env, info, i < film)
        if hasattr(env.unwrapped, "obstacles"):
            episodes[i].obstacles = env.unwrapped.obstacles()
    times: list[float] = []
    tick = 0
    while observations:
        active = list(observations)
        keys = [*robot.data.state_keys, *robot.data.cameras.values()]
        actions = robot.act(side_by_side([observations[i] for i in active], keys), active)
        if timed and tick == 0:
            times = metrics.times(partial(robot.plan, active[:1]))
        if robot.replanned and robot.experts is not None:
            for i, expert in zip(active, robot.experts, strict=True):
                episodes[i].experts.append(expert)
        tick += 1
        for i, action in zip(active, actions, strict=True):
            # Pictures that the robot does not look at need not be drawn.
            envs[i].unwrapped.render_observations = robot.needs_pictures
            observations[i], _, terminated, truncated, info = envs[i].step(action)
            episodes[i].record(envs[i], info, i < film)
            truncated = truncated or tick == args.max_steps
            if terminated or truncated:
                close_episode(episodes[i], info, truncated, args.env)
                envs[i].close()
                del observations[i]
                bar.update()
    return episodes, times


def side_by_side(observations: list[Observation], keys: list[str]) -> Observation:
    """One observation with a row for each of several: of those keys that all of them have.

    Raises UserError if they differ in shape.
    """
    rows = {}
    for key in keys:
        if all(key in observation for observation in observations):
            values = [np.asarray(observation[key]) for observation in observations]
            shapes = {value.shape for value in values}
            if len(shapes) > 1:
                raise UserError(f"--env: {key} differs in shape from episode to episode: {shapes}")
            rows[key] = np.stack(values)
    return rows


def close_episode(episode: Episode, info: dict[str, Any], truncated: bool, name: str) -> None:
    """How it ended, by the environment's last info."""
    ends = [info[key] for key in ENDS if key in info]
    if not ends:
        raise UserError(
            f"--env: {name} must tell info['success'] when it ends; it tells {list(info)}"
        )
    episode.success = bool(ends[0])
    mode = info.get("mode")
    episode.mode = None if mode is None else str(mode)
    episode.failure = str(info.get("failure") or ("timeout" if truncated else "unnamed"))


def environment(
    policy: ActionPolicy, data: Any, args: argparse.Namespace
) -> tuple[Callable[[], gymnasium.Env], gymnasium.Env]:
    """(function that makes one, one of them), checked against what the policy needs."""
    name = ENVIRONMENTS.get(args.env, args.env)
    make = partial(gymnasium.make, name, disable_env_checker=True)
    try:
        trial = make()
    except (gymnasium.error.Error, ImportError) as e:
        hint = nearest(args.env, [*ENVIRONMENTS, *gymnasium.registry])
        raise UserError(
            f"--env: no environment '{args.env}'{hint}\n    ({type(e).__name__}: {e})"
        ) from e
    if "rgb_array" in trial.metadata.get("render_modes", []) and trial.render_mode is None:
        make.keywords["render_mode"] = "rgb_array"
        with renderable(args.env):
            trial = make()
    args.videos = args.videos if trial.render_mode else 0
    if args.videos:
        trial.reset(seed=0)
        with renderable(args.env):
            picture = trial.render()
        check_picture(picture, args.env)
    check_environment(trial, policy, data, args.columns)
    return make, trial.unwrapped


@contextmanager
def renderable(name: str) -> Iterator[None]:
    """Turn errors of an environment that is asked for pictures into a UserError."""
    try:
        yield
    except (TypeError, NotImplementedError) as e:
        raise UserError(
            f"--env: {name}: an environment that names rgb_array among its render_modes takes "
            f"render_mode and has render()\n    ({type(e).__name__}: {e})"
        ) from e


def check_picture(picture: Any, name: str) -> None:
    """Raise UserError unless render() gives a picture for the video, or None."""
    if picture is None:
        return
    found = np.asarray(picture)
    if found.dtype != np.uint8 or found.ndim != 3 or found.shape[2] != 3:
        raise UserError(
            f"--env: {name}: render() gives {found.dtype} {found.shape}, expected a uint8 picture "
            "(h, w, 3); --videos 0 films none"
        )


def check_environment(
    env: gymnasium.Env, policy: ActionPolicy, data: Any, columns: dict[str, int]
) -> None:
    """Raise UserError unless it has the keys, the rate and the dimensions of the training data.

    columns: numbers that each column had in training, as far as the checkpoint records them.
    """
    name = env.spec.id
    spaces = dict(getattr(env.observation_space, "spaces", {}))
    missing = [key for key in [*data.state_keys, *data.cameras.values()] if key not in spaces]
    if missing:
        raise UserError(
            f"--env: {name} does not give {missing}, which the policy was trained on; "
            f"it gives {list(spaces)}"
        )
    hz = env.metadata.get("render_fps")
    if hz != data.HZ:
        raise UserError(
            f"--env: {name} runs at {hz} Hz, the policy at {data.HZ:g} "
            "(its render_fps, and data.HZ)"
        )
    sizes = {}
    for key in data.state_keys:
        shape = spaces[key].shape
        if shape is None:
            raise UserError(f"--env: {name}: {key} is {spaces[key]}, the policy takes numbers")
        sizes[key] = int(np.prod(shape))
        if sizes[key] != columns.get(key, sizes[key]):
            raise UserError(
                f"--env: {name}: {key} has {sizes[key]} numbers, in training {columns[key]}"
            )
    found = (sum(sizes.values()), *(env.action_space.shape or ()))
    trained = (len(policy.stats.state_mean), len(policy.stats.action_mean))
    if found != trained:
        raise UserError(
            f"--env: {name} has (state, action) of {found} numbers, "
            f"the policy was trained on {trained}"
        )


def closed_loop(policy: ActionPolicy, cfg: Any, args: argparse.Namespace) -> None:
    """Success per NFE over the same episodes; success.png, if possible tracks.png, modes.png."""
    make, world = environment(policy, cfg.data, args)
    names = [str(name) for name in getattr(world, "MODES", None) or ()]
    shares = getattr(world, "MODE_SHARES", None)
    if args.replan_steps is None:
        horizon = cfg.data.action_horizon
        args.replan_steps = horizon if cfg.data.first_frames == 1 else min(8, horizon)
    rows = []
    played = {}
    for nfe in args.nfe:
        robot = Robot(
            policy,
            cfg,
            nfe,
            args.replan_steps,
            args.delay,
            args.ensemble,
            args.hold,
            args.precision,
            threaded=False,
            check_units=not args.other_units,
            columns=args.columns,
        )
        film = args.videos if nfe == args.nfe[-1] else 0
        episodes, times = play(robot, args, make, nfe, film)
        played[f"NFE {nfe}"] = episodes
        rows.append({"nfe": nfe, **metrics.summary(episodes, names, shares, times)})
        if policy.experts > 1 and names:
            rows[-1] |= metrics.experts(episodes, names, policy.experts)
    print_results(policy, cfg.data, args, robot, rows, names)
    settings = ("replan_steps", "batch", "seed", "hold", "ensemble", "delay")
    results = {
        "env": args.env,
        **{key: getattr(args, key) for key in settings},
        "conditioned": robot.continues,
        "results": rows,
    }
    # Before anything is drawn: the costly part is safe.
    write_json({**args.about, **results}, args.out / "results.json")
    with plots.decoration(args.out / "success.png") as file:
        plots.draw_success(rows, file)
    if all(episode.path for episode in played[f"NFE {args.nfe[0]}"]):
        with plots.decoration(args.out / "tracks.png") as file:
            plots.draw_paths(played, names, file)
    if names:
        with plots.decoration(args.out / "modes.png") as file:
            plots.draw_mode_shares(rows, names, shares, file)
    if "experts" in rows[-1]:
        title = f"successes at NFE {args.nfe[-1]}, {args.env}"
        with plots.decoration(args.out / "experts.png") as file:
            plots.draw_expert_use(rows[-1]["experts"], title, args.log, file)
    reel = [(episode.pictures, episode.success) for episode in episodes if episode.pictures]
    if reel:
        with plots.decoration(args.out / "episodes.mp4") as file:
            plots.write_video(reel, cfg.data.HZ, file)


def play(
    robot: Robot,
    args: argparse.Namespace,
    make: Callable[[], gymnasium.Env],
    nfe: int,
    film: int,
) -> tuple[list[Episode], list[float]]:
    """args.episodes episodes, args.batch of them side by side; times of single chunks."""
    seeds = range(FIRST_SEED, FIRST_SEED + args.episodes)
    episodes: list[Episode] = []
    times: list[float] = []
    with progress(total=args.episodes, desc=f"NFE {nfe}", unit="episode") as bar:
        for start in range(0, args.episodes, args.batch):
            part = seeds[start : start + args.batch]
            filmed = max(film - start, 0)
            more, of_part = rollout(robot, args, make, part, filmed, start == 0, bar)
            episodes += more
            times += of_part
    succeeded = sum(episode.success for episode in episodes)
    # Whoever interrupts the next NFE, or reads the log of a job, knows this one.
    print(f"NFE {nfe}: {succeeded} of {args.episodes} episodes succeeded", flush=True)
    return episodes, times


def print_results(
    policy: ActionPolicy,
    data: Any,
    args: argparse.Namespace,
    robot: Robot,
    rows: list[dict[str, Any]],
    names: Sequence[str],
) -> None:
    how = [f"a chunk of {data.action_horizon} every {args.replan_steps} steps"]
    if args.delay:
        given = "continues the running chunk" if robot.continues else "skips its first actions"
        trained = policy.weights.prefix
        how.append(f"acts {args.delay} steps late and {given} (loss.prefix {trained})")
    else:
        how.append("acts at once")
    if args.ensemble is not None:
        how.append(f"averaged with m = {args.ensemble:g}")
    if policy.has_latent:
        how.append(f"the latent's noise is held for {args.hold:g} s")
    how += [f"{name} {value:g}" for name, value in args.about["sampling"].items()]
    print(f"\n{'; '.join(how)}")
    print(metrics.table(rows, names))
    last = rows[-1]
    if "experts" in last:
        print(
            f"NFE {last['nfe']}: mutual information of mode and expert: "
            f"{last['expert_information'] or 0:.3f} of its maximum; the least used expert has "
            f"{last['least_load']:.2f} of an even share"
        )


def set_sampling(policy: Any, args: argparse.Namespace) -> dict[str, float]:
    """Put the options given here in place of the policy's; all that it has, to report."""
    has = {} if policy.sampling is None else asdict(policy.sampling)
    for name in ("guidance", "temperature", "experts"):
        value = getattr(args, name)
        if value is None:
            continue
        if name not in has:
            raise UserError(f"--{name}: {args.checkpoint} holds a policy without it")
        setattr(policy.sampling, name, value)
        has[name] = value
    policy.check_sampling()
    return has


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    args.nfe = list(dict.fromkeys(args.nfe or ([1, 2, 4, 10] if args.env else [10])))
    folder = find_checkpoint(args.checkpoint)
    policy, cfg, meta = open_action_policy(
        folder, dict(args.weights), script=args.script, plugins=args.plugins
    )
    sampling = set_sampling(policy, args)
    args.out = (args.out or folder.parent / "evaluation" / (args.env or "open_loop")).expanduser()
    require_writable(args.out, "--out")
    args.log = folder.parent / "log.jsonl"
    args.precision = meta.get("mixed_precision", "no")
    args.columns = meta.get("columns", {})
    args.about = {
        "checkpoint": str(args.checkpoint),
        "policy": Path(meta["script"]).stem,
        "step": meta["step"],
        "sampling": sampling,
        "parameters": sum(p.numel() for p in policy.parts.parameters() if p.requires_grad),
    }
    if args.env:
        closed_loop(policy, cfg, args)
    else:
        open_loop(policy, cfg, meta, args)
    print(f"\nwritten to {args.out}")
    return 0


if __name__ == "__main__":
    run.cli(main)
