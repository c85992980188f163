"""A discrete latent, as two policies have it: posterior, codebook, and a prior over its codes."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common import optim, schema
from common.blocks.vq import Codebook
from common.config import ConfigError, key
from common.data.normalizer import Normalizer
from common.distributions import Codes, check_fit, nearest_codes
from common.noise import Noise, RowNoise
from common.parts import Parts
from common.policy import ActionPolicy, Memory

COLLAPSED = 1.05  # codes in use, effectively


@dataclass
class CodeLoss(schema.FlowLoss):
    """Keys of `loss` that concern codes."""

    commitment: float = key(0.25, "weight of |z_e - its code|^2", low=0)
    prior: float = key(1.0, "weight of the prior's cross-entropy", low=0)
    label_smoothing: float = key(0.02, "of the prior's cross-entropy", low=0, high=1)
    posterior_ema: float | None = key(
        0.999,
        "decay of an average posterior whose codes the prior learns; null: none",
        low=0,
        high=1,
    )
    kmeans_start: bool = key(True, "codes start at the k-means centres of the first batch")
    revive_every: int = key(100, "steps between checks for codes that are hardly used", low=1)
    revive_until: float = key(
        0.6, "share of the run in which such codes move to where they are needed", low=0, high=1
    )
    sinkhorn: schema.Sinkhorn | None = key(
        None, "K-OT, optimal transport of chunks of prior samples; null: none"
    )


class Coded(NamedTuple):
    """Codes of demonstrated chunks: z for the decoder, exact zq (B, n, D), prior, loss, scalars."""

    z: Tensor
    zq: Tensor
    prior: Any
    loss: Tensor
    scalars: dict[str, Tensor]


class CodePolicy(ActionPolicy):
    """An ActionPolicy whose latent is one or several codes per chunk.

    In training a posterior reads tokens from the demonstrated chunk, a codebook replaces them by
    its nearest codes (van den Oord et al. 2017, arXiv:1711.00937; the gradient by NSVQ), and the
    prior learns to predict these codes from the observation alone. Acting, the prior draws them.
    """

    has_latent = True

    def __init__(self, parts: Parts, stats: Normalizer, cfg: Any):
        super().__init__(parts, stats, cfg)
        parts.require("vqvae_posterior", "vqvae_codebook", "vqvae_prior")
        self.codebook: Codebook = parts.only_block("vqvae_codebook", "codes")
        self.slow_posterior = None
        if self.weights.posterior_ema is not None:
            self.slow_posterior = optim.slow_copy(parts, "vqvae_posterior")

    def train(self, mode: bool = True) -> "CodePolicy":
        super().train(mode)
        if self.slow_posterior is not None:
            self.slow_posterior.eval()
        return self

    def check(self, batch: dict[str, Any]) -> None:
        super().check(batch)
        memory = self.encode(batch)
        x1 = self.stats.normalize("action", batch["action"])
        posterior = self.parts["vqvae_posterior"](**memory.latent_inputs, action=x1)
        prior = self.parts["vqvae_prior"](**memory.latent_inputs)
        check_fit("vqvae", posterior, prior, self.codebook.codes)
        tokens, _ = posterior.size
        if self.codebook.null_tokens not in (0, tokens):
            raise ConfigError(
                f"vqvae_codebook has null_tokens: {self.codebook.null_tokens}, vqvae_posterior has "
                f"tokens: {tokens}; make them equal"
            )
        if self.weights.label_smoothing and not isinstance(prior, Codes):
            raise ConfigError(
                f"loss.label_smoothing: {self.weights.label_smoothing} smooths the targets of a "
                "prior over codes, and the head of vqvae_prior is point: set it to 0"
            )

    def code_chunks(self, memory: Memory, x1: Tensor, noise: Noise) -> Coded:
        """Normalised demonstrated chunks x1 (B, T, A) -> their codes and the latent's losses."""
        inputs = memory.latent_inputs
        posterior = self.parts["vqvae_posterior"](**inputs, action=x1)
        prior = self.parts["vqvae_prior"](**inputs)
        code = self.codebook(posterior.tokens, noise if self.training else None)
        commitment = (posterior.tokens - code.zq.detach()).square().mean()
        tokens = posterior.tokens
        if self.slow_posterior is not None:  # codes that change more slowly are easier to learn
            with torch.no_grad():
                tokens = self.slow_posterior(**inputs, action=x1).tokens
        if isinstance(prior, Codes):
            indices = nearest_codes(tokens, self.codebook.codes)
            prior_loss = prior.loss(indices, self.weights.label_smoothing)
        else:
            prior_loss = prior.loss(tokens.detach(), noise)
        loss = self.weights.commitment * commitment + self.weights.prior * prior_loss
        scalars = {"commitment": commitment, "prior": prior_loss, **self.codebook.usage_scalars()}
        return Coded(code.z, code.zq, prior, loss, scalars)

    def posterior_latent(self, memory: Memory, x1: Tensor, noise: RowNoise) -> Tensor:
        posterior = self.parts["vqvae_posterior"](**memory.latent_inputs, action=x1)
        return self.codebook(posterior.tokens).z

    def latent(self, memory: Memory, noise: Noise | RowNoise) -> Tensor:
        return self.draw(self.parts["vqvae_prior"](**memory.latent_inputs), noise)

    def draw(self, prior: Any, noise: Noise | RowNoise) -> Tensor:
        """z (B, n, D) from a prior of the current observations."""
        return prior.sample(noise, self.codebook.codes)

    def report(self, scalars: dict[str, float]) -> list[str]:
        if "dead" not in scalars:  # a script of its own may have no codes
            return []
        idle = round(scalars["dead"])
        codes = len(self.codebook.codes)
        if codes > 1 and scalars["perplexity"] < COLLAPSED:
            return [f"the latent has collapsed: one of {codes} codes serves all chunks"]
        if idle:
            return [
                f"{idle} of {codes} codes were hardly used in the last 100 steps: if all ways of "
                "the task are taken, fewer num_codes do as well"
            ]
        return []

    def after_step(self, job: Any) -> None:
        """The slow posterior follows; codes that are hardly used move to where they are needed."""
        if self.slow_posterior is not None:
            own = self.parts["vqvae_posterior"]
            optim.update_slow_copy(self.slow_posterior, own, self.weights.posterior_ema, job.step)
        kmeans = (
            self.weights.kmeans_start and job.step == 1 and "vqvae_codebook" not in self.parts.files
        )
        on_turn = job.step % self.weights.revive_every == 0
        revive = on_turn and job.step <= self.weights.revive_until * job.total
        noise = None
        if kmeans or revive:
            noise = Noise("revive", job.cfg.seed, job.step, device=job.device)
        moved = self.codebook.after_step(noise, kmeans)
        if moved is not None:
            optim.reset_rows(job.optimizers, job.average, self.codebook.codes, moved)
