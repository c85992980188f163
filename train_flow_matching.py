"""naive_flow_matching_policy: plain flow matching, from noise to an action chunk.

    accelerate launch -q train_flow_matching.py \\
        --config configs/naive_flow_matching_policy/tabletop/train.yaml

How a chunk is drawn stands in common/policy.py, as for all policies: encode, latent, sample. The
same command again resumes. To fork an experiment, copy its config folder; to fork the policy,
copy this file too.
"""

from dataclasses import dataclass
from typing import ClassVar

from common import config, optim, run, schema
from common.config import key
from common.losses import masked_mse
from common.policy import ActionPolicy


@dataclass
class Loss(schema.FlowLoss):
    """Keys of `loss`: those that all flow-matching policies share."""


@dataclass
class Config:
    components: ClassVar = ("info_embedder", "action_decoder")
    model: schema.Model = key(..., "components: their files, their weights, their optimizers")
    data: schema.Data = key(..., "the demonstrations")
    loss: Loss = key(Loss(), "terms of the objective")
    train: schema.Train = key(..., "the run")
    plugins: list[str] = key([], "modules to import, which register more blocks")
    seed: int = key(0, "of weights, order and noise", low=0, high=schema.LARGEST_SEED)


class Policy(ActionPolicy):
    """Components: backbone(s), info_embedder, action_decoder."""

    def forward(self, batch):
        """One micro-batch with its noise -> loss (), scalars to log."""
        x1 = self.stats.normalize("action", batch["action"])
        memory = self.encode(batch, self.draw_camera_mask(batch["noise"], len(x1)))
        chunks = self.noisy_chunks(x1, batch)
        predicted = self.parts["action_decoder"](
            x_t=chunks.x_t,
            t=chunks.t,
            context=self.context(memory, z=None),
            prefix_mask=chunks.prefix_mask,
        )
        loss = masked_mse(predicted, chunks.target, chunks.ignored)
        return loss, {"loss": loss.detach()}


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
