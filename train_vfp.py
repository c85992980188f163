"""vfp_single_expert: flow matching with a continuous latent that tells which way to do the task.

    accelerate launch -q train_vfp.py --config configs/vfp_single_expert/tabletop/train.yaml

A posterior reads the latent z from the demonstrated chunk; a prior learns to draw it from the
observation alone (Zhai et al. 2025, arXiv:2508.01622, with one expert). The same command again
resumes. To fork an experiment, copy its config folder; to fork the policy, copy this file too.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from common import config, losses, optim, run, schema
from common.config import ConfigError, key
from common.distributions import Gaussian, check_fit
from common.flow import detached
from common.policy import ActionPolicy

COLLAPSED = 0.05  # nats; to tell two ways apart takes 0.69


@dataclass
class Loss(schema.FlowLoss):
    kl: float = key(1.0, "weight of KL(posterior || prior), in units of 1 / (T A)", low=0)
    kl_warmup: float = key(
        0.05, "share of the run over which the KL weight rises from 0", low=0, high=1
    )
    balance: float | None = key(
        None,
        "share of the KL gradient that moves a Gaussian prior; null: 0.8. "
        "Other priors learn to draw z",
        low=0,
        high=1,
    )
    free_nats: float = key(0.25, "KL per latent token that costs nothing", low=0)
    sinkhorn: schema.Sinkhorn | None = key(
        None, "K-OT, optimal transport of chunks of prior samples; null: none"
    )


@dataclass
class Config:
    components: ClassVar = ("info_embedder", "vae_posterior", "vae_prior", "action_decoder")
    model: schema.Model = key(..., "components: their files, their weights, their optimizers")
    data: schema.Data = key(..., "the demonstrations")
    loss: Loss = key(Loss(), "terms of the objective")
    train: schema.Train = key(..., "the run")
    plugins: list[str] = key([], "modules to import, which register more blocks")
    seed: int = key(0, "of weights, order and noise", low=0, high=schema.LARGEST_SEED)


class Policy(ActionPolicy):
    """Components: backbone(s), info_embedder, vae_posterior, vae_prior, action_decoder.

    The posterior is Gaussian. The prior's head is `gaussian`, with the KL between the two, or
    `flow` or `point`, which learn to draw z while the KL keeps the posterior near N(0, I).
    """

    has_latent = True

    def __init__(self, parts, stats, cfg):
        super().__init__(parts, stats, cfg)
        parts.require("vae_posterior", "vae_prior")

    def forward(self, batch):
        """One micro-batch with its noise -> loss (), scalars to log."""
        noise = batch["noise"]
        x1 = self.stats.normalize("action", batch["action"])
        memory = self.encode(batch, self.draw_camera_mask(noise, len(x1)))
        posterior = self.parts["vae_posterior"](**memory.latent_inputs, action=x1)
        prior = self.parts["vae_prior"](**memory.latent_inputs)
        z = posterior.sample(noise)
        warmup = losses.warmup(batch["progress"], self.weights.kl_warmup)
        kl_weight = self.weights.kl * warmup / x1[0].numel()
        latent_loss, scalars = self.latent_loss(posterior, prior, z, noise, kl_weight)

        decoder = self.parts["action_decoder"]
        observed = decoder.context(memory=memory.tokens)
        chunks = self.noisy_chunks(x1, batch)
        predicted = decoder(
            x_t=chunks.x_t,
            t=chunks.t,
            context=decoder.with_latent(observed, z=z),
            prefix_mask=chunks.prefix_mask,
        )
        flow_loss = losses.masked_mse(predicted, chunks.target, chunks.ignored)
        loss = flow_loss + latent_loss
        scalars["flow"] = flow_loss
        if self.weights.sinkhorn:
            # On the observation's keys and values without gradient: K-OT moves decoder and prior.
            context = decoder.with_latent(detached(observed), z=prior.sample(noise))
            kot_loss, kot_scalars = self.kot(context, chunks, memory, batch)
            loss = loss + kot_loss
            scalars |= kot_scalars
        scalars = {name: value.detach() for name, value in scalars.items()}
        return loss, {"loss": loss.detach(), **scalars}

    def latent_loss(self, posterior, prior, z, noise, kl_weight):
        """The loss that makes posterior and prior meet, and scalars to log."""
        free_nats = self.weights.free_nats
        if isinstance(prior, Gaussian):
            balance = 0.8 if self.weights.balance is None else self.weights.balance
            kl_loss, kl = losses.gaussian_kl(posterior, prior, balance, free_nats)
            return kl_weight * kl_loss, {"kl": kl}
        standard = Gaussian(torch.zeros_like(z), torch.zeros_like(z))
        kl_loss, kl = losses.gaussian_kl(posterior, standard, balance=0.0, free_nats=free_nats)
        prior_loss = prior.loss(z.detach(), noise)
        return kl_weight * kl_loss + prior_loss, {"kl": kl, "prior": prior_loss}

    def check(self, batch):
        super().check(batch)
        memory = self.encode(batch)
        x1 = self.stats.normalize("action", batch["action"])
        prior = self.parts["vae_prior"](**memory.latent_inputs)
        check_fit("vae", self.parts["vae_posterior"](**memory.latent_inputs, action=x1), prior)
        if self.weights.balance is not None and not isinstance(prior, Gaussian):
            raise ConfigError(
                "loss.balance: shares the KL between posterior and a Gaussian prior; "
                "this prior has another head: set it to null"
            )

    def report(self, scalars):
        if scalars.get("kl", COLLAPSED) >= COLLAPSED:
            return []
        return [
            f"the latent has collapsed: a KL of {scalars['kl']:.3f} nats tells the decoder nothing "
            "of the chunk; lower the weight of the KL, or raise loss.free_nats"
        ]

    def latent(self, memory, noise):
        return self.parts["vae_prior"](**memory.latent_inputs).sample(noise)

    def posterior_latent(self, memory, x1, noise):
        return self.parts["vae_posterior"](**memory.latent_inputs, action=x1).sample(noise)


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
