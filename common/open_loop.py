"""Open loop: the chunks that a policy predicts on recorded episodes, against the recorded ones."""

import argparse
from typing import Any

import numpy as np
import torch

from common import metrics, plots
from common.data.loader import to_device
from common.data.windows import Windows
from common.files import write_json
from common.noise import RowNoise
from common.policy import ActionPolicy
from common.progress import progress
from common.recordings import Recordings
from common.robot import autocast


@torch.no_grad()
def open_loop(
    policy: ActionPolicy, cfg: Any, meta: dict[str, Any], args: argparse.Namespace
) -> None:
    """Predicted against recorded chunks of held-out episodes, by NFE.

    Draws chunks_*.png (of the last NFE), error_by_step.png and velocity_loss.png.
    """
    recordings = Recordings(
        cfg.data, meta, policy.stats, args.data, args.new_episodes, args.other_units
    )
    windows = recordings.windows
    names = windows.names["action"]
    drawn = []
    errors = {nfe: [] for nfe in args.nfe}
    for episode in progress(recordings.episodes, desc="held-out episodes", unit="episode"):
        chunks, recorded, padded = predicted_chunks(policy, windows, episode, args)
        for nfe, draws in chunks.items():
            error = np.abs(draws - recorded)
            mask = np.broadcast_to(padded[..., None], error.shape)
            errors[nfe].append(np.ma.array(error, mask=mask))
        drawn.append((episode, chunks[args.nfe[-1]][0], recorded, ~padded))
    _, scale = policy.stats.affine("action")
    scale = scale.cpu().numpy()
    rows = []
    for nfe, parts in errors.items():
        rows.append({"nfe": nfe, **metrics.chunk_errors(np.ma.concatenate(parts, 1), scale)})
    chunks = sum(len(recorded) for _, _, recorded, _ in drawn)
    print(
        f"\nmean absolute error of {chunks} held-out chunks, in the action's units (normalised):\n"
        f"{metrics.joint_table(rows, names, scale)}"
    )
    shown = windows.rows(recordings.episodes, cfg.data.first_frames)
    count = min(max(cfg.data.val_samples, 512), len(shown))
    shown = shown[np.linspace(0, len(shown) - 1, count).astype(int)]
    with autocast(args.precision, next(policy.parameters()).device):
        loss = metrics.velocity_loss(policy, windows, shown, args.seed)
    # A policy of one's own may define velocity() without that key.
    print(metrics.velocity_levels(loss, getattr(policy.weights, "target", "velocity")))
    results = {
        **rows[-1],
        "seed": args.seed,
        "episodes": recordings.episodes,
        "new_episodes": recordings.new,
        "joints": names,
        "velocity_loss": loss,
        "results": rows,
    }
    write_json({**args.about, **results}, args.out / "results.json")
    for episode in drawn[:4]:
        with plots.decoration(args.out / f"chunks_{episode[0]}.png") as file:
            plots.draw_chunks(*episode, names, file)
    with plots.decoration(args.out / "error_by_step.png") as file:
        plots.draw_error_by_step(rows, names, cfg.data.HZ, file)
    with plots.decoration(args.out / "velocity_loss.png") as file:
        plots.draw_velocity_loss(loss, file)


def predicted_chunks(
    policy: ActionPolicy, windows: Windows, episode: int, args: argparse.Namespace
) -> tuple[dict[int, np.ndarray], np.ndarray, np.ndarray]:
    """n chunks of an episode: draws {NFE: (samples, n, T, A)}, recorded (n, T, A), padding (n, T).

    All NFE start from the same noise, which belongs to what the episode holds, not to its number.
    """
    device = next(policy.parameters()).device
    every = windows.cfg.action_horizon
    rows = windows.rows([episode], windows.cfg.first_frames)[::every]
    batch = to_device(windows[rows], device)
    recorded = batch["action"]
    draws = {nfe: [] for nfe in args.nfe}
    with autocast(args.precision, device):
        memory = policy.encode(batch)
        for draw in range(args.samples):
            key = ("open loop", args.seed, windows.hashes[episode], draw)
            noise = RowNoise([(*key, int(i)) for i in batch["frame_index"]], device)
            z = policy.latent(memory, noise)
            x0 = noise.normal(*recorded.shape)
            for nfe, chunks in draws.items():
                chunks.append(policy.sample(memory, x0, nfe, z).float())
    return (
        {nfe: torch.stack(chunks).cpu().numpy() for nfe, chunks in draws.items()},
        recorded.cpu().numpy(),
        batch["action_is_pad"].cpu().numpy(),
    )
