"""The codebook of a discrete latent."""

from typing import NamedTuple

import torch
from accelerate.utils import gather
from torch import Tensor, nn

from common.build import block
from common.distributions import nearest_codes
from common.losses import nsvq
from common.noise import Noise


class Quantised(NamedTuple):
    """The codes zq (B, n, D) nearest to some z_e, their indices (B, n), and z for the decoder."""

    zq: Tensor
    indices: Tensor
    z: Tensor


@block("vq_codebook")
class Codebook(nn.Module):
    """Codes (K, D), a running average of each one's share of use, and the z_e of the current step.

    Args:
        num_codes: codes, K; at least 2.5 times as many as there are ways of doing the task.
        latent_dim: numbers of a code, D.
        null_tokens: learned tokens that say nothing, for classifier-free guidance; as many as the
            posterior has tokens, 0 without.
    """

    def __init__(self, num_codes: int, latent_dim: int, null_tokens: int = 0):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(num_codes, latent_dim))
        self.null_tokens = null_tokens
        self.null = (
            nn.Parameter(0.02 * torch.randn(null_tokens, latent_dim)) if null_tokens else None
        )
        self.register_buffer("usage", torch.full((num_codes,), 1 / num_codes))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, z_e: Tensor, noise: Noise | None = None) -> Quantised:
        """z_e (B, n, D) -> codes. With noise, in training, z is z_e plus noise by NSVQ."""
        z_e = z_e.float()
        indices = nearest_codes(z_e, self.codes)
        zq = self.codes[indices]
        if noise is None:
            return Quantised(zq, indices, zq)
        self.seen.append((z_e.detach(), indices))
        return Quantised(zq, indices, nsvq(z_e, zq, noise.normal(*z_e.shape)))

    def usage_scalars(self) -> dict[str, Tensor]:
        """Effective number of codes in use, and the number of idle ones, of the running average."""
        share = self.usage / self.usage.sum()
        perplexity = (-torch.xlogy(share, share).sum()).exp()
        return {"perplexity": perplexity, "dead": self._idle().sum()}

    def _idle(self) -> Tensor:
        """Codes used less than a fifth of an even share, averaged over about 100 steps."""
        return self.usage < 0.2 / len(self.codes)

    @torch.no_grad()
    def after_step(self, noise: Noise | None, kmeans: bool = False) -> Tensor | None:
        """Count the codes that the step used; with noise, move idle ones to where the error is.

        They move to z_e of the step, drawn in proportion to their squared distance from their
        codes, as k-means++ draws its centres (Arthur & Vassilvitskii 2007): a code that serves two
        ways of doing the task gets company. With kmeans, all codes become centres of this step's
        z_e instead. All processes do the same. Returns the indices of the codes that moved, if any
        did: averages and an optimizer's moments no longer fit them.
        """
        indices = torch.cat([gather(indices.flatten()) for _, indices in self.seen])
        used = torch.ones_like(indices, dtype=torch.float32)
        counts = torch.zeros_like(self.usage).index_add_(0, indices, used)
        self.usage.lerp_(counts / len(indices), 0.01)
        moved = None
        if noise is not None and self.codes.requires_grad:
            z_e = torch.cat([gather(z_e.flatten(0, 1)) for z_e, _ in self.seen])
            moved = self._kmeans(z_e) if kmeans else self._revive(z_e, indices, noise)
        self.seen.clear()
        return moved

    def _kmeans(self, z_e: Tensor) -> Tensor | None:
        count = len(self.codes)
        if len(z_e) < count:
            print(
                f"notice: {count} codes start at random: "
                f"a batch has only {len(z_e)} points for k-means"
            )
            return None
        self.codes.copy_(kmeans_centres(z_e, count))
        return torch.arange(count, device=z_e.device)

    def _revive(self, z_e: Tensor, indices: Tensor, noise: Noise) -> Tensor | None:
        idle = self._idle().nonzero()[:, 0]
        if not len(idle):
            return None
        error = (z_e - self.codes[indices]).square().sum(-1) + 1e-12  # all may be 0
        drawn = torch.multinomial(error, len(idle), replacement=True, generator=noise.generator)
        chosen = z_e[drawn]
        self.codes[idle] = chosen + 0.01 * noise.normal(*chosen.shape)
        self.usage[idle] = 1 / len(self.codes)
        return idle


def kmeans_centres(x: Tensor, k: int) -> Tensor:
    """k-means of x (N, D) -> (k, D)."""
    from scipy.cluster.vq import kmeans2  # a slow import that few runs need

    found, _ = kmeans2(x.double().cpu().numpy(), k, iter=20, minit="++", missing="warn", seed=0)
    return torch.from_numpy(found).to(x)
