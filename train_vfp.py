"""vfp_single_expert: flow matching whose decoder is told by a latent which way of doing the task to take.

    accelerate launch -q train_vfp.py --config configs/vfp_single_expert/tabletop/train.yaml

A posterior reads the latent z from the demonstrated chunk, a prior learns to draw it from the observation alone (Zhai
et al. 2025, arXiv:2508.01622). The same command again resumes. To fork an experiment, copy its config folder; to fork
the policy, copy this file too.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from common import config, flow, optim, run, schema
from common.blocks.latent import Codes, Gaussian, check
from common.config import key
from common.losses import Noise, camera_drop, gaussian_kl, given_prefix, kot, linear_path, masked_mse, ramp, sample_time


@dataclass
class Loss:
    target: Literal["velocity", "x1"] = key("velocity", "what the decoder predicts; converted when sampling")
    draws: int = key(1, "noise and time draws per observation: the encoder is paid once for all of them")
    camera_dropout: float = key(0.15, "probability that one camera of a sample is hidden behind learned mask tokens")
    prefix: int = key(0, "up to so many first actions of a chunk are given, for real-time chunking", low=0)
    kl: float = key(1.0, "of KL(posterior || prior) in units of 1 / (T A), the scale of the evidence bound")
    kl_ramp: float = key(0.05, "share of the run over which the KL weight rises from 0")
    balance: float = key(0.8, "share of the KL gradient that moves the prior")
    free_nats: float = key(0.25, "per latent token, below which the KL is not pushed")
    commitment: float = key(0.25, "of |z_e - its code|^2, where there is a codebook")
    revive_every: int = key(100, "steps between checks for codes that are hardly used", low=1)
    revive_until: float = key(0.6, "share of the run in which such codes are moved to where they are needed")
    sinkhorn: schema.Sinkhorn | None = key(None, "K-OT on chunks decoded from prior samples; null: not computed")


@dataclass
class Config:
    model: schema.Model = key(..., "components: what they are, how they start, how they are optimised")
    data: schema.Data = key(..., "the demonstrations")
    loss: Loss = key(Loss(), "terms of the objective")
    train: schema.Train = key(..., "the run")
    plugins: list[str] = key([], "modules to import, which register more blocks")
    seed: int = key(0, "weights, order, noise")


class Memory(NamedTuple):
    """What a look gives: tokens (B, N, d) for the decoder; what posterior and prior read of the first camera."""

    tokens: Tensor
    first_camera: dict


class Policy(nn.Module):
    """Components: backbone(s), info_embedder, action_decoder, and what the latent is made of.

    Continuous: vae_posterior and vae_prior (Gaussian, flow or point). Discrete, where a codebook is listed:
    vqvae_posterior, vqvae_codebook and vqvae_prior (codes or point).
    """

    def __init__(self, parts, stats, cfg):
        super().__init__()
        self.parts, self.stats, self.loss = parts, stats, cfg.loss
        self.cameras = list(cfg.data.cameras)
        self.kind = "vqvae" if any(name.startswith("vqvae_") for name in parts) else "vae"

    def forward(self, batch):
        """One micro-batch with its noise -> loss (), scalars to log."""
        noise, x1 = batch["noise"], self.stats.normalize("action", batch["action"])
        hidden = self.loss.camera_dropout if self.training else 0.0
        memory = self.encode(batch, camera_drop(noise, len(x1), len(self.cameras), hidden))
        z, prior, latent_loss, scalars = self.infer(memory, x1, noise, batch["progress"])

        decode = self.parts["action_decoder"].bind(memory=memory.tokens)
        x1 = x1[:, None].expand(-1, self.loss.draws, -1, -1)
        x0, t = noise.normal(*x1.shape), sample_time(noise.uniform(*x1.shape[:2]))
        xt, velocity = linear_path(x0, x1, t)
        ignored, known = batch["action_is_pad"][:, None].expand(x1.shape[:3]), {}
        if self.loss.prefix:
            fixed = given_prefix(noise.uniform(*t.shape), x1.shape[2], self.loss.prefix)
            xt, ignored, known = torch.where(fixed[..., None], x1, xt), ignored | fixed, {"fixed": fixed}
        predicted = decode(x_t=xt, t=t, z=z, **known)
        flow_loss = masked_mse(predicted, x1 if self.loss.target == "x1" else velocity, ignored)

        loss, scalars = flow_loss + latent_loss, scalars | {"flow": flow_loss}
        if self.loss.sinkhorn:
            # One step from noise, on the same keys and values without gradient: K-OT moves decoder and prior only.
            z = self.draw(prior, noise)
            end = decode.detach()(x_t=x0[:, :1], t=torch.zeros_like(t[:, :1]), z=z)
            end = end if self.loss.target == "x1" else x0[:, :1] + end
            settings = vars(self.loss.sinkhorn).copy()
            weight, valid = settings.pop("weight"), ~batch["action_is_pad"][:, None, :, None]
            ot_loss, ot = kot(end * valid, x1[:, :1] * valid, memory.first_camera["cond_proprio"][:, -1], **settings)
            loss, scalars = loss + weight * ot_loss, scalars | ot | {"kot": ot_loss}
        return loss, {"loss": loss.detach(), **{name: value.detach() for name, value in scalars.items()}}

    def infer(self, memory, x1, noise, progress=1.0):
        """z (B, n, D) of demonstrated chunks x1, the prior, the loss that makes it and the posterior meet, scalars."""
        posterior = self.parts[f"{self.kind}_posterior"](**memory.first_camera, action=x1)
        prior = self.parts[f"{self.kind}_prior"](**memory.first_camera)
        check(posterior, prior, self.codebook.codes if self.kind == "vqvae" else None)
        if self.kind == "vqvae":
            code = self.codebook(posterior.tokens, noise if self.training else None)
            prior_loss = prior.loss(code.indices if isinstance(prior, Codes) else code.zq.detach(), noise)
            commitment = (posterior.tokens - code.zq.detach()).square().mean()
            scalars = {"commitment": commitment, "prior": prior_loss, **self.codebook.state()}
            return code.z, prior, self.loss.commitment * commitment + prior_loss, scalars
        z = posterior.sample(noise)
        kl_weight = self.loss.kl * ramp(progress, self.loss.kl_ramp) / x1[0].numel()
        if isinstance(prior, Gaussian):
            kl_loss, kl = gaussian_kl(posterior, prior, self.loss.balance, self.loss.free_nats)
            return z, prior, kl_weight * kl_loss, {"kl": kl}
        # Any other prior learns to draw z, which the KL keeps near N(0, I).
        standard = Gaussian(*map(torch.zeros_like, posterior))
        kl_loss, kl = gaussian_kl(posterior, standard, balance=0.0, free_nats=self.loss.free_nats)
        prior_loss = prior.loss(z.detach(), noise)
        return z, prior, kl_weight * kl_loss + prior_loss, {"kl": kl, "prior": prior_loss}

    def encode(self, obs, drop=None):
        """Observation (state in raw units, pictures in [0, 1]) -> Memory, once per look."""
        proprio = self.stats.normalize("state", obs["observation.state"])
        visual, semantic = self.parts.look(obs, self.cameras)
        hidden = self.parts.hidden(drop, self.cameras)
        tokens = self.parts["info_embedder"](
            cond_proprio=proprio, cond_visual=visual, cond_semantic=semantic, drop=hidden
        )
        # Posterior and prior read features that the flow loss shapes; they don't shape them.
        first_camera = {
            "cond_visual": [x.detach() for x in visual[:1]],
            "cond_semantic": [x.detach() for x in semantic[:1]],
        }
        return Memory(tokens, {**first_camera, "cond_proprio": proprio, "drop": None if drop is None else drop[:, :1]})

    def latent(self, memory, noise):
        """z (B, n, D) from the prior: which way to do the task."""
        return self.draw(self.parts[f"{self.kind}_prior"](**memory.first_camera), noise)

    def draw(self, prior, noise):
        return prior.sample(noise, self.codebook.codes) if self.kind == "vqvae" else prior.sample(noise)

    @property
    def codebook(self):
        return self.parts["vqvae_codebook"].block

    @torch.no_grad()
    def sample(self, memory, x0, steps=10, z=None, solver=flow.euler, prefix=None):
        """Noise x0 (B, T, A) -> action chunk (B, T, A) in the dataset's units, which continues prefix (B, d, A).

        z from the prior where none is given.
        """
        z = self.latent(memory, Noise(device=x0.device)) if z is None else z
        decode = self.parts["action_decoder"].bind(memory=memory.tokens, z=z)
        prefix = None if prefix is None else self.stats.normalize("action", prefix)
        return self.stats.denormalize("action", flow.generate(decode, self.loss.target, x0, steps, solver, prefix))

    def after_step(self, job):
        """After each optimizer step: codes that are hardly used move to where they are needed."""
        if self.kind == "vqvae":
            due = job.step % self.loss.revive_every == 0 and job.step <= self.loss.revive_until * job.total
            noise = Noise("revive", job.cfg.seed, job.step, device=job.device) if due else None
            self.codebook.after_step(noise, job.optimizers, job.average)


def main(argv=None):
    cfg, options = config.load(Config, __file__, argv, __doc__)
    job = run.Run(cfg, options, __file__)
    policy = Policy(*job.components(), cfg)
    job.try_out(policy)  # two samples through everything: what does not fit is an error now
    if options.dry_run:
        return job.dry_run(policy)
    optimizers = optim.build(policy.parts, cfg)
    model, *optimizers = job.accelerator.prepare(policy, *optimizers)
    average = optim.Average(policy, optimizers, cfg.train.ema)
    job.resume(policy, optimizers, average)  # the newest checkpoint of train.save_dir, if there is one
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
    return job.finish()


if __name__ == "__main__":
    run.cli(main)
