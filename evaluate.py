"""Evaluate a checkpoint: closed loop in an environment, or open loop on the held-out episodes of its dataset.

    python evaluate.py --checkpoint ~/runs/vfp_tabletop --env tabletop --episodes 100 --nfe 1 2 4 10
    python evaluate.py --checkpoint ~/runs/my_robot

Writes results.json, plots, and in closed loop a video of the first episodes. But for the times it repeats bit for bit,
for a seed and a batch size.
"""

import argparse
import json
from collections import deque
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import torch
from tqdm import tqdm

from common import metrics, plots, run
from common.checkpoint import newest, open_policy, read_meta
from common.config import UserError, nearest
from common.data.images import IMAGE, resize
from common.data.loader import Data, locate, to_device
from common.flow import Execution
from common.noise import RowNoise

ENVIRONMENTS = {  # a module that registers it, and its id: so does gymnasium name any other
    "tabletop": "common.envs.tabletop:Tabletop-v0",
    "tabletop-hard": "common.envs.tabletop_hard:TabletopHard-v0",
    "avoid": "common.envs.avoid:Avoid-v0",
    "avoid-skewed": "common.envs.avoid:AvoidSkewed-v0",
}
FIRST_SEED = 50_000  # of evaluation episodes; demonstrations are reset with smaller ones


def at_least(low, text):
    if (number := int(text)) < low:
        raise argparse.ArgumentTypeError(f"{text} is not at least {low}")
    return number


def amount(text):
    if not 0 <= (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return number


def arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, natural, count = parser.add_argument, partial(at_least, 0), partial(at_least, 1)
    add(
        "--checkpoint", type=Path, required=True, help="a run folder (its newest) or one checkpoint"
    )
    add(
        "--env",
        help=f"{', '.join(ENVIRONMENTS)}, or a gymnasium id, module:Id; left out: open loop",
    )
    add("--data", help="open loop: the dataset, if it is no longer where it was for training")
    add(
        "--samples",
        type=count,
        default=1,
        help="open loop: chunks drawn per look; the best one is reported too (1)",
    )
    add("--episodes", type=count, default=100, help="episodes per NFE (100)")
    add(
        "--nfe",
        type=count,
        nargs="+",
        default=[1, 2, 4, 10],
        help="evaluations per chunk; open loop: the last one",
    )
    add(
        "--execute",
        type=count,
        help="steps from one look to the next (8; all of a chunk after data.first_frames: 1)",
    )
    add(
        "--delay",
        type=natural,
        default=0,
        help="steps from a look until its chunk acts: real-time chunking (0)",
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
        help="seconds for which a latent keeps its noise; 0: new at each look (2)",
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
    add("--seed", type=int, default=0, help="of the policy's noise (0)")
    add("--videos", type=natural, default=6, help="episodes in the video; 0: none (6)")
    add(
        "--weights", nargs="*", default=[], metavar="NAME=PATH", help="where frozen weights are now"
    )
    add(
        "--out",
        type=Path,
        help="folder of what is written (evaluation/<env>, or evaluation/open_loop, of the run)",
    )
    return parser.parse_args(argv)


@dataclass
class Episode:
    """What is kept of one: how it ended, where the robot was at each tick, which expert each look chose, the obstacles
    (n, 3), pictures if filmed."""

    success: bool = False
    mode: str | None = None
    failure: str | None = None
    path: list = field(default_factory=list)
    experts: list = field(default_factory=list)
    obstacles: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))
    pictures: list = field(default_factory=list)


