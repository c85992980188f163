"""Evaluate a checkpoint: closed loop in an environment, or open loop on the held-out episodes of its dataset.

    python evaluate.py --checkpoint ~/runs/vfp_tabletop --env tabletop --episodes 100 --nfe 1 2 4 10
    python evaluate.py --checkpoint ~/runs/my_robot

Writes results.json, a plot, and in closed loop a video of the first episodes. Repeats bit for bit for a seed.
"""

import argparse
import importlib
import json
import math
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import gymnasium
import numpy as np
import torch
from tqdm import tqdm

from common import run
from common.checkpoint import open_policy
from common.config import UserError, nearest
from common.data.frames import resize
from common.data.loader import IMAGE, Data, to_device
from common.losses import RowNoise

ENVIRONMENTS = {"tabletop": ("common.envs.tabletop", "Tabletop-v0")}
FIRST_SEED = 50_000  # of evaluation episodes; demonstrations are reset with smaller ones


def positive(text):
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run folder (its newest) or one checkpoint")
    parser.add_argument("--env", help=f"{', '.join(ENVIRONMENTS)}, or a gymnasium id; left out: open loop")
    parser.add_argument("--data", help="open loop: the dataset, if it is no longer where it was for training")
    parser.add_argument("--episodes", type=positive, default=100, help="episodes per NFE (100)")
    parser.add_argument("--nfe", type=positive, nargs="+", default=[1, 2, 4, 10], help="network evaluations per chunk")
    parser.add_argument(
        "--execute", type=positive, default=8, help="steps of a chunk that are carried out before replanning"
    )
    parser.add_argument("--batch", type=positive, default=50, help="episodes that run side by side")
    parser.add_argument("--seed", type=int, default=0, help="of the policy's noise")
    parser.add_argument("--videos", type=int, default=6, help="episodes in the video; 0: none")
    parser.add_argument("--weights", nargs="*", default=[], metavar="NAME=PATH", help="where frozen weights are now")
    parser.add_argument("--out", type=Path, help="folder of what is written (evaluation/ in the run folder)")
    return parser.parse_args(argv)


def wilson(successes: int, n: int, z=1.959964) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    p, spread = successes / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    return (p + spread / 2 - half) / (1 + spread), (p + spread / 2 + half) / (1 + spread)


class Looker:
    """What the policy sees of a batch of environments: resized pictures and a history of states."""

    def __init__(self, cfg, device):
        self.cfg, self.device, self.states = cfg.data, device, None

    def remember(self, observations):
        """Append the states of one tick; the first is repeated to fill the history, as in training."""
        now = np.stack([np.concatenate([obs[key] for key in self.cfg.state_keys]) for obs in observations])
        if self.states is None:
            self.states = np.repeat(now[:, None], self.cfg.obs_proprio_history, 1)
        else:
            self.states = np.concatenate([self.states[:, 1:], now[:, None]], 1)

    def batch(self, observations, rows):
        """Device batch of the environments `rows`, of which `observations` have pictures."""
        batch = {"observation.state": torch.from_numpy(self.states[rows]).float()}
        for name, key in self.cfg.cameras.items():
            images = np.stack([resize(observations[i][key], tuple(self.cfg.image_size)) for i in rows])
            batch[IMAGE + name] = torch.from_numpy(images).permute(0, 3, 1, 2)
        return to_device(batch, self.device)


@torch.no_grad()
def act(policy, cfg, looker, observations, rows, keys, nfe):
    """Chunks (B, T, A) for the environments `rows`, with noise of their keys, and the seconds it took."""
    started = time.perf_counter()
    memory, noise = policy.encode(looker.batch(observations, rows)), RowNoise(keys, looker.device)
    z = policy.latent(memory, noise)
    x0 = noise.normal(len(rows), cfg.data.action_horizon, len(policy.stats.action_mean))
    return policy.sample(memory, x0, nfe, z).cpu().numpy(), time.perf_counter() - started


