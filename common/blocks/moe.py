"""A mixture of experts: a gate reads the latent; only the experts that it chooses decode a sample.

Weights of all experts are stacked in one tensor. Samples are sorted by expert and go through one
grouped product, and an expert that nobody chose has a gradient of zero rather than none, which
data-parallel training needs.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.blocks.mlp import MLPActionDecoder
from common.blocks.transformer import ActionDecoder
from common.build import block
from common.config import ConfigError


@block("gate")
class Gate(nn.Module):
    """Quantised latent zq (B, n, D), n D = latent_size -> logits of the experts (B, E).

    No norm on the logits: over a handful of experts it would bound what the gate can say.

    Args:
        latent_size: numbers of a latent, n D.
        dim: width of the hidden layers.
        experts: number of experts, as of the decoder.
    """

    def __init__(self, latent_size: int, dim: int, experts: int):
        super().__init__()
        self.experts = experts
        self.layers = nn.Sequential(
            nn.Linear(latent_size, dim),
            nn.SiLU(),
            nn.Linear(dim, dim),
            nn.SiLU(),
            nn.Linear(dim, experts),
        )

    def forward(self, zq: Tensor) -> Tensor:
        return self.layers(zq.flatten(1)).float()


def choose_experts(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Logits (B, E) -> the k best experts (B, k), and their weights (B, k), which sum to 1."""
    best, experts = logits.topk(k)
    return experts, best.softmax(-1)