class Looker:
    """What the policy sees of n environments: histories of states and, resized, of pictures, oldest first."""

    def __init__(self, cfg, n, device):
        self.cfg, self.device = cfg, device
        self.states = [deque(maxlen=cfg.obs_proprio_history) for _ in range(n)]
        self.pictures = [
            {name: deque(maxlen=cfg.obs_images_history) for name in cfg.cameras} for _ in range(n)
        ]

    def remember(self, i, observation):
        """One tick of environment i; its first fills the history, as in training. Pictures may be absent."""
        state = np.concatenate(
            [np.ravel(observation[key]) for key in self.cfg.state_keys], dtype=np.float32
        )
        self.states[i].extend([state] * (1 if self.states[i] else self.cfg.obs_proprio_history))
        for name, frames in self.pictures[i].items():
            if (image := observation.get(self.cfg.cameras[name])) is not None:
                image = resize(image, tuple(self.cfg.image_size)).transpose(2, 0, 1)
                frames.extend([image] * (1 if frames else self.cfg.obs_images_history))

    def batch(self, rows):
        """Device batch of the environments `rows`."""
        batch = {"observation.state": torch.from_numpy(np.array([self.states[i] for i in rows]))}
        for name in self.cfg.cameras:
            images = torch.from_numpy(np.array([self.pictures[i][name] for i in rows]))
            batch[IMAGE + name] = images[:, 0] if self.cfg.obs_images_history == 1 else images
        return to_device(batch, self.device)


