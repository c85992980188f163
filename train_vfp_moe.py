"""variational_flow_matching_policy: a code tells which way to do the task and which expert acts.

    accelerate launch -q train_vfp_moe.py \\
        --config configs/variational_flow_matching_policy/tabletop/train.yaml

A posterior reads a code from the demonstrated chunk, a prior learns to draw it from the observation
alone, and a gate chooses by the code which of several experts decodes the chunk (Zhai et al. 2025,
arXiv:2508.01622). The same command again resumes. To fork an experiment, copy its config folder; to
fork the policy, copy this file too.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from common import config, losses, optim, run, schema
from common.blocks.moe import choose_experts
from common.config import ConfigError, key
from common.distributions import nearest_codes
from common.flow import decoder_velocity, detached
from common.latent import CodeLoss, CodePolicy

IDLE = 0.2  # of an even share: an expert with less is reported as idle


@dataclass
class Loss(CodeLoss):
    label_smoothing: float = key(0.0, "of the prior's cross-entropy", low=0, high=1)
    posterior_ema: float | None = key(
        None,
        "decay of an average posterior whose codes the prior learns; null: none",
        low=0,
        high=1,
    )
    kmeans_start: bool = key(False, "codes start at the k-means centres of the first batch")
    top_k: int = key(2, "experts that decode a sample in training", low=1)
    sigma: float | None = key(
        None, "spread of the experts' likelihood; null: errors as the gate weighs them", low=1e-6
    )
    load_balance: float = key(0.01, "weight of the term that keeps all experts in use", low=0)
    router_z: float = key(0.001, "weight of the gate's squared log partition sum", low=0)


@dataclass
class Sampling:
    experts: int = key(1, "experts that decode a sample, weighted by the gate", low=1)


@dataclass
class Config:
    components: ClassVar = (
        "info_embedder",
        "vqvae_posterior",
        "vqvae_codebook",
        "vqvae_prior",
        "gate",
        "moe_action_decoder",
    )
    model: schema.Model = key(..., "components: their files, their weights, their optimizers")
    data: schema.Data = key(..., "the demonstrations")
    loss: Loss = key(Loss(), "terms of the objective")
    sampling: Sampling = key(Sampling(), "how chunks are drawn")
    train: schema.Train = key(..., "the run")
    plugins: list[str] = key([], "modules to import, which register more blocks")
    seed: int = key(0, "of weights, order and noise", low=0, high=schema.LARGEST_SEED)


class Policy(CodePolicy):
    """Components: backbone(s), info_embedder, vqvae_posterior, vqvae_codebook, vqvae_prior, gate,
    moe_action_decoder. The latent is a single code, which names the experts."""

    decoder = "moe_action_decoder"

    def __init__(self, parts, stats, cfg):
        super().__init__(parts, stats, cfg)
        self.sampling = cfg.sampling
        parts.require("gate")
        self.experts = parts.only_block("gate", "experts").experts
        self.check_experts("loss.top_k", cfg.loss.top_k)
        if cfg.loss.sigma is not None and cfg.loss.top_k == 1:
            raise ConfigError(
                "loss.sigma: weighs several experts, and loss.top_k is 1: set it to null"
            )
        self.check_sampling()
        self.code_logits = None  # the gate's answer to each code, made once when acting

    def check_experts(self, key, asked):
        if asked > self.experts:
            raise ConfigError(f"{key}: {asked} experts asked for, there are {self.experts}")

    def check(self, batch):
        super().check(batch)
        built = self.parts.only_block("moe_action_decoder", "experts").experts
        if self.experts != built:
            raise ConfigError(
                f"gate has experts: {self.experts}, moe_action_decoder has experts: {built}; "
                "make them equal"
            )
        memory = self.encode(batch)
        tokens, _ = self.parts["vqvae_prior"](**memory.latent_inputs).size
        if tokens != 1:
            raise ConfigError(f"vqvae_prior draws {tokens} codes; a gate reads a single one")

    def check_sampling(self):
        self.check_experts("sampling.experts", self.sampling.experts)

    def train(self, mode=True):
        self.code_logits = None
        return super().train(mode)

    def forward(self, batch):
        """One micro-batch with its noise -> loss (), scalars to log."""
        noise = batch["noise"]
        x1 = self.stats.normalize("action", batch["action"])
        memory = self.encode(batch, self.draw_camera_mask(noise, len(x1)))
        coded = self.code_chunks(memory, x1, noise)
        experts, weights, gate_loss, gate_scalars = self.route(coded.zq)

        decoder = self.parts["moe_action_decoder"]
        observed = decoder.context(memory=memory.tokens)
        chunks = self.noisy_chunks(x1, batch)
        predicted = decoder(
            x_t=chunks.x_t,
            t=chunks.t,
            context=decoder.with_latent(observed, z=coded.z, experts=experts),
            prefix_mask=chunks.prefix_mask,
        )
        flow_loss = losses.mixture_mse(
            predicted, chunks.target, chunks.ignored, weights, self.weights.sigma
        )
        loss = flow_loss + coded.loss + gate_loss
        scalars = {**coded.scalars, **gate_scalars, "flow": flow_loss}
        if self.weights.sinkhorn:
            # On the observation's keys and values without gradient: K-OT moves decoder and prior.
            z = self.draw(coded.prior, noise)
            best, _ = choose_experts(self.parts["gate"](z.detach()), 1)
            context = decoder.with_latent(detached(observed), z=z, experts=best)
            kot_loss, kot_scalars = self.kot(context, chunks, memory, batch)
            loss = loss + kot_loss
            scalars |= kot_scalars
        scalars = {name: value.detach() for name, value in scalars.items()}
        return loss, {"loss": loss.detach(), **scalars}

    def route(self, zq):
        """Codes zq (B, 1, D) -> experts (B, k), their weights (B, k), the gate's loss, scalars."""
        logits = self.parts["gate"](zq)
        experts, weights = choose_experts(logits, self.weights.top_k)
        balance, shares = losses.load_balance(logits.softmax(-1))
        z_loss = losses.router_z(logits)
        loads = {f"load/{i}": share for i, share in enumerate(shares)}
        gate_loss = self.weights.load_balance * balance + self.weights.router_z * z_loss
        return experts, weights, gate_loss, {"balance": balance, "router_z": z_loss, **loads}

    def report(self, scalars):
        lines = super().report(scalars)
        for i in range(self.experts):
            share = scalars.get(f"load/{i}", 1)
            if share < IDLE / self.experts:
                lines.append(
                    f"expert {i} of {self.experts} was the first choice of {share:.1%} of the "
                    "last samples: fewer experts do as well, or raise loss.load_balance"
                )
        return lines

    def gate_logits(self, z):
        """Logits (B, E) for codes z (B, 1, D), from a table of all codes."""
        if self.code_logits is None:
            self.code_logits = self.parts["gate"](self.codebook.codes[:, None])
        return self.code_logits[nearest_codes(z, self.codebook.codes)[:, 0]]

    def chosen_expert(self, z):
        return self.gate_logits(z).argmax(-1)

    def context(self, memory, z):
        """The decoder's context, and the weights (B, k) of the experts that it names."""
        experts, weights = choose_experts(self.gate_logits(z), self.sampling.experts)
        return self.parts["moe_action_decoder"].context(
            memory=memory.tokens, z=z, experts=experts
        ), weights

    def velocity(self, x, t, context, prefix_mask=None):
        """The mean of the chosen experts' answers, as the gate weighs them. (In training their
        errors are averaged.)"""
        of_decoder, weights = context

        def mean(**inputs):
            answers = self.parts["moe_action_decoder"](**inputs)
            answers = answers.unflatten(1, (weights.shape[1], -1))
            return torch.einsum("bk, bkrta -> brta", weights.to(answers.dtype), answers)

        return decoder_velocity(mean, of_decoder, x, t, self.weights.target, prefix_mask)


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
