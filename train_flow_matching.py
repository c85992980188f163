"""naive_flow_matching_policy: plain flow matching, noise to an action chunk given what the robot sees.

    accelerate launch -q train_flow_matching.py --config configs/naive_flow_matching_policy/tabletop/train.yaml

The same command again resumes. To fork an experiment, copy its config folder; to fork the policy, copy this file too.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from common import config, flow, optim, run, schema
from common.config import key
from common.losses import camera_drop, given_prefix, linear_path, masked_mse, sample_time
from common.policy import ActionPolicy


@dataclass
class Loss:
    target: Literal["velocity", "x1"] = key(
        "velocity", "what the decoder predicts; converted when sampling"
    )
    draws: int = key(
        1, "noise and time draws per observation: the encoder is paid once for all of them"
    )
    camera_dropout: float = key(
        0.0, "probability that a camera of a sample is hidden by mask tokens", low=0, high=1
    )
    prefix: int = key(
        0, "up to so many first actions of a chunk are given, for real-time chunking", low=0
    )


@dataclass
class Config:
    model: schema.Model = key(
        ..., "components: what they are, how they start, how they are optimised"
    )
    data: schema.Data = key(..., "the demonstrations")
    loss: Loss = key(Loss(), "terms of the objective")
    train: schema.Train = key(..., "the run")
    plugins: list[str] = key([], "modules to import, which register more blocks")
    seed: int = key(0, "weights, order, noise")


class Policy(ActionPolicy):
    """Components: backbone(s), info_embedder, action_decoder."""

    def __init__(self, parts, stats, cfg):
        super().__init__()
        self.parts, self.stats, self.loss = parts, stats, cfg.loss
        self.cameras = list(cfg.data.cameras)

    def forward(self, batch):
        """One micro-batch with its noise -> loss (), scalars to log."""
        noise, x1 = batch["noise"], self.stats.normalize("action", batch["action"])
        hidden = self.loss.camera_dropout if self.training else 0.0
        memory = self.encode(batch, camera_drop(noise, len(x1), len(self.cameras), hidden))
        x1 = x1[:, None].expand(-1, self.loss.draws, -1, -1)
        x0, t = noise.normal(*x1.shape), sample_time(noise.uniform(*x1.shape[:2]))
        xt, velocity = linear_path(x0, x1, t)
        ignored, known = batch["action_is_pad"][:, None].expand(x1.shape[:3]), {}
        if self.loss.prefix:
            fixed = given_prefix(noise.uniform(*t.shape), x1.shape[2], self.loss.prefix)
            xt, ignored, known = (
                torch.where(fixed[..., None], x1, xt),
                ignored | fixed,
                {"fixed": fixed},
            )
        predicted = self.parts["action_decoder"](x_t=xt, t=t, memory=memory, **known)
        loss = masked_mse(predicted, x1 if self.loss.target == "x1" else velocity, ignored)
        return loss, {"loss": loss.detach()}

    def encode(self, obs, drop=None):
        """Observation (state in raw units, pictures in [0, 1]) -> memory (B, N, d), once per look."""
        proprio = self.stats.normalize("state", obs["observation.state"])
        visual, semantic = self.parts.look(obs, self.cameras)
        hidden = self.parts.hidden(drop, self.cameras)
        return self.parts["info_embedder"](
            cond_proprio=proprio, cond_visual=visual, cond_semantic=semantic, drop=hidden
        )

    def latent(self, memory, noise):
        """No latent."""

    @torch.no_grad()
    def sample(self, memory, x0, steps=10, z=None, solver=flow.euler, prefix=None):
        """Noise x0 (B, T, A) -> action chunk (B, T, A) in the dataset's units, which continues prefix (B, d, A)."""
        decode = self.parts["action_decoder"].bind(memory=memory)
        prefix = None if prefix is None else self.stats.normalize("action", prefix)
        return self.stats.denormalize(
            "action", flow.generate(decode, self.loss.target, x0, steps, solver, prefix)
        )

    def after_step(self, job):
        """After each optimizer step; nothing here."""


def main(argv=None):
    cfg, options = config.load(Config, __file__, argv, __doc__)
    job = run.Run(cfg, options, __file__)
    policy = Policy(*job.components(), cfg)
    job.preflight(policy)  # two samples through everything: what does not fit is an error now
    if options.dry_run:
        return job.dry_run(policy)
    optimizers = optim.build(policy.parts, cfg)
    model, *optimizers = job.accelerator.prepare(policy, *optimizers)
    average = optim.AveragedWeights(policy, optimizers, cfg.train.ema)
    job.resume(
        policy, optimizers, average
    )  # the newest checkpoint of train.save_dir, if there is one
    model.train()
    for batch in job.batches():
        with job.accelerator.accumulate(model):
            loss, scalars = model(batch)
            job.accelerator.backward(loss)
            job.log_scalars(**scalars)
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
    return job.finish()


if __name__ == "__main__":
    run.cli(main)
