"""vfp_single_expert and variational_flow_matching_policy: flow matching told by a latent which way to do the task, and
in the latter by which expert.

    accelerate launch -q train_vfp.py --config configs/vfp_single_expert/tabletop/train.yaml

A posterior reads the latent z from the demonstrated chunk, a prior learns to draw it from the observation alone; where
there is a gate, z also chooses the expert that decodes it (Zhai et al. 2025, arXiv:2508.01622). The same command again
resumes. To fork an experiment, copy its config folder; to fork the policy, copy this file too.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from common import config, flow, losses, optim, run, schema
from common.blocks.moe import check_mixture, choose
from common.config import key
from common.distributions import Codes, Gaussian, check, nearest
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
    kl: float = key(
        1.0, "of KL(posterior || prior) in units of 1 / (T A), the scale of the evidence bound"
    )
    kl_ramp: float = key(0.05, "share of the run over which the KL weight rises from 0")
    balance: float = key(0.8, "share of the KL gradient that moves the prior")
    free_nats: float = key(0.25, "per latent token, below which the KL is not pushed")
    commitment: float = key(0.25, "of |z_e - its code|^2, where there is a codebook")
    posterior_ema: float | None = key(
        None, "decay of an average posterior for the prior to learn", low=0, high=1
    )
    revive_every: int = key(100, "steps between checks for codes that are hardly used", low=1)
    revive_until: float = key(
        0.6, "share of the run in which such codes are moved to where they are needed"
    )
    sinkhorn: schema.Sinkhorn | None = key(
        None, "K-OT on chunks decoded from prior samples; null: not computed"
    )
    top_k: int = key(2, "experts that decode a sample in training, where there is a gate", low=1)
    sigma: float | None = key(
        None, "the likelihood of experts of this spread; null: errors as the gate weighs them"
    )
    load_balance: float = key(
        0.01, "of the product of each expert's share of samples and of the gate's probability"
    )
    router_z: float = key(0.001, "of the gate's squared log partition sum")


@dataclass
class Sampling:
    experts: int = key(1, "that decode a sample, weighted by the gate, where there is one", low=1)


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
    """Components: backbone(s), info_embedder, what the latent is made of, and what decodes it.

    A continuous latent: vae_posterior and vae_prior (Gaussian, flow or point). A discrete one: vqvae_posterior,
    vqvae_codebook and vqvae_prior (codes or point). One expert: action_decoder. Several: gate and moe_action_decoder,
    with a discrete latent.
    """

    def __init__(self, parts, stats, cfg):
        super().__init__()
        self.parts, self.stats, self.loss, self.sampling = parts, stats, cfg.loss, cfg.sampling
        self.cameras = list(cfg.data.cameras)
        self.kind = "vqvae" if any(name.startswith("vqvae_") for name in parts) else "vae"
        self.decoder = "moe_action_decoder" if "gate" in parts else "action_decoder"
        if {"gate", "moe_action_decoder"} & {*parts}:
            check_mixture(parts)
        if self.loss.posterior_ema:
            self.slow_posterior = optim.slow_copy(parts, f"{self.kind}_posterior")
        self.table = None

    def train(self, mode=True):
        super().train(mode)
        self.table = None
        if self.loss.posterior_ema:
            self.slow_posterior.eval()
        return self

    def forward(self, batch):
        """One micro-batch with its noise -> loss (), scalars to log."""
        noise, x1 = batch["noise"], self.stats.normalize("action", batch["action"])
        hidden = self.loss.camera_dropout if self.training else 0.0
        memory = self.encode(batch, losses.camera_drop(noise, len(x1), len(self.cameras), hidden))
        z, zq, prior, latent_loss, scalars = self.infer(memory, x1, noise, batch["progress"])
        experts, weights, gate_loss, gate = self.route(zq, self.loss.top_k)

        decode = self.parts[self.decoder].bind(memory=memory.tokens)
        x1 = x1[:, None].expand(-1, self.loss.draws, -1, -1)
        x0, t = noise.normal(*x1.shape), losses.sample_time(noise.uniform(*x1.shape[:2]))
        xt, velocity = losses.linear_path(x0, x1, t)
        ignored, known = batch["action_is_pad"][:, None].expand(x1.shape[:3]), {}
        if self.loss.prefix:
            fixed = losses.given_prefix(noise.uniform(*t.shape), x1.shape[2], self.loss.prefix)
            xt, ignored, known = (
                torch.where(fixed[..., None], x1, xt),
                ignored | fixed,
                {"fixed": fixed},
            )
        predicted = decode(x_t=xt, t=t, z=z, **known, **experts)
        target = x1 if self.loss.target == "x1" else velocity
        flow_loss = losses.mixture_mse(predicted, target, ignored, weights, self.loss.sigma)

        loss, scalars = flow_loss + latent_loss + gate_loss, scalars | gate | {"flow": flow_loss}
        if self.loss.sinkhorn:
            # One step from noise, on the same keys and values without gradient: K-OT moves decoder and prior only.
            z = self.draw(prior, noise)
            best = self.route(z.detach(), 1)[0]
            end = decode.detach()(x_t=x0[:, :1], t=torch.zeros_like(t[:, :1]), z=z, **best)
            end = end if self.loss.target == "x1" else x0[:, :1] + end
            state = memory.first_camera["cond_proprio"][:, -1]
            ot_loss, ot = losses.kot(
                end, x1[:, :1], state, **vars(self.loss.sinkhorn), ignored=batch["action_is_pad"]
            )
            loss, scalars = loss + ot_loss, scalars | ot
        return loss, {
            "loss": loss.detach(),
            **{name: value.detach() for name, value in scalars.items()},
        }

    def infer(self, memory, x1, noise, progress=1.0):
        """Of demonstrated chunks x1: z (B, n, D), the codes it is made of or None, the prior, the loss that makes z and
        the posterior and the prior meet, scalars."""
        posterior = self.parts[f"{self.kind}_posterior"](**memory.first_camera, action=x1)
        prior = self.parts[f"{self.kind}_prior"](**memory.first_camera)
        check(posterior, prior, self.codebook.codes if self.kind == "vqvae" else None)
        if self.kind == "vqvae":
            code = self.codebook(posterior.tokens, noise if self.training else None)
            slow = posterior.tokens
            if self.loss.posterior_ema:  # codes that change more slowly are easier to learn
                with torch.no_grad():
                    slow = self.slow_posterior(**memory.first_camera, action=x1).tokens
            indices = nearest(slow, self.codebook.codes)
            prior_loss = prior.loss(
                indices if isinstance(prior, Codes) else self.codebook.codes.detach()[indices],
                noise,
            )
            commitment = (posterior.tokens - code.zq.detach()).square().mean()
            scalars = {"commitment": commitment, "prior": prior_loss, **self.codebook.state()}
            return code.z, code.zq, prior, self.loss.commitment * commitment + prior_loss, scalars
        z = posterior.sample(noise)
        kl_weight = self.loss.kl * losses.ramp(progress, self.loss.kl_ramp) / x1[0].numel()
        if isinstance(prior, Gaussian):
            kl_loss, kl = losses.gaussian_kl(
                posterior, prior, self.loss.balance, self.loss.free_nats
            )
            return z, None, prior, kl_weight * kl_loss, {"kl": kl}
        # Any other prior learns to draw z, which the KL keeps near N(0, I).
        standard = Gaussian(*map(torch.zeros_like, posterior))
        kl_loss, kl = losses.gaussian_kl(
            posterior, standard, balance=0.0, free_nats=self.loss.free_nats
        )
        prior_loss = prior.loss(z.detach(), noise)
        return z, None, prior, kl_weight * kl_loss + prior_loss, {"kl": kl, "prior": prior_loss}

    def route(self, zq, k):
        """Codes zq (B, n, D) -> {"experts": the k that decode them (B, k)}, weights (B, k) of what each says, the loss
        that keeps all experts in use, scalars. Without a gate the one decoder has all the weight."""
        if "gate" not in self.parts:
            return {}, self.stats.action_mean.new_ones(1, 1), 0.0, {}
        logits = self.parts["gate"](zq)
        experts, weights = choose(logits, k)
        (balance, shares), z_loss = losses.load_balance(logits.softmax(-1)), losses.router_z(logits)
        scalars = {
            "balance": balance,
            "router_z": z_loss,
            **{f"load/{i}": share for i, share in enumerate(shares)},
        }
        gate_loss = self.loss.load_balance * balance + self.loss.router_z * z_loss
        return experts, weights, gate_loss, scalars

    def encode(self, obs, drop=None):
        """Observation (state in raw units, pictures in [0, 1]) -> Memory, once per look."""
        proprio = self.stats.normalize("state", obs["observation.state"])
        visual, semantic = self.parts.look(obs, self.cameras)
        hidden = self.parts.hidden(drop, self.cameras)
        tokens = self.parts["info_embedder"](
            cond_proprio=proprio, cond_visual=visual, cond_semantic=semantic, drop=hidden
        )
        return Memory(tokens, first_camera(proprio, visual, semantic, drop))

    def latent(self, memory, noise):
        """z (B, n, D) from the prior: which way to do the task."""
        return self.draw(self.parts[f"{self.kind}_prior"](**memory.first_camera), noise)

    def draw(self, prior, noise):
        return (
            prior.sample(noise, self.codebook.codes)
            if self.kind == "vqvae"
            else prior.sample(noise)
        )

    @property
    def codebook(self):
        return self.parts["vqvae_codebook"].block

    @torch.no_grad()
    def chosen(self, z, k=1):
        """What `route` says of codes z (B, 1, D) first, from a table of all codes that is made once."""
        if "gate" not in self.parts:
            return {}, z.new_ones(len(z), 1)
        if self.table is None:
            self.table = self.parts["gate"](self.codebook.codes[:, None])
        return choose(self.table[nearest(z, self.codebook.codes)[:, 0]], k)

    @torch.no_grad()
    def sample(self, memory, x0, steps=10, z=None, solver=flow.euler, prefix=None):
        """Noise x0 (B, T, A) -> action chunk (B, T, A) in the dataset's units, which continues prefix (B, d, A).

        z from the prior where none is given; of several experts only those that z chooses run.
        """
        z = self.latent(memory, Noise(device=x0.device)) if z is None else z
        experts, weights = self.chosen(z, self.sampling.experts)
        decode = self.parts[self.decoder].bind(memory=memory.tokens, z=z, **experts)
        decode = flow.weighted(decode, weights) if self.sampling.experts > 1 else decode
        prefix = None if prefix is None else self.stats.normalize("action", prefix)
        return self.stats.denormalize(
            "action", flow.generate(decode, self.loss.target, x0, steps, solver, prefix)
        )

    def after_step(self, job):
        """After each optimizer step: the slow posterior follows; codes that are hardly used move."""
        if self.loss.posterior_ema:
            own = self.parts[f"{self.kind}_posterior"]
            optim.update_slow_copy(self.slow_posterior, own, self.loss.posterior_ema, job.step)
        if self.kind == "vqvae":
            due = (
                job.step % self.loss.revive_every == 0
                and job.step <= self.loss.revive_until * job.total
            )
            noise = Noise("revive", job.cfg.seed, job.step, device=job.device) if due else None
            self.codebook.after_step(noise, job.optimizers, job.average)


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
