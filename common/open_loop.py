"""Open loop: the chunks that a policy predicts on recorded episodes, against the recorded ones."""

import argparse
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from common import metrics, plots
from common.data.loader import to_device
from common.data.windows import Windows
from common.files import write_json
from common.noise import RowNoise
from common.policy import ActionPolicy
from common.recordings import Recordings
from common.robot import autocast


@torch.no_grad()
def open_loop(
    policy: ActionPolicy, cfg: Any, meta: dict[str, Any], args: argparse.Namespace
) -> None:
    """Predicted against recorded chunks of held-out episodes.

    Draws chunks_*.png, error_by_step.png and velocity_loss.png.
    """
    recordings = Recordings(
        cfg.data, meta, policy.stats, args.data, args.new_episodes, args.other_units
    )
    windows = recordings.windows
    episodes = recordings.episodes
    names = windows.names["action"]
    nfe = args.nfe[-1]
    errors = []
    drawn = []
    for episode in tqdm(episodes, desc="held-out episodes", unit="episode"):
        draws, recorded, padded = predicted_chunks(policy, windows, episode, nfe, args)
        error = np.abs(draws - recorded)
        errors.append(np.ma.array(error, mask=np.broadcast_to(padded[..., None], error.shape)))
        drawn.append((episode, draws[0], recorded, ~padded))
    errors = np.ma.concatenate(errors, 1)  # (draws, chunks, T, A), without padding
    _, scale = policy.stats.affine("action")
    scale = scale.cpu().numpy()
    per_joint = errors.mean((0, 1, 2))
    by_step = errors.mean((0, 1))
    of_chunks = (errors / scale).mean((2, 3))
    best = float(of_chunks.min(0).mean())
    mean = float(of_chunks.mean())
    print(
        f"\nmean absolute error of {errors.shape[1]} held-out chunks, NFE {nfe}, "
        "in the action's units (normalised):"
    )
    for name, value, normalised in zip(names, per_joint, per_joint / scale, strict=True):
        print(f"  {name}  {value:.4g}  ({normalised:.2f})")
    print(
        f"normalised, of a whole chunk: {mean:.3f}; of the best of {args.samples} draws: {best:.3f}"
    )
    rows = windows.rows(episodes, cfg.data.first_frames)
    count = min(max(cfg.data.val_samples, 512), len(rows))
    rows = rows[np.linspace(0, len(rows) - 1, count).astype(int)]
    with autocast(args.precision, next(policy.parameters()).device):
        loss = metrics.velocity_loss(policy, windows, rows, args.seed)
    levels = [
        f"{source} {values[0]:.3g}, {values[5]:.3g}, {values[9]:.3g}"
        for source, values in loss.items()
    ]
    print(f"velocity loss, normalised, by source of the latent: {'; '.join(levels)}")
    results = {
        "nfe": nfe,
        "seed": args.seed,
        "episodes": episodes,
        "new_episodes": recordings.new,
        "joints": names,
        "mae": per_joint.tolist(),
        "mae_by_step": by_step.tolist(),
        "chunk_error": {"samples": args.samples, "mean": mean, "best": best},
        "velocity_loss": loss,
    }
    write_json({**args.about, **results}, args.out / "results.json")
    for episode in drawn[:4]:
        with plots.decoration(args.out / f"chunks_{episode[0]}.png") as file:
            plots.draw_chunks(*episode, names, file)
    with plots.decoration(args.out / "error_by_step.png") as file:
        plots.draw_error_by_step(by_step, names, cfg.data.HZ, file)
    with plots.decoration(args.out / "velocity_loss.png") as file:
        plots.draw_velocity_loss(loss, file)


def predicted_chunks(
    policy: ActionPolicy, windows: Windows, episode: int, nfe: int, args: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws (samples, n, T, A), recorded chunks (n, T, A), their padding (n, T) of an episode."""
    device = next(policy.parameters()).device
    every = windows.cfg.action_horizon
    rows = windows.rows([episode], windows.cfg.first_frames)[::every]
    batch = to_device(windows[rows], device)
    recorded = batch["action"]
    draws = []
    with autocast(args.precision, device):
        memory = policy.encode(batch)
        for draw in range(args.samples):
            key = ("open loop", args.seed, episode, *([draw] if draw else []))
            noise = RowNoise([(*key, int(i)) for i in batch["frame_index"]], device)
            z = policy.latent(memory, noise)
            draws.append(policy.sample(memory, noise.normal(*recorded.shape), nfe, z).float())
    return (
        torch.stack(draws).cpu().numpy(),
        recorded.cpu().numpy(),
        batch["action_is_pad"].cpu().numpy(),
    )
