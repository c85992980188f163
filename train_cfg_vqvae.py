"""cfg_vqvae_flow_matching: codes tell which way to do the task, with classifier-free guidance.

    accelerate launch -q train_cfg_vqvae.py \
        --config configs/cfg_vqvae_flow_matching/tabletop/train.yaml

A posterior reads codes from the demonstrated chunk, and a prior learns to draw them from the
observation alone. Now and then the decoder gets null tokens in their place, so that sampling can
exaggerate what the codes change (Ho & Salimans 2022, arXiv:2207.12598); with
`loss.cond_drop_prob: 0` it always gets the codes. The same command again resumes. To fork an
experiment, copy its config folder; to fork the policy, copy this file too.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from common import config, losses, optim, run, schema
from common.config import ConfigError, key
from common.distributions import Codes
from common.flow import detached, guided
from common.latent import CodeLoss, CodePolicy


@dataclass
class Loss(CodeLoss):
    cond_drop_prob: float = key(
        0.15, "probability that the decoder gets null tokens in place of the codes", low=0, high=1
    )
    cond_drop_from: float = key(
        0.02, "share of the run before the first null tokens", low=0, high=1
    )

    def check(self, reader, keys):
        if not self.cond_drop_prob and self.cond_drop_from != Loss().cond_drop_from:
            raise reader.error((*keys, "cond_drop_from"), "no codes are dropped: leave it out")


@dataclass
class Sampling:
    guidance: float = key(
        1.0, "w of v_null + w (v_z - v_null); 1: conditional, and v_null is not computed", low=0
    )
    temperature: float = key(1.0, "of the prior; 0: the most likely codes", low=0)


@dataclass
class Config:
    components: ClassVar = (
        "info_encoder",
        "vqvae_posterior",
        "vqvae_codebook",
        "vqvae_prior",
        "action_decoder",
    )
    model: schema.Model = key(..., "components: their files, their weights, their optimizers")
    data: schema.Data = key(..., "the demonstrations")
    loss: Loss = key(Loss(), "terms of the objective")
    sampling: Sampling = key(Sampling(), "how chunks are drawn")
    train: schema.Train = key(..., "the run")
    plugins: list[str] = key([], "modules to import, which register more blocks")
    seed: int = key(0, "of weights, order and noise", low=0, high=schema.LARGEST_SEED)


class Policy(CodePolicy):
    """Components: backbone(s), info_encoder, vqvae_posterior, vqvae_codebook (with null tokens if
    codes are dropped), vqvae_prior, action_decoder."""

    encoder = "info_encoder"

    def __init__(self, parts, stats, cfg):
        super().__init__(parts, stats, cfg)
        self.sampling = cfg.sampling
        self.check_sampling()

    def check(self, batch):
        super().check(batch)
        probability = self.weights.cond_drop_prob
        if bool(self.codebook.null_tokens) != bool(probability):
            raise ConfigError(
                f"loss.cond_drop_prob: {probability}, but vqvae_codebook has null_tokens: "
                f"{self.codebook.null_tokens}; null tokens replace dropped codes"
            )

    def check_sampling(self):
        if self.sampling.guidance != 1 and not self.codebook.null_tokens:
            raise ConfigError(
                "sampling.guidance: leads away from null tokens, which loss.cond_drop_prob: 0 lacks"
            )

    def forward(self, batch):
        """One micro-batch with its noise -> loss (), scalars to log."""
        noise = batch["noise"]
        x1 = self.stats.normalize("action", batch["action"])
        memory = self.encode(batch, self.draw_camera_mask(noise, len(x1)))
        coded = self.code_chunks(memory, x1, noise)
        z_or_null = self.drop_codes(coded.z, noise, batch["progress"])

        decoder = self.parts["action_decoder"]
        observed = decoder.context(memory=memory.tokens)
        chunks = self.noisy_chunks(x1, batch)
        predicted = decoder(
            x_t=chunks.x_t,
            t=chunks.t,
            context=decoder.with_latent(observed, z=z_or_null),
            prefix_mask=chunks.prefix_mask,
        )
        flow_loss = losses.masked_mse(predicted, chunks.target, chunks.ignored)
        loss = flow_loss + coded.loss
        scalars = {**coded.scalars, "flow": flow_loss}
        if self.weights.sinkhorn:
            # On the observation's keys and values without gradient: K-OT moves decoder and prior.
            z = coded.prior.sample(noise, self.codebook.codes)
            context = decoder.with_latent(detached(observed), z=z)
            kot_loss, kot_scalars = self.kot(context, chunks, memory, batch)
            loss = loss + kot_loss
            scalars |= kot_scalars
        scalars = {name: value.detach() for name, value in scalars.items()}
        return loss, {"loss": loss.detach(), **scalars}

    def drop_codes(self, z, noise, progress):
        """Latents z (B, n, D), some of which are replaced by the null tokens in training."""
        if not self.weights.cond_drop_prob:
            return z
        on = self.training and progress >= self.weights.cond_drop_from
        dropped = noise.uniform(len(z), 1, 1) < (self.weights.cond_drop_prob if on else 0.0)
        return torch.where(dropped, self.codebook.null, z)

    def draw(self, prior, noise):
        if isinstance(prior, Codes):
            return prior.sample(noise, self.codebook.codes, self.sampling.temperature)
        return prior.sample(noise, self.codebook.codes)

    def sampling_velocity(self, memory, z):
        """The conditional velocity, or with guidance both branches in one call."""
        w = self.sampling.guidance
        if w == 1:
            return partial(self.velocity, context=self.context(memory, z))
        null = self.codebook.null.expand_as(z)
        if w == 0:
            return partial(self.velocity, context=self.context(memory, null))
        context = self.context(memory, torch.cat([z, null]))
        return guided(partial(self.velocity, context=context), w)


def main(argv=None):
    cfg, options = config.load(Config, __file__, argv, __doc__)
    job = run.Run(cfg, options, __file__)
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
    return job.finish()


if __name__ == "__main__":
    run.cli(main)
