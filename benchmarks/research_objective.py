"""Negative control for variational_flow_matching_policy: the objective of the public research code of this method.

    python benchmarks/research_objective.py --config configs/variational_flow_matching_policy/avoid/train_research.yaml

Two deterministic latents are pulled together by their squared distance, with gradient into both, so that the posterior
forgets what the prior cannot know; all experts answer each sample, through a gate whose normed logits cannot decide.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_vfp
from common import config, optim, run
from common.blocks.moe import choose
from train_vfp import Config


class Policy(train_vfp.Policy):
    """Components: info_embedder, vqvae_posterior and vqvae_prior with point heads, gate, moe_action_decoder."""

    def infer(self, memory, x1, noise, progress=1.0):
        posterior = self.parts["vqvae_posterior"](**memory.first_camera, action=x1).tokens
        prior = self.parts["vqvae_prior"](**memory.first_camera)
        distance = (prior.tokens - posterior).square().mean()
        z = posterior + noise.normal(*posterior.shape) if self.training else posterior
        return z, z, prior, distance, {"prior": distance}

    def route(self, zq, k):
        logits = self.logits(zq)
        logits = logits + torch.randn_like(logits) if self.training else logits
        experts = torch.arange(logits.shape[1], device=zq.device).expand_as(logits)
        shares = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[1]).float().mean(0)
        return (
            {"experts": experts},
            logits.softmax(-1),
            0.0,
            {f"load/{i}": x for i, x in enumerate(shares)},
        )

    def logits(self, z):
        logits = self.parts["gate"](z)
        return torch.nn.functional.layer_norm(logits, logits.shape[1:]) / 5

    def draw(self, prior, noise):
        return prior.sample(noise)

    def chosen(self, z, k=1):
        return choose(self.logits(z), k)

    def after_step(self, job):
        """No codes to move."""


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
