"""cfg_vqvae_flow_matching: flow matching told by a discrete latent which way to go, with classifier-free guidance.

    accelerate launch -q train_cfg_vqvae.py --config configs/cfg_vqvae_flow_matching/tabletop/train.yaml

A posterior reads codes from the demonstrated chunk; a prior learns to draw the codes of its running average from the
observation alone. Now and then the decoder is told nothing, so that sampling can exaggerate what the codes change (Ho &
Salimans 2022, arXiv:2207.12598). The same command again resumes. To fork an experiment, copy its config folder; to fork
the policy, copy this file too.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from common import config, flow, optim, run, schema
from common.config import ConfigError, key
from common.distributions import Codes, check, nearest
from common.losses import camera_drop, given_prefix, kot, linear_path, masked_mse, sample_time
from common.noise import Noise
from common.parts import Memory, first_camera
from common.policy import ActionPolicy


@dataclass
class Loss:
    target: Literal["velocity", "x1"] = key(
        "velocity", "what the decoder predicts; converted when sampling"
    )
    draws: int = key(
        1, "noise and time draws per observation: the encoder is paid once for all of them", low=1
    )
    camera_dropout: float = key(
        0.15, "probability that a camera of a sample is hidden by mask tokens", low=0, high=1
    )
    prefix: int = key(
        0, "up to so many first actions of a chunk are given, for real-time chunking", low=0
    )
    null: float = key(
        0.15, "probability that the decoder is told null tokens, not the codes", low=0, high=1
    )
    null_from: float = key(0.02, "share of the run before the first null tokens", low=0, high=1)
    commitment: float = key(0.25, "of |z_e - its code|^2")
    prior: float = key(1.0, "of the prior's cross-entropy")
    smoothing: float = key(0.02, "label smoothing of that", low=0, high=1)
    posterior_ema: float = key(
        0.999, "decay of the average posterior whose codes the prior learns", low=0, high=1
    )
    revive_every: int = key(100, "steps between checks for codes that are hardly used", low=1)
    revive_until: float = key(
        0.6, "share of the run in which such codes are moved to where they are needed"
    )
    sinkhorn: schema.Sinkhorn | None = key(
        None, "K-OT on chunks decoded from prior samples; null: not computed"
    )


@dataclass
class Sampling:
    guidance: float = key(
        1.0, "w of v_null + w (v_z - v_null); 1: conditional, and v_null is not computed"
    )
    temperature: float = key(1.0, "of the prior; 0: the most likely codes", low=0)


@dataclass
class Config:
    model: schema.Model = key(
        ..., "components: what they are, how they start, how they are optimised"
    )
    data: schema.Data = key(..., "the demonstrations")
    loss: Loss = key(Loss(), "terms of the objective")
    sampling: Sampling = key(Sampling(), "how chunks are drawn")
    train: schema.Train = key(..., "the run")
    plugins: list[str] = key([], "modules to import, which register more blocks")
    seed: int = key(0, "weights, order, noise")


class Policy(ActionPolicy):
    """Components: backbone(s), info_encoder or proprio_projector, action_decoder, vqvae_posterior, vqvae_codebook (with
    null tokens) and vqvae_prior."""

    def __init__(self, parts, stats, cfg):
        super().__init__()
        self.parts, self.stats, self.loss, self.sampling = parts, stats, cfg.loss, cfg.sampling
        self.cameras = list(cfg.data.cameras)
        self.encoder = "info_encoder" if "info_encoder" in parts else "proprio_projector"
        self.slow_posterior = optim.slow_copy(parts, "vqvae_posterior")
        if cfg.sampling.guidance != 1 and not cfg.loss.null:
            raise ConfigError(
                "sampling.guidance: leads away from null tokens, which learn nothing with loss.null: 0"
            )

    def train(self, mode=True):
        super().train(mode)
        self.slow_posterior.eval()
        return self

    def forward(self, batch):
        """One micro-batch with its noise -> loss (), scalars to log."""
        noise, x1 = batch["noise"], self.stats.normalize("action", batch["action"])
        hidden = self.loss.camera_dropout if self.training else 0.0
        memory = self.encode(batch, camera_drop(noise, len(x1), len(self.cameras), hidden))
        z, prior, latent_loss, scalars = self.infer(memory, x1, noise)
        share = (
            self.loss.null if self.training and batch["progress"] >= self.loss.null_from else 0.0
        )
        told = torch.where(noise.uniform(len(z), 1, 1) < share, self.codebook.null, z)

        decode = self.parts["action_decoder"].bind(memory=memory.tokens)
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
        predicted = decode(x_t=xt, t=t, z=told, **known)
        flow_loss = masked_mse(predicted, x1 if self.loss.target == "x1" else velocity, ignored)

        loss, scalars = flow_loss + latent_loss, scalars | {"flow": flow_loss}
        if self.loss.sinkhorn:
            # One step from noise, on the same keys and values without gradient: K-OT moves decoder and prior only.
            end = decode.detach()(
                x_t=x0[:, :1], t=torch.zeros_like(t[:, :1]), z=self.draw(prior, noise)
            )
            end = end if self.loss.target == "x1" else x0[:, :1] + end
            state = memory.first_camera["cond_proprio"][:, -1]
            ot_loss, ot = kot(
                end, x1[:, :1], state, **vars(self.loss.sinkhorn), ignored=batch["action_is_pad"]
            )
            loss, scalars = loss + ot_loss, scalars | ot
        return loss, {
            "loss": loss.detach(),
            **{name: value.detach() for name, value in scalars.items()},
        }

    def infer(self, memory, x1, noise):
        """z (B, n, D) of demonstrated chunks x1, the prior, the loss that makes it and the posterior meet, scalars."""
        seen = memory.first_camera
        posterior, prior = (
            self.parts["vqvae_posterior"](**seen, action=x1),
            self.parts["vqvae_prior"](**seen),
        )
        check(posterior, prior, self.codebook.codes)
        if self.codebook.null_tokens != posterior.size[0]:
            found = f"null_tokens: {self.codebook.null_tokens}"
            raise ConfigError(
                f"vqvae_codebook has {found}, the posterior has {posterior.size[0]} tokens: make them equal"
            )
        code = self.codebook(posterior.tokens, noise if self.training else None)
        commitment = (posterior.tokens - code.zq.detach()).square().mean()
        with torch.no_grad():  # codes that change more slowly are easier to learn
            slow = self.slow_posterior(**seen, action=x1).tokens
        if isinstance(prior, Codes):
            prior_loss = prior.loss(nearest(slow, self.codebook.codes), noise, self.loss.smoothing)
        else:
            prior_loss = prior.loss(slow, noise)
        scalars = {"commitment": commitment, "prior": prior_loss, **self.codebook.state()}
        return (
            code.z,
            prior,
            self.loss.commitment * commitment + self.loss.prior * prior_loss,
            scalars,
        )

    def encode(self, obs, drop=None):
        """Observation (state in raw units, pictures in [0, 1]) -> Memory, once per look."""
        proprio = self.stats.normalize("state", obs["observation.state"])
        visual, semantic = self.parts.look(obs, self.cameras)
        hidden = self.parts.hidden(drop, self.cameras)
        tokens = self.parts[self.encoder](
            cond_proprio=proprio, cond_visual=visual, cond_semantic=semantic, drop=hidden
        )
        return Memory(tokens, first_camera(proprio, visual, semantic, drop))

    def latent(self, memory, noise):
        """z (B, n, D) from the prior: which way to do the task."""
        return self.draw(
            self.parts["vqvae_prior"](**memory.first_camera), noise, self.sampling.temperature
        )

    def draw(self, prior, noise, temperature=1.0):
        codes = self.codebook.codes
        return (
            prior.sample(noise, codes, temperature)
            if isinstance(prior, Codes)
            else prior.sample(noise, codes)
        )

    @property
    def codebook(self):
        return self.parts["vqvae_codebook"].block

    @torch.no_grad()
    def sample(self, memory, x0, steps=10, z=None, w=None, solver=flow.euler, prefix=None):
        """Noise x0 (B, T, A) -> action chunk (B, T, A) in the dataset's units, which continues prefix (B, d, A).

        z from the prior where none is given, w as configured. Both branches of the guidance are one call per step.
        """
        w = self.sampling.guidance if w is None else w
        z = self.latent(memory, Noise(device=x0.device)) if z is None else z
        null = self.codebook.null.expand_as(z)
        told = z if w == 1 else null if w == 0 else torch.cat([z, null])
        decode = self.parts["action_decoder"].bind(memory=memory.tokens, z=told)
        decode = decode if w in (0, 1) else flow.guided(decode, w)
        prefix = None if prefix is None else self.stats.normalize("action", prefix)
        return self.stats.denormalize(
            "action", flow.generate(decode, self.loss.target, x0, steps, solver, prefix)
        )

    def after_step(self, job):
        """After each optimizer step: the slow posterior follows; codes that are hardly used move."""
        optim.update_slow_copy(
            self.slow_posterior, self.parts["vqvae_posterior"], self.loss.posterior_ema, job.step
        )
        due = (
            job.step % self.loss.revive_every == 0
            and job.step <= self.loss.revive_until * job.total
        )
        noise = (
            Noise("revive", job.cfg.seed, job.step, device=job.device)
            if due or job.step == 1
            else None
        )
        first = job.step == 1 and "vqvae_codebook" not in self.parts.loaded
        self.codebook.after_step(noise, job.optimizers, job.average, first)


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