class Routing(NamedTuple):
    """Which of E experts serves each of the rows B R: sorted by expert, and put back afterwards.

    order, back (B R): positions; chosen (B R, E): the experts of the sorted rows, one-hot.
    """

    order: Tensor
    back: Tensor
    chosen: Tensor

    @classmethod
    def of(cls, experts: Tensor, count: int) -> "Routing":
        """experts (B, R), each below count."""
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        return cls(order, order.argsort(), F.one_hot(flat[order], count).float())

    def apply(self, network: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        """x (B, R, ..., d) through network(tokens (B R, n, d) in order of experts, chosen)."""
        rows = x.flatten(0, 1)[self.order]
        y = network(rows.reshape(len(rows), -1, rows.shape[-1]), self.chosen)
        return y.reshape(*rows.shape[:-1], -1)[self.back].unflatten(0, x.shape[:2])


class ExpertLinear(nn.Module):
    """A linear layer of each expert, for rows of tokens (N, n, in) in order of experts."""

    def __init__(self, experts: int, size_in: int, size_out: int):
        super().__init__()
        if size_in % 8:
            raise ValueError(f"experts need widths that are multiples of 8, found {size_in}")
        bound = 1 / math.sqrt(size_in)  # as nn.Linear starts
        self.weight = nn.Parameter(torch.empty(experts, size_in, size_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(experts, size_out).uniform_(-bound, bound))

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        size = self.weight.shape[-1]
        dtype = x.dtype
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)  # autocast does not know grouped products
        # Rows must start at multiples of 16 bytes; a pad of nothing would copy the weights.
        weight = F.pad(self.weight, (0, -size % 8)) if size % 8 else self.weight
        ends = chosen.sum(0).cumsum(0).int() * x.shape[1]
        y = F.grouped_mm(x.flatten(0, 1).to(dtype), weight.to(dtype), offs=ends)[:, :size]
        return y.unflatten(0, x.shape[:2]) + (chosen @ self.bias).to(dtype)[:, None]


class ExpertMLP(nn.Module):
    """Layers of `sizes` for each expert with an activation between them; `first`: also before."""

    def __init__(
        self,
        experts: int,
        sizes: Sequence[int],
        activation: Callable[[Tensor], Tensor] | None = None,
        first: bool = False,
    ):
        super().__init__()
        self.layers = nn.ModuleList(ExpertLinear(experts, *pair) for pair in pairwise(sizes))
        self.activation = activation
        self.first = first

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        return routing.apply(self._network, x)

    def _network(self, x: Tensor, chosen: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            if self.activation and (i or self.first):
                x = self.activation(x)
            x = layer(x, chosen)
        return x


class MixtureContext(NamedTuple):
    """Context of the shared decoder, experts (B, k), and their routing for one chunk of each row.

    Experts and routing are None as long as there is no latent to choose them.
    """

    decoder: Any
    experts: Tensor | None
    routing: Routing | None


class Mixture(nn.Module):
    """A decoder of experts: as the single one, with k answers of each chunk.

    x_t (B, R, T, A), t (B, R) and a context of memory, z and experts (B, k) -> (B, k R, T, A), the
    first expert's chunks before the next one's.
    """

    def __init__(self, experts: int, decoder: nn.Module):
        super().__init__()
        self.experts = experts
        self.decoder = decoder

    def context(
        self, memory: Tensor, z: Tensor | None = None, experts: Tensor | None = None
    ) -> MixtureContext:
        """memory (B, N, d), z (B, n, D), experts (B, k) -> all that does not depend on t."""
        context = MixtureContext(self.decoder.context(memory), None, None)
        if z is None or experts is None:
            return context
        return self.with_latent(context, z, experts)

    def with_latent(self, context: MixtureContext, z: Tensor, experts: Tensor) -> MixtureContext:
        """Add latents z (B, n, D) and the experts (B, k) that they choose to a context without."""
        routing = Routing.of(experts, self.experts)
        return MixtureContext(self.decoder.with_latent(context.decoder, z), experts, routing)

    def forward(
        self, x_t: Tensor, t: Tensor, context: MixtureContext, prefix_mask: Tensor | None = None
    ) -> Tensor:
        _, experts, routing = context
        if experts is None:
            raise ConfigError("a latent chooses the experts, and none is given")
        draws = x_t.shape[1]
        k = experts.shape[1]
        if draws > 1:
            routing = Routing.of(experts.repeat_interleave(draws, 1), self.experts)
        if k > 1:
            x_t = x_t.repeat(1, k, 1, 1)
            t = t.repeat(1, k)
            prefix_mask = None if prefix_mask is None else prefix_mask.repeat(1, k, 1)
        return self.decoder(x_t, t, context.decoder, prefix_mask, routing)


@block("moe_action_decoder")
class MoEActionDecoder(Mixture):
    """Transformer decoders of noisy chunks that share all but feed-forward layers and heads.

    Args:
        dim: width of the tokens, and of the memory; a multiple of 8.
        heads: attention heads.
        ff: width of the feed-forward networks; a multiple of 8.
        layers: decoder layers.
        experts: number of experts, as of the gate.
        action_dim: numbers of an action; null: from the dataset.
        latent_dim: numbers of a latent token.
        dropout: of each residual branch.
        causal: an action sees earlier noisy actions only. Wrong for a whole chunk.
        prefix: learn to continue given actions (loss.prefix).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        ff: int,
        layers: int,
        experts: int,
        action_dim: int,
        latent_dim: int | None = None,
        dropout: float = 0.0,
        causal: bool = False,
        prefix: bool = False,
    ):
        decoder = ActionDecoder(
            dim, heads, ff, layers, action_dim, latent_dim, dropout, causal, prefix
        )
        super().__init__(experts, decoder)
        for layer in decoder.layers:
            layer.ff = ExpertMLP(experts, (dim, ff, dim), F.gelu)
        decoder.out = ExpertMLP(experts, (dim, action_dim))
        for parameter in decoder.out.parameters():
            nn.init.zeros_(parameter)


@block("moe_mlp_action_decoder")
class MoEMLPActionDecoder(Mixture):
    """Decoders of noisy chunks as flat vectors that share all but layers and heads.

    Args:
        dim: width; a multiple of 8.
        layers: residual layers.
        experts: number of experts, as of the gate.
        memory_dim: width of the memory.
        action_dim: numbers of an action; null: from the dataset.
        action_horizon: actions of a chunk; null: from the dataset.
        latent_size: numbers of a latent, n D.
        prefix: learn to continue given actions (loss.prefix).
    """

    def __init__(
        self,
        dim: int,
        layers: int,
        experts: int,
        memory_dim: int,
        action_dim: int,
        action_horizon: int,
        latent_size: int = 0,
        prefix: bool = False,
    ):
        decoder = MLPActionDecoder(
            dim, layers, memory_dim, action_dim, action_horizon, latent_size, prefix
        )
        super().__init__(experts, decoder)
        decoder.layers = nn.ModuleList(
            ExpertMLP(experts, (dim, 2 * dim, dim), F.silu, first=True) for _ in range(layers)
        )
        decoder.out = ExpertMLP(experts, (dim, action_horizon * action_dim))
