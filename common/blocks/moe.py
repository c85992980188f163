"""A mixture of experts: a gate reads the latent, and only the experts that it chooses for a sample decode it.

Weights of all experts are stacked in one tensor: samples are sorted by expert and go through one grouped product, and
an expert that nobody chose has a gradient of zero rather than none, which data-parallel training needs.
"""

import math
from itertools import pairwise

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
    """

    def __init__(self, latent_size, dim, experts):
        super().__init__()
        self.experts = experts
        hidden = nn.Linear(latent_size, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU()
        self.layers = nn.Sequential(*hidden, nn.Linear(dim, experts))

    def forward(self, zq) -> Tensor:
        return self.layers(zq.flatten(1)).float()


def check_mixture(parts):
    """Raises ConfigError where a policy's components do not make a mixture."""
    for name, other in (("gate", "moe_action_decoder"), ("moe_action_decoder", "gate")):
        if name not in parts:
            raise ConfigError(f"{other} is listed: it needs {name} as well")
    if not any(name.startswith("vqvae_") for name in parts):
        raise ConfigError(
            "gate: it reads a code, so list vqvae_posterior, vqvae_codebook and vqvae_prior as well"
        )
    asked, there = parts["gate"].block.experts, parts["moe_action_decoder"].block.experts
    if asked != there:
        raise ConfigError(
            f"gate has experts: {asked}, moe_action_decoder has experts: {there}; make them equal"
        )


def choose(logits: Tensor, k: int) -> tuple[dict[str, Tensor], Tensor]:
    """Logits (B, E) -> {"experts": the k best (B, k)}, as decoders take it, and weights (B, k) that sum to 1."""
    if k > logits.shape[1]:
        raise ConfigError(
            f"{k} experts asked for (loss.top_k, sampling.experts), of {logits.shape[1]}"
        )
    best, experts = logits.topk(k)
    return {"experts": experts}, best.softmax(-1)


class Routing:
    """Which of `count` experts serves each row, experts (B, R): rows are sorted by expert, and put back."""

    def __init__(self, experts: Tensor, count: int):
        flat = experts.flatten()
        self.order = flat.argsort(stable=True)
        self.back = self.order.argsort()
        self.chosen = F.one_hot(flat[self.order], count).float()
        self.of_tokens = {}  # tokens per row -> chosen of each: the same in all layers and steps

    def __call__(self, x: Tensor, network) -> Tensor:
        """x (B, R, ..., d) through network(tokens (N, d) in order of experts, their experts one-hot (N, E))."""
        rows = x.flatten(0, 1)[self.order]
        tokens = rows.shape[1:-1].numel()
        if tokens not in self.of_tokens:
            self.of_tokens[tokens] = self.chosen.repeat_interleave(tokens, 0)
        y = network(rows.flatten(0, -2), self.of_tokens[tokens])
        return y.unflatten(0, rows.shape[:-1])[self.back].unflatten(0, x.shape[:2])


class ExpertLinear(nn.Module):
    """A linear layer of each expert, for tokens (N, in) in order of experts."""

    def __init__(self, experts, size_in, size_out):
        super().__init__()
        if size_in % 8:
            raise ValueError(f"experts need widths that are multiples of 8, found {size_in}")
        bound = 1 / math.sqrt(size_in)  # as nn.Linear starts
        self.weight = nn.Parameter(torch.empty(experts, size_in, size_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(experts, size_out).uniform_(-bound, bound))

    def forward(self, x, chosen) -> Tensor:
        size, dtype, device = self.weight.shape[-1], x.dtype, x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)  # autocast does not know grouped products
        # Rows must start at multiples of 16 bytes; a pad of nothing would copy the weights.
        weight = (F.pad(self.weight, (0, -size % 8)) if size % 8 else self.weight).to(dtype)
        y = F.grouped_mm(x.to(dtype), weight, offs=chosen.sum(0).cumsum(0).int())[:, :size]
        return y + (chosen @ self.bias).to(dtype)


class ExpertMLP(nn.Module):
    """Layers of `sizes` for each expert with an activation between them; `first`: also before."""

    def __init__(self, experts, sizes, activation=None, first=False):
        super().__init__()
        self.layers = nn.ModuleList(ExpertLinear(experts, *pair) for pair in pairwise(sizes))
        self.activation, self.first = activation, first

    def forward(self, x, routing: Routing) -> Tensor:
        return routing(x, self._network)

    def _network(self, x, chosen):
        for i, layer in enumerate(self.layers):
            x = layer(self.activation(x) if i or self.first else x, chosen)
        return x


