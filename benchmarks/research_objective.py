"""Negative control of variational_flow_matching_policy: the objective of its public research code.

    python benchmarks/research_objective.py \\
        --config configs/variational_flow_matching_policy/avoid/train_research.yaml

Two deterministic latents are pulled together by their squared distance, with gradient into both, so
that the posterior forgets what the prior cannot know. All experts decode each sample, through a
gate whose normed logits cannot decide.
"""

import sys
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_vfp_moe
from common import config, optim, run
from common.latent import Coded
from common.policy import ActionPolicy
from train_vfp_moe import Config


class Policy(train_vfp_moe.Policy):
    """Components: info_embedder, vqvae_posterior and vqvae_prior with point heads, gate,
    moe_action_decoder. The latent is continuous: there is no codebook."""

    def __init__(self, parts, stats, cfg):
        ActionPolicy.__init__(self, parts, stats, cfg)  # the classes between need a codebook
        parts.require("vqvae_posterior", "vqvae_prior", "gate")
        self.sampling = cfg.sampling
        self.experts = parts["gate"].block.experts
        self.slow_posterior = None
        self.code_logits = None

    def code_chunks(self, memory, x1, noise):
        posterior = self.posterior_latent(memory, x1, noise)
        prior = self.parts["vqvae_prior"](**memory.latent_inputs)
        distance = (prior.tokens - posterior).square().mean()
        z = posterior
        if self.training:
            z = posterior + noise.normal(*posterior.shape)
        return Coded(z, z, prior, distance, {"prior": distance})

    def posterior_latent(self, memory, x1, noise):
        return self.parts["vqvae_posterior"](**memory.latent_inputs, action=x1).tokens

    def route(self, zq):
        logits = self.gate_logits(zq)
        if self.training:
            logits = logits + torch.randn_like(logits)
        count = logits.shape[1]
        experts = torch.arange(count, device=zq.device).expand_as(logits)
        shares = F.one_hot(logits.argmax(-1), count).float().mean(0)
        loads = {f"load/{i}": share for i, share in enumerate(shares)}
        return experts, logits.softmax(-1), 0.0, loads

    def gate_logits(self, z):
        logits = self.parts["gate"](z)
        return F.layer_norm(logits, logits.shape[1:]) / 5

    def draw(self, prior, noise):
        return prior.sample(noise)

    def check(self, batch):
        """No codes to check."""

    def after_step(self, job):
        """No codes to move."""


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
