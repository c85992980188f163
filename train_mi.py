"""mutual_information_estimator: which demonstrations are worth keeping.

    accelerate launch -q train_mi.py \\
        --config configs/mutual_information_estimator/tabletop/train.yaml
    python train_mi.py --score ~/runs/mi_tabletop [--data DIR]

The first command trains two VAEs, one of observations and one of action chunks, and then scores
episodes by how much their transitions contribute to I(state; action chunk). The second one scores
again (--data: the dataset, if it has moved). Scores are in scores.parquet and scores.png of the run
folder; data.scores and data.keep_top of the other scripts read them. After Hejna et al. 2025
(arXiv:2502.08623). To fork an experiment, copy its config folder; to fork the estimator, copy this
file too.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common import config, information, optim, plots, run, schema
from common.checkpoint import open_policy
from common.config import ConfigError, UserError, key
from common.data import scores
from common.data.images import IMAGE
from common.data.loader import Data, to_device
from common.distributions import Gaussian
from common.losses import masked_mse, unit_kl, warmup
from common.policy import ActionPolicy
from common.progress import progress


@dataclass
class Loss:
    picture: float = key(
        3.0, "weight of the mean squared error of pictures with values in [0, 1]", low=0
    )
    state_beta: float = key(
        0.005, "weight of the state's KL, divided by the numbers of its proprioception", low=0
    )
    action_beta: float = key(
        0.3, "weight of the chunk's KL, divided by the numbers of a chunk", low=0
    )
    warmup: float = key(
        0.1, "share of the run over which both KL weights rise from 0", low=0, high=1
    )


@dataclass
class Scoring:
    k: list[int] = key(
        [5, 6, 7], "neighbours whose distance counts; scores are the mean over them", low=1
    )
    batch: int = key(1024, "least number of transitions among which neighbours are sought", low=2)
    shuffles: int = key(
        4, "random divisions of all transitions into such batches", low=1, high=1000
    )
    window: float = key(
        1.0, "seconds around a transition in which its own episode has no neighbours", low=0
    )


@dataclass
class Config:
    components: ClassVar = (
        "state_resnet34_encoder",
        "state_resnet34_decoder",
        "action_encoder",
        "action_decoder",
    )
    model: schema.Model = key(..., "components: their files, their weights, their optimizers")
    data: schema.Data = key(..., "the demonstrations")
    loss: Loss = key(Loss(), "terms of the objective")
    scoring: Scoring = key(Scoring(), "nearest neighbours in the latents")
    train: schema.Train = key(..., "the run")
    plugins: list[str] = key([], "modules to import, which register more blocks")
    seed: int = key(0, "of weights, order, noise and shuffles", low=0, high=schema.LARGEST_SEED)
    pictures_every: int = key(1000, "optimizer steps between reconstructions/step_*.png", low=1)

    def check(self, reader, keys):
        if self.data.obs_images_history > 1:
            problem = "the state is one picture of each camera: set it to 1"
            raise reader.error(("data", "obs_images_history"), problem)
        if self.data.first_frames is not None:
            problem = "every transition is scored: set it to null"
            raise reader.error(("data", "first_frames"), problem)
        if not self.scoring.k:
            problem = "expected at least one number of neighbours; found none"
            raise reader.error(("scoring", "k"), problem)


class Policy(nn.Module):
    """state_resnet34_encoder, state_resnet34_decoder, action_encoder and action_decoder."""

    def __init__(self, parts, stats, cfg):
        super().__init__()
        self.parts = parts
        self.stats = stats
        self.cameras = list(cfg.data.cameras)
        self.weights = cfg.loss
        self.pictures_every = cfg.pictures_every
        parts.require(*Config.components)

    def forward(self, batch):
        """One micro-batch with its noise -> loss (), scalars to log."""
        noise = batch["noise"]
        proprio, x1 = self.normalized(batch)
        state, action = self.encode(batch)
        decoded_proprio, pictures, chunk = self.decode(state.sample(noise), action.sample(noise))
        proprio_loss = F.mse_loss(decoded_proprio, proprio)
        action_loss = masked_mse(chunk, x1, batch["action_is_pad"])
        state_kl = unit_kl(state)
        action_kl = unit_kl(action)
        kl_weight = warmup(batch["progress"], self.weights.warmup)
        loss = proprio_loss + action_loss
        loss = loss + kl_weight * self.weights.state_beta / proprio[0].numel() * state_kl
        loss = loss + kl_weight * self.weights.action_beta / x1[0].numel() * action_kl
        scalars = {"proprio": proprio_loss, "action": action_loss}
        if self.cameras:
            target = self.target_pictures(batch, pictures.shape[-2:])
            scalars["picture"] = F.mse_loss(pictures, target)
            loss = loss + self.weights.picture * scalars["picture"]
        scalars |= {"state_kl": state_kl, "action_kl": action_kl}
        for name, latent in (("state", state), ("action", action)):
            spread = latent.mu.flatten(1).var(0, correction=0)
            scalars[f"{name}_active"] = (spread > information.ACTIVE).float().sum()
        scalars = {name: value.detach() for name, value in scalars.items()}
        return loss, {"loss": loss.detach(), **scalars}

    def normalized(self, batch):
        """States (B, P, S) and chunk (B, T, A), normalised."""
        proprio = self.stats.normalize("state", batch["observation.state"])
        return proprio, self.stats.normalize("action", batch["action"])

    def encode(self, batch):
        """Observation and chunk -> the Gaussians of both latents, mu and logvar (B, 1, D)."""
        proprio, x1 = self.normalized(batch)
        images = [batch[IMAGE + name] for name in self.cameras]
        state = self.result("state_resnet34_encoder", Gaussian, proprio=proprio, images=images)
        return state, self.result("action_encoder", Gaussian, action=x1)

    def decode(self, state, action):
        """Latents (B, 1, D) -> proprio (B, P, S), pictures (B, C, 3, h, w), chunk (B, T, A)."""
        proprio, pictures = self.result("state_resnet34_decoder", tuple, z=state)
        return proprio, pictures, self.result("action_decoder", torch.Tensor, z=action)

    def result(self, name, kind, **inputs):
        """What a component returns, if it is of this kind."""
        result = self.parts[name](**inputs)
        if not isinstance(result, kind):
            raise ConfigError(
                f"{name} must return a {kind.__name__}, it returns a {type(result).__name__}: "
                "is it the file of another component?"
            )
        return result

    def target_pictures(self, batch, size):
        """(B, C, 3, *size): each cell is the mean of the pixels that it covers."""
        pictures = [batch[IMAGE + name] for name in self.cameras]
        return torch.stack([F.adaptive_avg_pool2d(x, size) for x in pictures], 1)

    def after_step(self, job):
        """After each optimizer step: reconstructions now and then."""
        due = job.step % self.pictures_every == 0 or job.step == job.total
        if job.is_main and due:
            with job.average.applied():
                self.draw(job.data, job.folder / f"reconstructions/step_{job.step}.png")

    @torch.no_grad()
    def draw(self, data, file):
        """Six windows, held out if possible, and reconstructions from their latents' means."""
        rows = data.val_rows if len(data.val_rows) else data.train_rows
        spread = np.linspace(0, len(rows) - 1, 8).astype(int)
        rows = rows[spread[1:-1]]  # the very last one has no chunk
        batch = to_device(data.windows[rows], self.stats.action_mean.device)
        state, action = self.encode(batch)
        _, pictures, chunk = self.decode(state.mu, action.mu)
        pairs = []
        if self.cameras:
            pairs = [self.target_pictures(batch, pictures.shape[-2:]), pictures.clamp(0, 1)]
        _, recorded = self.normalized(batch)
        recorded = recorded.masked_fill(batch["action_is_pad"][..., None], torch.nan)
        with plots.decoration(file) as picture:
            picture.parent.mkdir(exist_ok=True)
            plots.draw_reconstructions(
                [x.cpu().numpy() for x in pairs],
                recorded.cpu().numpy(),
                chunk.cpu().numpy(),
                picture,
            )

    def report(self, scalars):
        """What a finished run should say, from the means of the scalars that it logged last."""
        names = [name for name in ("state", "action") if scalars.get(f"{name}_active", 1) < 1]
        return [
            f"the {name} latent has collapsed: no dimension of it varies; lower "
            f"loss.{name}_beta or train longer"
            for name in names
        ]