@torch.no_grad()
def act(policy, args, looker, rows, keys, nfe, prefix):
    """Chunks (B, T, A) for the environments `rows`, with noise of their keys, continuing `prefix` (B, d, A) or None.

    Beside them, of a mixture, the expert of each.
    """
    memory, noise = policy.encode(looker.batch(rows)), RowNoise(keys, looker.device)
    # With its noise held, the latent changes with what is seen, and only so.
    ticks = max(round(args.hold * looker.cfg.HZ), 1)
    z = policy.latent(
        memory, RowNoise([("latent", *key[:-1], key[-1] // ticks) for key in keys], looker.device)
    )
    x0 = noise.normal(len(rows), looker.cfg.action_horizon, len(policy.stats.action_mean))
    known = {} if prefix is None else {"prefix": torch.from_numpy(prefix).to(x0)}
    experts = policy.chosen(z)[0]["experts"][:, 0].tolist() if "gate" in policy.parts else []
    return policy.sample(memory, x0, nfe, z, **known).cpu().numpy(), experts


def rollout(policy, cfg, args, make, seeds, nfe, film, timed, bar):
    """Environments side by side in one clock -> their Episodes, and the times of single chunks if `timed`."""
    envs, episodes = [make() for _ in seeds], [Episode() for _ in seeds]
    looker = Looker(cfg.data, len(seeds), next(policy.parameters()).device)
    robots = Execution(len(seeds), args.execute, args.ensemble, args.delay)

    def note(i, observation, info):
        looker.remember(i, observation)
        if np.shape(position := info.get("position")) == (2,):
            episodes[i].path.append(np.array(position, float))
        if i < film and (picture := envs[i].render()) is not None:
            episodes[i].pictures.append(picture)

    for i, (env, seed) in enumerate(zip(envs, seeds, strict=True)):
        note(i, *env.reset(seed=seed))
        if hasattr(env.unwrapped, "obstacles"):
            episodes[i].obstacles = env.unwrapped.obstacles()
    active, times = list(range(len(seeds))), []
    while active:
        if robots.due():
            keys = [("episode", args.seed, seeds[i], robots.tick) for i in active]
            prefix = robots.prefix(active) if args.conditioned else None
            if timed and robots.tick == 0:
                times = metrics.times(
                    partial(act, policy, args, looker, active[:1], keys[:1], nfe, None)
                )
            chunks, experts = act(policy, args, looker, active, keys, nfe, prefix)
            robots.add(active, chunks)
            for i, expert in zip(active, experts, strict=False):
                episodes[i].experts.append(expert)
        actions = robots.next(active)
        look = bool(cfg.data.cameras) and -robots.tick % args.execute < cfg.data.obs_images_history
        for i, action in zip(list(active), actions, strict=True):
            envs[i].unwrapped.look = look
            observation, _, terminated, truncated, info = envs[i].step(action)
            note(i, observation, info)
            truncated = truncated or robots.tick == args.max_steps
            if terminated or truncated:
                end = episodes[i]
                if "success" not in info and "is_success" not in info:
                    raise UserError(
                        f"--env: {args.env} must tell info['success'] when it ends; it tells {list(info)}"
                    )
                end.success, end.mode = (
                    bool(info.get("success", info.get("is_success"))),
                    info.get("mode"),
                )
                end.failure = info.get("failure") or ("timeout" if truncated else "unnamed")
                envs[i].close()
                active.remove(i)
                bar.update()
    return episodes, times


def environment(policy, cfg, args):
    """(function that makes one, one of them), checked against what the policy needs."""
    make = partial(gymnasium.make, ENVIRONMENTS.get(args.env, args.env), disable_env_checker=True)
    try:
        trial = make()
        if "rgb_array" in trial.metadata.get("render_modes", []) and trial.render_mode is None:
            make.keywords["render_mode"] = "rgb_array"
            trial = make()
        args.videos = args.videos if trial.render_mode else 0
        if args.videos:
            trial.reset(seed=0)
            trial.render()
    except (TypeError, NotImplementedError) as e:
        why = "what names rgb_array among its render_modes takes render_mode and has render()"
        raise UserError(f"--env: {args.env}: {why}\n    ({type(e).__name__}: {e})") from e
    except (gymnasium.error.Error, ImportError) as e:
        hint = nearest(args.env, [*ENVIRONMENTS, *gymnasium.registry])
        raise UserError(
            f"--env: no environment '{args.env}'{hint}\n    ({type(e).__name__}: {e})"
        ) from e
    if args.execute is None:
        args.execute = (
            cfg.data.action_horizon
            if cfg.data.first_frames == 1
            else min(8, cfg.data.action_horizon)
        )
    name, given = trial.spec.id, dict(getattr(trial.observation_space, "spaces", {}))
    wanted = [*cfg.data.state_keys, *cfg.data.cameras.values()]
    if missing := [key for key in wanted if key not in given]:
        raise UserError(
            f"--env: {name} does not give {missing}, which the policy was trained on; it gives {[*given]}"
        )
    if (hz := trial.metadata.get("render_fps")) != cfg.data.HZ:
        raise UserError(
            f"--env: {name} runs at {hz} Hz, the policy at {cfg.data.HZ:g} (its render_fps, and data.HZ)"
        )
    dims = (
        sum(int(np.prod(given[key].shape)) for key in cfg.data.state_keys),
        *(trial.action_space.shape or ()),
    )
    if dims != (trained := (len(policy.stats.state_mean), len(policy.stats.action_mean))):
        raise UserError(
            f"--env: {name} has (state, action) of {dims} numbers, the policy was trained on {trained}"
        )
    if args.execute + args.delay > (horizon := cfg.data.action_horizon):
        late = f" + --delay {args.delay}" if args.delay else ""
        raise UserError(f"--execute {args.execute}{late}: more than the {horizon} steps of a chunk")
    return make, trial.unwrapped


def closed_loop(policy, cfg, args):
    """Success per NFE over the same episodes; success.png, and where the environment tells, tracks.png, modes.png."""
    make, world = environment(policy, cfg, args)
    names, shares = getattr(world, "MODES", None), getattr(world, "MODE_SHARES", None)
    trained = getattr(cfg.loss, "prefix", 0)
    args.conditioned = 0 < args.delay <= trained
    seeds, rows, panels = range(FIRST_SEED, FIRST_SEED + args.episodes), [], {}
    for nfe in args.nfe:
        episodes, times = [], []
        with tqdm(total=args.episodes, desc=f"NFE {nfe}", unit="episode") as bar:
            for start in range(0, args.episodes, args.batch):
                film = max(args.videos - start, 0) if nfe == args.nfe[-1] else 0
                part = seeds[start : start + args.batch]
                played = rollout(policy, cfg, args, make, part, nfe, film, start == 0, bar)
                episodes, times = episodes + played[0], times + played[1]
        panels[f"NFE {nfe}"] = episodes
        rows.append({"nfe": nfe, **metrics.summary(episodes, names, shares, times)})
        if "gate" in policy.parts and names:
            rows[-1] |= metrics.experts(
                episodes, names, policy.parts["moe_action_decoder"].block.experts
            )
    late, held = "acts at once", f"; the latent's noise is held for {args.hold:g} s"
    if args.delay:
        how = (
            "conditioned on what runs meanwhile"
            if args.conditioned
            else "what would run meanwhile is skipped"
        )
        late = f"acts {args.delay} steps late, {how} (loss.prefix {trained})"
    averaged = "" if args.ensemble is None else f"; averaged with m = {args.ensemble:g}"
    every = f"a chunk of {cfg.data.action_horizon} every {args.execute} steps"
    has_latent = any("prior" in name for name in policy.parts)
    drawn = "".join(f"; {name} {value:g}" for name, value in args.about["sampling"].items())
    print(f"\n{every} {late}{averaged}{held if has_latent else ''}{drawn}")
    print(metrics.table(rows, names))
    if "experts" in (last := rows[-1]):
        least = f"the least used expert has {last['least_load']:.2f} of an even share"
        told = f"mutual information of mode and expert: {last['expert_information'] or 0:.3f} of its maximum"
        print(f"NFE {nfe}: {told}; {least}")
    settings = {
        key: getattr(args, key)
        for key in ("execute", "batch", "seed", "hold", "ensemble", "delay", "conditioned")
    }
    write({"env": args.env, **settings, "results": rows}, args)
    plots.draw_success(rows, args.out / "success.png")
    if all(episode.path for episode in panels[f"NFE {args.nfe[0]}"]):
        plots.draw_paths(panels, names or (), args.out / "tracks.png")
    if names:
        plots.draw_mode_shares(rows, names, shares, args.out / "modes.png")
    if "experts" in rows[-1]:
        plots.draw_expert_use(
            rows[-1]["experts"],
            f"successes at NFE {nfe}, {args.env}",
            args.log,
            args.out / "experts.png",
        )
    if reel := [(episode.pictures, episode.success) for episode in episodes if episode.pictures]:
        plots.write_video(reel, cfg.data.HZ, args.out / "episodes.mp4")


@torch.no_grad()
def open_loop(policy, cfg, args):
    """Predicted against recorded chunks of held-out episodes; chunks_*.png, error_by_step.png, velocity_loss.png."""
    folder = locate(args.data or cfg.data.root)
    unfiltered = {"scores": None, "keep_top": None}  # what is held out does not depend on them
    data = Data(
        replace(
            cfg.data, root=str(folder), val_samples=max(cfg.data.val_samples, 512), **unfiltered
        )
    )
    if not data.val_episodes:
        raise UserError(
            "this run held no episodes out (data.val_episodes): nothing to compare with; or give --env"
        )
    features = json.loads((folder / "meta/info.json").read_text(encoding="utf-8"))["features"]
    names = joint_names(features, cfg.data.action_key, data.facts["action_dim"])
    device, horizon, nfe = next(policy.parameters()).device, cfg.data.action_horizon, args.nfe[-1]
    errors, drawn = [], []
    for episode in tqdm(data.val_episodes, desc="held-out episodes", unit="episode"):
        batch = to_device(
            data.windows[data.windows.rows([episode], cfg.data.first_frames)[::horizon]], device
        )
        memory, recorded, padded = policy.encode(batch), batch["action"], batch["action_is_pad"]
        draws = []
        for draw in range(args.samples):
            key = ("open loop", args.seed, episode, *([draw] if draw else []))
            noise = RowNoise([(*key, int(i)) for i in batch["frame_index"]], device)
            z = policy.latent(memory, noise)
            draws.append(policy.sample(memory, noise.normal(*recorded.shape), nfe, z))
        error = (torch.stack(draws) - recorded).abs().cpu().numpy()
        errors.append(
            np.ma.array(error, mask=np.broadcast_to(padded[..., None].cpu().numpy(), error.shape))
        )
        drawn.append((episode, *(x.cpu().numpy() for x in (draws[0], recorded, ~padded))))
    errors = np.ma.concatenate(errors, 1)  # (draws, chunks, T, A), without what is padded
    scale = policy.stats.affine("action")[1].cpu().numpy()
    per_joint, by_step = errors.mean((0, 1, 2)), errors.mean((0, 1))
    of_chunks = (errors / scale).mean((2, 3))
    best, mean = float(of_chunks.min(0).mean()), float(of_chunks.mean())
    print(
        f"\nmean absolute error of {errors.shape[1]} held-out chunks, NFE {nfe}, in the action's units (normalised):"
    )
    for name, value, normalised in zip(names, per_joint, per_joint / scale, strict=True):
        print(f"  {name}  {value:.4g}  ({normalised:.2f})")
    print(
        f"normalised, of a whole chunk: {mean:.3f}; of the best of {args.samples} draws: {best:.3f}"
    )
    loss = metrics.velocity_loss(policy, data, args.seed)
    levels = (
        f"{arm} {values[0]:.3g}, {values[5]:.3g}, {values[9]:.3g}" for arm, values in loss.items()
    )
    print(f"velocity loss, normalised, by source of the latent: {'; '.join(levels)}")
    results = {
        "nfe": nfe,
        "seed": args.seed,
        "episodes": data.val_episodes,
        "joints": names,
        "mae": per_joint.tolist(),
        "mae_by_step": by_step.tolist(),
        "chunk_error": {"samples": args.samples, "mean": mean, "best": best},
        "velocity_loss": loss,
    }
    write(results, args)
    for episode in drawn[:4]:
        plots.draw_chunks(*episode, names, args.out / f"chunks_{episode[0]}.png")
    plots.draw_error_by_step(by_step, names, cfg.data.HZ, args.out / "error_by_step.png")
    plots.draw_velocity_loss(loss, args.out / "velocity_loss.png")


def joint_names(features, key, count):
    """The dataset's names of a column's `count` numbers, which datasets nest or key variously; key[i] without any."""
    names = features.get(key, {}).get("names") or []
    inner = names
    while (
        isinstance(inner, list | dict) and inner
    ):  # the innermost list, or mapping, along the first entries
        names, inner = inner, next(iter(inner.values() if isinstance(inner, dict) else inner))
    return (
        [str(name) for name in names]
        if len(names) == count
        else [f"{key}[{i}]" for i in range(count)]
    )


def write(results, args):
    """results.json, before anything is drawn: what took long is safe."""
    unfinished = args.out / "results.json.tmp"
    unfinished.write_text(json.dumps({**args.about, **results}, indent=1))
    unfinished.replace(args.out / "results.json")


def main(argv=None):
    args = arguments(argv)
    given = args.checkpoint.expanduser()
    folder = given if (given / "meta.json").is_file() else newest(given) or given
    policy, cfg = open_policy(folder, dict(item.partition("=")[::2] for item in args.weights))
    if not hasattr(policy, "sample"):
        raise UserError(
            f"{args.checkpoint}: scores demonstrations, and draws no actions: train_mi.py --score {folder}"
        )
    policy.to("cuda" if torch.cuda.is_available() else "cpu")
    for name in [
        name for name in ("guidance", "temperature", "experts") if getattr(args, name) is not None
    ]:
        if not hasattr(getattr(policy, "sampling", None), name):
            raise UserError(f"--{name}: {args.checkpoint} holds a policy without it")
        setattr(policy.sampling, name, getattr(args, name))
    count = policy.parts["moe_action_decoder"].block.experts if "gate" in policy.parts else 1
    if args.experts and args.experts > count:
        raise UserError(f"--experts: {args.experts}, of {count}")
    args.out = (args.out or folder.parent / "evaluation" / (args.env or "open_loop")).expanduser()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out: {args.out} cannot be written: {e.strerror}") from e
    meta, args.log = read_meta(folder), folder.parent / "log.jsonl"
    args.about = {
        "checkpoint": str(args.checkpoint),
        "policy": Path(meta["script"]).stem,
        "step": meta["step"],
    }
    sampling = vars(policy.sampling) if hasattr(policy, "sampling") else {}
    args.about["sampling"] = {
        name: value for name, value in sampling.items() if name != "experts" or count > 1
    }
    args.about["parameters"] = sum(p.numel() for p in policy.parts.parameters() if p.requires_grad)
    (closed_loop if args.env else open_loop)(policy, cfg, args)
    print(f"\nwritten to {args.out}")
    return 0


if __name__ == "__main__":
    run.cli(main)
