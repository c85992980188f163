"""mutual_information_estimator: which demonstrations are worth keeping, by what each adds to I(state; action chunk).

    accelerate launch -q train_mi.py --config configs/mutual_information_estimator/tabletop/train.yaml
    python train_mi.py --score ~/runs/mi_tabletop [--data DIR]

The first command trains two VAEs, one of what the robot sees, one of what it does, and then scores; the second scores
again (--data: the dataset, if it has moved). Scores are in scores.parquet and scores.png of the run folder;
data.scores and data.keep_top of the other scripts read them. After Hejna et al. 2025 (arXiv:2502.08623). To fork an
experiment, copy its config folder; to fork the estimator, copy this file too.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from common import config, information, optim, plots, run, schema
from common.checkpoint import open_policy
from common.config import UserError, key
from common.data import scores
from common.data.images import IMAGE
from common.data.loader import Data, to_device
from common.losses import masked_mse, ramp, unit_kl


@dataclass
class Loss:
    picture: float = key(
        3.0, "of the pictures' mean squared error, of values in [0, 1], for a history of 1", low=0
    )
    state_beta: float = key(
        0.005, "of the state's KL, divided by the numbers of its proprioception", low=0
    )
    action_beta: float = key(0.3, "of the chunk's KL, divided by the numbers of a chunk", low=0)
    warmup: float = key(0.1, "share of the run over which both KLs come in", low=0)


@dataclass
class Scoring:
    k: list[int] = key(
        [5, 6, 7], "neighbours whose distance counts; scores are the mean over them", low=1
    )
    batch: int = key(1024, "transitions among which neighbours are looked for, at least", low=2)
    shuffles: int = key(4, "times that all transitions are dealt into such batches", low=1)
    window: float = key(
        1.0, "seconds around a transition in which its own episode gives no neighbours", low=0
    )


@dataclass
class Config:
    model: schema.Model = key(
        ..., "components: what they are, how they start, how they are optimised"
    )
    data: schema.Data = key(..., "the demonstrations")
    loss: Loss = key(Loss(), "terms of the objective")
    scoring: Scoring = key(Scoring(), "nearest neighbours in the latents")
    train: schema.Train = key(..., "the run")
    plugins: list[str] = key([], "modules to import, which register more blocks")
    seed: int = key(0, "weights, order, noise, shuffles")
    pictures_every: int = key(1000, "optimizer steps between reconstructions/step_*.png", low=1)

    def check(self, reader, keys):
        if self.data.obs_images_history > 1:
            raise reader.error(
                ("data", "obs_images_history"),
                "the state is one picture of each camera: set it to 1",
            )
        if self.data.first_frames is not None:
            raise reader.error(
                ("data", "first_frames"), "every transition is scored: set it to null"
            )
        if not self.scoring.k:
            raise reader.error(
                ("scoring", "k"), "expected at least one number of neighbours; found none"
            )


class Policy(nn.Module):
    """Components: state_resnet34_encoder, state_resnet34_decoder, action_encoder, action_decoder."""

    def __init__(self, parts, stats, cfg):
        super().__init__()
        self.parts, self.stats, self.cameras = parts, stats, list(cfg.data.cameras)
        self.loss, self.every = cfg.loss, cfg.pictures_every

    def forward(self, batch):
        """One micro-batch with its noise -> loss (), scalars to log."""
        noise, (state, action) = batch["noise"], self.encode(batch)
        seen, pictures, chunk = self.decode(state.sample(noise), action.sample(noise))
        proprio, x1 = self.normalized(batch)
        state_kl, action_kl = unit_kl(state), unit_kl(action)
        terms = {
            "proprio": F.mse_loss(seen, proprio),
            "action": masked_mse(chunk[:, None], x1[:, None], batch["action_is_pad"]),
        }
        warm = ramp(batch["progress"], self.loss.warmup)
        loss = sum(terms.values()) + warm * self.loss.state_beta / seen[0].numel() * state_kl
        loss = loss + warm * self.loss.action_beta / chunk[0].numel() * action_kl
        if self.cameras:
            terms["picture"] = F.mse_loss(pictures, self.pictures(batch, pictures.shape[-2:]))
            loss = loss + self.loss.picture * terms["picture"]
        terms |= {"state_kl": state_kl, "action_kl": action_kl}
        for name, latent in (("state", state), ("action", action)):
            terms[f"{name}_active"] = (
                (latent.mu.flatten(1).var(0, correction=0) > information.ACTIVE).float().sum()
            )
        return loss, {
            "loss": loss.detach(),
            **{name: value.detach() for name, value in terms.items()},
        }

    def normalized(self, batch):
        state = self.stats.normalize("state", batch["observation.state"])
        return state, self.stats.normalize("action", batch["action"])

    def encode(self, batch):
        """Observation and chunk -> the Gaussians of both latents, mu and logvar (B, 1, D)."""
        proprio, x1 = self.normalized(batch)
        images = [batch[IMAGE + name] for name in self.cameras]
        state = self.parts["state_resnet34_encoder"](proprio=proprio, images=images)
        return state, self.parts["action_encoder"](action=x1)

    def decode(self, state, action):
        """Latents (B, 1, D) -> proprio (B, P, S), pictures (B, cameras, 3, side, side) or None, chunk (B, T, A)."""
        return *self.parts["state_resnet34_decoder"](z=state), self.parts["action_decoder"](
            z=action
        )

    def pictures(self, batch, size):
        """What the decoder is to paint: (B, cameras, 3, *size), each cell the mean of the pixels that it covers."""
        return torch.stack(
            [F.adaptive_avg_pool2d(batch[IMAGE + name], size) for name in self.cameras], 1
        )

    def after_step(self, job):
        """After each optimizer step: pictures now and then."""
        if job.main and (job.step % self.every == 0 or job.step == job.total):
            with job.average.applied():
                self.draw(job.data, job.folder / f"reconstructions/step_{job.step}.png")

    @torch.no_grad()
    def draw(self, data, file):
        """Six windows, held out if there are such, and what is decoded from the means of their latents."""
        rows = data.val_rows if len(data.val_rows) else data.train_rows
        rows = rows[
            np.linspace(0, len(rows) - 1, 8).astype(int)[1:-1]
        ]  # the very last has no chunk
        batch = to_device(data.windows[rows], self.stats.action_mean.device)
        _, painted, chunk = self.decode(*(latent.mu for latent in self.encode(batch)))
        pairs = (
            (self.pictures(batch, painted.shape[-2:]), painted.clamp(0, 1)) if self.cameras else ()
        )
        file.parent.mkdir(exist_ok=True)
        recorded = self.normalized(batch)[1].masked_fill(
            batch["action_is_pad"][..., None], torch.nan
        )
        plots.draw_reconstructions(
            [x.cpu().numpy() for x in pairs], recorded.cpu().numpy(), chunk.cpu().numpy(), file
        )


@torch.no_grad()
def score(folder, device, now=None, root=None):
    """Write scores.parquet and scores.png of a trained run to its folder. Raises UserError where they'd say nothing.

    Held-out episodes are neighbours, but not ranked: what the VAEs have never seen scores lower. now: Config in place
    of the checkpoint's; root: the dataset, if it is no longer where it was.
    """
    folder = folder.resolve()
    out = folder.parent if (folder / "meta.json").is_file() else folder
    policy, cfg = open_policy(folder)
    if not hasattr(cfg, "scoring"):
        raise UserError(
            f"--score: {folder} holds a policy, which ranks nothing; give a run of train_mi.py"
        )
    cfg = now or cfg
    policy.to(device)
    data, scoring, file = (
        Data(replace(cfg.data, root=root or cfg.data.root)),
        cfg.scoring,
        out / "scores.parquet",
    )
    if file.exists() and scores.key_of(file) != data.dataset.values_key:
        raise UserError(
            f"{file} is of another dataset than {data.dataset.root}: move it away to score this one"
        )
    windows, found = data.windows, []
    sizes = windows.state.shape[1], windows.action.shape[1]
    if sizes != (trained := (len(policy.stats.state_mean), len(policy.stats.action_mean))):
        raise UserError(
            f"{data.dataset.root} has (state, action) of {sizes} numbers, {folder} was trained on {trained}"
        )
    information.look_over(windows, scoring, cfg.seed)
    if cfg.data.cache != "none":
        data.cache_frames()
    parts = np.array_split(np.arange(len(windows)), -(-len(windows) // 256))
    for rows in tqdm(parts, desc="latents", unit="batch"):
        latents = policy.encode(to_device(windows[rows], device))
        found.append([x.flatten(1).float() for latent in latents for x in latent])
    found = [torch.cat(x) for x in zip(*found, strict=True)]
    state = information.metric(
        *found[:2], "state", min(3, sizes[0])
    )  # two numbers may need no more than two
    action = information.metric(*found[2:], "action", min(3, sizes[1]))
    values, nats = information.contributions(
        state, action, *information.places(windows), scoring, cfg.seed
    )
    table = information.rank(values, windows.episode_index[windows.episode], data.episodes)
    scores.save(table, file, data.dataset, nats=nats, seed=cfg.seed, **vars(scoring))
    plots.draw_scores(table, windows, out / "scores.png")
    best, worst = (table["episode"].to_pylist()[side] for side in (slice(3), slice(-3, None)))
    print(
        f"I(S; A) is {nats:.2f} nats; best episodes: {best}, worst: {worst}; {out}/scores.parquet, scores.png"
    )


def main(argv=None):
    cfg, options = config.load(Config, __file__, argv, __doc__)
    job = run.Run(cfg, options, __file__)
    information.look_over(
        job.data.windows, cfg.scoring, cfg.seed
    )  # what cannot be scored need not be trained on
    policy = Policy(*job.components(), cfg)
    job.try_out(policy)  # two samples through everything: what does not fit is an error now
    if options.dry_run:
        return job.dry_run(policy)
    optimizers = optim.build(policy.parts, cfg)
    model, *optimizers = job.accelerator.prepare(policy, *optimizers)
    average = optim.Average(policy, optimizers, cfg.train.ema)
    job.resume(
        policy, optimizers, average
    )  # the newest checkpoint of train.save_dir, if there is one
    model.train()
    for batch in job.batches():
        with job.accelerator.accumulate(model):
            loss, scalars = model(batch)
            job.accelerator.backward(loss)
            job.note(**scalars)
            if job.accelerator.sync_gradients:
                job.clip()  # per component; stops here, before the weights are touched, if anything is not finite
                job.scalars["lr"] = optim.set_learning_rate(optimizers, job.step, job.total)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        if job.accelerator.sync_gradients:
            job.step += 1
            average.update(job.step)
            policy.after_step(job)
            job.end_step(model)  # log, held-out loss, checkpoint
    return job.finish() or scored(job)


def scored(job):
    """Scores with the settings as they are now, where it was trained to its end; 0."""
    if job.main and job.step >= job.total and job.signal is None:
        score(job.folder, job.device, job.cfg)
    return 0


def rescore(argv=None):
    parser = argparse.ArgumentParser(
        Path(__file__).name, description="Score again with a trained run."
    )
    parser.add_argument(
        "--score", required=True, metavar="DIR", help="run folder, or one of its checkpoints"
    )
    parser.add_argument(
        "--data", metavar="DIR", help="the dataset, if it is no longer where it was for training"
    )
    args = parser.parse_args(argv)
    score(
        Path(args.score).expanduser(),
        "cuda" if torch.cuda.is_available() else "cpu",
        root=args.data,
    )
    return 0


if __name__ == "__main__":
    run.cli(rescore if "--score" in [word.partition("=")[0] for word in sys.argv] else main)