def rollout(policy, cfg, make, seeds, nfe, execute, seed, film=0, bar=None):
    """Episodes side by side -> their last infos, seconds of single chunks, pictures of the first `film` episodes."""
    envs = [make() for _ in seeds]
    observations = [env.reset(seed=s)[0] for env, s in zip(envs, seeds, strict=True)]
    looker = Looker(cfg, next(policy.parameters()).device)
    infos, active, reel, latency = [None] * len(envs), list(range(len(envs))), [[] for _ in range(film)], []
    chunks, tick = None, 0
    while active:
        looker.remember(observations)
        if tick % execute == 0:
            keys = [("episode", seed, seeds[i], tick) for i in active]
            made, _ = act(policy, cfg, looker, observations, active, keys, nfe)
            chunks = dict(zip(active, made, strict=True))
            latency.append(act(policy, cfg, looker, observations, active[:1], keys[:1], nfe)[1])  # as a robot would
        tick += 1
        for i in list(active):
            if i < film:
                reel[i].append(envs[i].render())
            envs[i].unwrapped.look = tick % execute == 0
            observations[i], _, terminated, truncated, info = envs[i].step(chunks[i][(tick - 1) % execute])
            if terminated or truncated:
                infos[i] = info
                active.remove(i)
                if bar is not None:
                    bar.update()
    return infos, latency, reel


def closed_loop(policy, cfg, args):
    """Success per NFE over the same episodes; results.json, success.png, episodes.mp4."""
    if args.env in ENVIRONMENTS:
        module, name = ENVIRONMENTS[args.env]
        importlib.import_module(module)
    elif args.env in gymnasium.registry:
        name = args.env
    else:
        raise UserError(f"--env: no environment '{args.env}'{nearest(args.env, [*ENVIRONMENTS, *gymnasium.registry])}")

    def make():
        return gymnasium.make(name, disable_env_checker=True)

    trial = make()
    given, wanted = (
        list(getattr(trial.observation_space, "spaces", {})),
        [*cfg.data.state_keys, *cfg.data.cameras.values()],
    )
    if missing := [key for key in wanted if key not in given]:
        raise UserError(f"--env: {name} does not give {missing}, which the policy was trained on; it gives {given}")
    if trial.metadata.get("render_fps") != cfg.data.HZ:
        raise UserError(f"--env: {name} runs at {trial.metadata.get('render_fps')} Hz, the policy at {cfg.data.HZ}")
    if args.execute > cfg.data.action_horizon:
        raise UserError(f"--execute: {args.execute} steps of a chunk of {cfg.data.action_horizon}")
    rows, reel = [], None
    seeds = list(range(FIRST_SEED, FIRST_SEED + args.episodes))
    for nfe in args.nfe:
        infos, latency = [], []
        with tqdm(total=args.episodes, desc=f"NFE {nfe}", unit="episode") as bar:
            for start in range(0, args.episodes, args.batch):
                film = args.videos if start == 0 and nfe == args.nfe[-1] else 0
                part = seeds[start : start + args.batch]
                made = rollout(policy, cfg, make, part, nfe, args.execute, args.seed, min(film, len(part)), bar)
                infos, latency, reel = infos + made[0], latency + made[1], made[2] or reel
        successes = [info for info in infos if info["success"]]
        rows.append(
            {
                "nfe": nfe,
                "episodes": args.episodes,
                "success": len(successes) / args.episodes,
                "interval": wilson(len(successes), args.episodes),
                "modes": dict(sorted(Counter(info["mode"] for info in successes).items())),
                "failures": dict(Counter(info["failure"] for info in infos if not info["success"])),
                "ms_per_chunk": 1000 * float(np.median(latency)),
            }
        )
    print(
        "\n| NFE | success | 95 % interval | modes of successes | failures | ms per chunk |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        modes, failures = (", ".join(f"{k} {v}" for k, v in row[key].items()) or "-" for key in ("modes", "failures"))
        low, high = row["interval"]
        success, ms = f"{row['success']:.3f} | {low:.3f}-{high:.3f}", f"{row['ms_per_chunk']:.1f}"
        print(f"| {row['nfe']} | {success} | {modes} | {failures} | {ms} |")
    plot_success(rows, args.out / "success.png")
    if reel:
        write_video([np.stack(frames) for frames in reel], cfg.data.HZ, args.out / "episodes.mp4")
    return {"env": args.env, "execute": args.execute, "seed": args.seed, "results": rows}


def plot_success(rows, file):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axis = figure.subplots()
    success = np.array([row["success"] for row in rows])
    reach = np.abs(np.array([row["interval"] for row in rows]).T - success)
    axis.errorbar(range(len(rows)), success, reach, marker="o", capsize=4)
    axis.set(xticks=range(len(rows)), xticklabels=[row["nfe"] for row in rows], ylim=(0, 1.05))
    axis.set(xlabel="network evaluations per chunk (NFE)", ylabel=f"success over {rows[0]['episodes']} episodes, 95 %")
    axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110)