@torch.no_grad()
def score(folder, device, now=None, root=None, script=None, plugins=()):
    """Write scores.parquet and scores.png of a trained run to its folder.

    Held-out episodes are neighbours, but not ranked: the VAEs have not seen them, so they score
    lower. now: Config in place of the checkpoint's; root: the dataset, if it has moved; script,
    plugins: as open_policy takes them. Raises UserError where scores would mean nothing.
    """
    folder = folder.resolve()
    out = folder.parent if (folder / "meta.json").is_file() else folder
    file = out / "scores.parquet"
    policy, cfg = open_policy(folder, script=script, plugins=plugins)
    if isinstance(policy, ActionPolicy):
        raise UserError(
            f"--score: {folder} holds a policy, which ranks nothing; give a run of train_mi.py"
        )
    cfg = now or cfg
    scoring = cfg.scoring
    policy.to(device)
    data = Data(replace(cfg.data, root=root or cfg.data.root))
    dataset = data.dataset
    if file.exists() and scores.scored_dataset(file) != dataset.values_key:
        raise UserError(
            f"{file} is of another dataset than {dataset.root}: move it away to score this one"
        )
    windows = data.windows
    sizes = (windows.state.shape[1], windows.action.shape[1])
    trained = (len(policy.stats.state_mean), len(policy.stats.action_mean))
    if sizes != trained:
        raise UserError(
            f"{dataset.root} has (state, action) of {sizes} numbers, "
            f"{folder} was trained on {trained}"
        )
    information.check_scorable(windows, scoring, cfg.seed)
    if cfg.data.cache != "none":
        data.cache_frames()
    state, action = latent_points(policy, windows, device)
    values, nats = information.contributions(
        state, action, windows.episode_index, windows.time, scoring, cfg.seed
    )
    table = information.rank(values, windows.episode_index, data.episodes)
    scores.save_scores(table, file, dataset, nats=nats, seed=cfg.seed, **vars(scoring))
    with plots.decoration(out / "scores.png") as picture:
        plots.draw_scores(table, windows, picture)
    ranked = table["episode"].to_pylist()
    ranking = f"episodes from best to worst: {ranked}"
    if len(ranked) > 10:
        ranking = f"best episodes: {ranked[:3]}, worst: {ranked[-3:]}"
    print(f"I(S; A) is {nats:.2f} nats; {ranking}; {out}/scores.parquet, scores.png")