class Mixture(nn.Module):
    """What decoders of experts share: x_t (B, R, T, A) and experts (B, k) -> (B, k R, T, A), the first expert's rows
    before the next one's; t, memory, z and fixed as of a single decoder.
    """

    def __init__(self, experts, decoder):
        super().__init__()
        self.experts, self.decoder = experts, decoder

    def forward(self, x_t, t, memory, experts, z=None, fixed=None) -> Tensor:
        return self.bind(memory, z, experts)(x_t, t, fixed=fixed)

    def bind(self, memory, z=None, experts=None):
        """memory, z, experts -> callable(x_t, t[, z, fixed, experts])."""
        return BoundExperts(self.experts, self.decoder.bind(memory, z), experts)


@block("moe_action_decoder")
class MoEActionDecoder(Mixture):
    """ActionDecoders that share all but their feed-forward layers and heads; with `full_experts`, nothing."""

    def __init__(
        self,
        dim,
        heads,
        ff,
        layers,
        experts,
        action_dim,
        latent_dim=None,
        dropout=0.0,
        causal=False,
        prefix=False,
        full_experts=False,
    ):
        def single():
            return ActionDecoder(
                dim, heads, ff, layers, action_dim, latent_dim, dropout, causal, prefix
            )

        if full_experts:
            super().__init__(experts, nn.ModuleList(single() for _ in range(experts)))
            return
        super().__init__(experts, single())
        for layer in self.decoder.layers:
            layer.ff = ExpertMLP(experts, (dim, ff, dim), F.gelu)
        self.decoder.out = ExpertMLP(experts, (dim, action_dim))
        for p in self.decoder.out.parameters():
            nn.init.zeros_(p)

    def bind(self, memory, z=None, experts=None):
        if isinstance(self.decoder, nn.ModuleList):
            return BoundFull(self.decoder, memory, z, experts)
        return super().bind(memory, z, experts)


@block("moe_mlp_action_decoder")
class MoEMLPActionDecoder(Mixture):
    """MLPActionDecoders that share all but their layers and heads."""

    def __init__(
        self,
        dim,
        layers,
        experts,
        memory_dim,
        action_dim,
        action_horizon,
        latent_size=0,
        prefix=False,
    ):
        single = MLPActionDecoder(
            dim, layers, memory_dim, action_dim, action_horizon, latent_size, prefix
        )
        super().__init__(experts, single)
        single.layers = nn.ModuleList(
            ExpertMLP(experts, (dim, 2 * dim, dim), F.silu, first=True) for _ in range(layers)
        )
        single.out = ExpertMLP(experts, (dim, action_horizon * action_dim))


class BoundExperts:
    """A bound decoder whose feed-forward layers take a Routing, and the experts of each observation."""

    def __init__(self, count, bound, experts=None):
        self.count, self.bound, self.experts = count, bound, experts
        self.routing = None if experts is None else Routing(experts, count)

    def detach(self):
        """The same without gradient to the memory and its projections."""
        return BoundExperts(self.count, self.bound.detach(), self.experts)

    def __call__(self, x_t, t, z=None, fixed=None, experts=None) -> Tensor:
        rows, routing, chosen = (
            x_t.shape[1],
            self.routing,
            self.experts if experts is None else experts,
        )
        if experts is not None or rows > 1:
            routing = Routing(chosen.repeat_interleave(rows, 1), self.count)
        k = chosen.shape[1]
        x_t, t, fixed = (
            x if x is None or k == 1 else torch.cat([x] * k, 1) for x in (x_t, t, fixed)
        )
        return self.bound(x_t, t, z, fixed, routing)


class BoundFull:
    """Whole decoders, each bound to the observations that it serves."""

    def __init__(self, decoders, memory, z=None, experts=None, detached=False):
        self.decoders, self.memory, self.z, self.experts, self.detached = (
            decoders,
            memory,
            z,
            experts,
            detached,
        )
        self.parts = None if experts is None else self._split(experts, z)

    def _split(self, experts, z):
        """Per decoder: its samples, which of their experts it is, and the decoder bound to them."""
        parts = []
        for expert, decoder in enumerate(self.decoders):
            samples, slots = (experts == expert).nonzero(as_tuple=True)
            bound = decoder.bind(self.memory[samples], None if z is None else z[samples])
            parts.append((samples, slots, bound.detach() if self.detached else bound))
        return parts

    def detach(self):
        """The same without gradient to the memory and its projections."""
        return BoundFull(self.decoders, self.memory, self.z, self.experts, detached=True)

    def __call__(self, x_t, t, z=None, fixed=None, experts=None) -> Tensor:
        parts = self.parts if experts is None else self._split(experts, self.z if z is None else z)
        k = (self.experts if experts is None else experts).shape[1]
        out = x_t.new_zeros(len(x_t), k, *x_t.shape[1:])
        for samples, slots, bound in parts:
            # Also of nobody: a decoder that takes no part would have no gradient, which others wait for.
            y = bound(x_t[samples], t[samples], fixed=None if fixed is None else fixed[samples])
            out = out.index_put((samples, slots), y.to(out.dtype))
        return out.flatten(1, 2)