def write_video(episodes, fps, file):
    """Episodes (n, h, w, 3) uint8 one above the other, each holding its last picture until the longest ends."""
    longest = max(len(frames) for frames in episodes)
    rows = [np.concatenate([frames, np.repeat(frames[-1:], longest - len(frames), 0)]) for frames in episodes]
    with av.open(str(file), "w") as container:
        video = np.concatenate(rows, 1)
        stream = container.add_stream("libx264", rate=round(fps))
        stream.height, stream.width = (size - size % 2 for size in video.shape[1:3])
        stream.pix_fmt = "yuv420p"
        for image in video:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image[: stream.height, : stream.width]), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@torch.no_grad()
def open_loop(policy, cfg, args):
    """Predicted against recorded chunks of held-out episodes: error per joint and step; results.json, chunks_*.png."""
    data = Data(replace(cfg.data, root=args.data or cfg.data.root))
    if not data.val_episodes:
        raise UserError("this run held no episodes out (data.val_episodes): nothing to compare with; or give --env")
    device, every, nfe = next(policy.parameters()).device, cfg.data.action_horizon, args.nfe[-1]
    errors, drawn = [], []
    for episode in tqdm(data.val_episodes, desc="held-out episodes", unit="episode"):
        rows = data.windows.rows([episode])[::every]
        batch = to_device(data.windows[rows], device)
        memory = policy.encode(batch)
        noise = RowNoise([("open loop", args.seed, episode, int(i)) for i in batch["frame_index"]], device)
        z = policy.latent(memory, noise)
        predicted = policy.sample(memory, noise.normal(*batch["action"].shape), nfe, z)
        error = (predicted - batch["action"]).abs().masked_fill(batch["action_is_pad"][..., None], float("nan"))
        errors.append(error.cpu().numpy())
        drawn.append(
            (episode, predicted.cpu().numpy(), batch["action"].cpu().numpy(), ~batch["action_is_pad"].cpu().numpy())
        )
    errors = np.concatenate(errors)
    per_joint = np.nanmean(errors, (0, 1))
    _, scale = policy.stats.affine("action")
    print(f"\nmean absolute error of {len(errors)} held-out chunks, NFE {nfe}, in the action's units (and normalised):")
    for joint, value in enumerate(per_joint):
        print(f"  action[{joint}]  {value:.4g}  ({value / scale[joint].item():.2f})")
    for episode in drawn[:4]:
        plot_chunks(*episode, args.out / f"chunks_{episode[0]}.png")
    return {
        "nfe": nfe,
        "episodes": data.val_episodes,
        "mae": per_joint.tolist(),
        "mae_by_step": np.nanmean(errors, (0, 2)).tolist(),
    }


def plot_chunks(episode, predicted, recorded, valid, file):
    from matplotlib.figure import Figure

    joints, horizon = predicted.shape[2], predicted.shape[1]
    columns = min(4, joints)
    figure = Figure(figsize=(3.2 * columns, 1.9 * math.ceil(joints / columns)), layout="constrained")
    for joint, axis in enumerate(figure.subplots(math.ceil(joints / columns), columns, squeeze=False).flat):
        if joint >= joints:
            axis.set_axis_off()
            continue
        for k in range(len(predicted)):
            at = k * horizon + np.flatnonzero(valid[k])
            axis.plot(at, recorded[k, valid[k], joint], color="black", lw=1)
            axis.plot(at, predicted[k, valid[k], joint], lw=1.2)
        axis.set_title(f"action[{joint}]", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.suptitle(f"held-out episode {episode}: recorded (black), predicted chunks (coloured)", fontsize=9)
    figure.savefig(file, dpi=110)


def main(argv=None):
    args = arguments(argv)
    checkpoint = args.checkpoint.expanduser()
    policy, cfg = open_policy(checkpoint, dict(item.partition("=")[::2] for item in args.weights))
    policy.to("cuda" if torch.cuda.is_available() else "cpu")
    run_folder = checkpoint.parent if (checkpoint / "meta.json").is_file() else checkpoint
    args.out = (args.out or run_folder / "evaluation").expanduser()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out: {args.out} cannot be written: {e.strerror}") from e
    results = (closed_loop if args.env else open_loop)(policy, cfg, args)
    (args.out / "results.json").write_text(json.dumps({"checkpoint": str(args.checkpoint), **results}, indent=1))
    print(f"\nwritten to {args.out}")
    return 0


if __name__ == "__main__":
    run.cli(main)