def latent_points(policy, windows, device):
    """States and chunks of all transitions as points (N, D) whose distances compare them."""
    states = []
    actions = []
    batches = np.array_split(np.arange(len(windows)), -(-len(windows) // 256))
    for rows in progress(batches, desc="latents", unit="batch"):
        state, action = policy.encode(to_device(windows[rows], device))
        states.append([x.flatten(1).float() for x in state])
        actions.append([x.flatten(1).float() for x in action])
    points = []
    for name, found, size in (
        ("state", states, windows.state.shape[1]),
        ("action", actions, windows.action.shape[1]),
    ):
        mu, logvar = (torch.cat(x) for x in zip(*found, strict=True))
        # A state or an action of two numbers may need no more than two dimensions.
        points.append(information.latent_points(mu, logvar, name, min(3, size)))
    return points


def main(argv=None):
    cfg, options = config.load(Config, __file__, argv, __doc__)
    job = run.Run(cfg, options, __file__)
    information.check_scorable(job.data.windows, cfg.scoring, cfg.seed)
    policy = Policy(*job.components(), cfg)
    job.preflight(policy)  # two samples through everything: mistakes show now
    if options.dry_run:
        return job.dry_run(policy)
    optimizers = optim.build(policy.parts, cfg)
    model, *optimizers = job.accelerator.prepare(policy, *optimizers)
    average = optim.AveragedWeights(policy, optimizers, cfg.train.ema)
    job.resume(policy, optimizers, average)  # from the newest checkpoint, if there is one
    model.train()
    for batch in job.batches():
        with job.accelerator.accumulate(model):
            loss, scalars = model(batch)
            job.accelerator.backward(loss)
            job.log_scalars(**scalars)
            if job.accelerator.sync_gradients:
                job.clip()  # per component; ends the run here if anything is not finite
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
    """Score with the settings as they are now, where the run is trained to its end; 0."""
    if job.is_main and job.step >= job.total and job.signal is None:
        score(job.folder, job.device, job.cfg, script=Path(__file__), plugins=job.cfg.plugins)
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
    parser.add_argument(
        "--script", type=Path, metavar="PATH", help="script of the run, if it is not beside common/"
    )
    parser.add_argument(
        "--plugins", nargs="+", default=[], metavar="NAME", help="its plugins, if you trust them"
    )
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(args.score).expanduser()
    score(folder, device, root=args.data, script=args.script, plugins=args.plugins)
    return 0


if __name__ == "__main__":
    run.cli(rescore if "--score" in [word.partition("=")[0] for word in sys.argv] else main)
