"""Transformer components: observation encoder, latent posterior and prior, action decoder.

All pre-norm with SDPA attention. Attention has no biases but the output's: a key bias cannot change a softmax, a value
bias is absorbed by the output's, and the norm in front already shifts queries.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common.blocks.embed import known_prefix, sincos, with_positions
from common.build import block
from common.config import ConfigError
from common.distributions import latent_head


def projector(size: int, dim: int) -> nn.Sequential:
    """Backbone tokens of any scale -> width dim."""
    layers = (
        nn.LayerNorm(size),
        nn.Linear(size, 2 * dim),
        nn.SiLU(),
        nn.Linear(2 * dim, dim),
        nn.LayerNorm(dim),
    )
    return nn.Sequential(*layers)


class Attention(nn.Module):
    def __init__(self, dim, heads, memory_dim=None):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        self.heads = heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(memory_dim or dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """memory (B, N, d) -> keys and values (B, heads, N, d / heads)."""
        # Two products: to split the result of one costs copies of the whole gradient.
        both = (F.linear(memory, weight) for weight in self.key_value.weight.chunk(2))
        return tuple(rearrange(x, "b n (h c) -> b h n c", h=self.heads) for x in both)

    def forward(self, x: Tensor, keys_values=None, causal=False) -> Tensor:
        keys, values = self.keys_values(x) if keys_values is None else keys_values
        query = rearrange(self.query(x), "b n (h c) -> b h n c", h=self.heads)
        mixed = F.scaled_dot_product_attention(query, keys, values, is_causal=causal)
        return self.out(rearrange(mixed, "b h n c -> b n (h c)"))


def feed_forward(dim, ff):
    return nn.Sequential(nn.Linear(dim, ff), nn.GELU(), nn.Linear(ff, dim))


class EncoderLayer(nn.Module):
    def __init__(self, dim, heads, ff, dropout):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention, self.ff = Attention(dim, heads), feed_forward(dim, ff)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.ff(self.norm2(x)))


@block("multimodal_bridge")
class MultimodalBridge(nn.Module):
    """Each source projected to one width, with source embeddings and positions: (B, N, dim), nothing mixed.

    cond_proprio (B, P, S); cond_visual: per visual input a grid (B, h, w, C) or tokens (B, N, C), the cameras first;
    cond_semantic: per camera (B, 1, C); action (B, T, A) where action_dim is given. drop (B, len(cond_visual)) bool
    puts learned mask tokens in place of an input (and of its camera's summary), per sample.
    """

    def __init__(
        self,
        dim,
        state_dim,
        num_cameras,
        visual_dim,
        semantic_dim,
        extra_visual_dims=(),
        action_dim=None,
    ):
        super().__init__()
        sizes = [visual_dim] * num_cameras + list(extra_visual_dims)
        self.visual = nn.ModuleList(projector(size, dim) for size in sizes)
        self.semantic = nn.ModuleList(projector(semantic_dim, dim) for _ in range(num_cameras))
        # No norm on low-dimensional inputs: it would remove their mean and scale.
        self.proprio = nn.Linear(state_dim, dim)
        self.action = nn.Linear(action_dim, dim) if action_dim else None
        count = len(sizes) + num_cameras + 1 + bool(action_dim)
        self.source = nn.Parameter(torch.empty(count, dim).normal_(std=0.02))
        self.mask_token = nn.Parameter(torch.empty(len(sizes) + num_cameras, dim).normal_(std=0.02))

    def forward(self, cond_proprio, cond_visual, cond_semantic, drop=None, action=None) -> Tensor:
        projectors = [*self.visual, *self.semantic]
        inputs = [*cond_visual, *cond_semantic]
        if len(inputs) != len(projectors):
            raise ConfigError(
                f"{len(cond_visual)} visual and {len(cond_semantic)} semantic inputs given, "
                f"built for {len(self.visual)} and {len(self.semantic)}"
            )
        sources = []
        for i, (project, tokens) in enumerate(zip(projectors, inputs, strict=True)):
            tokens = project(tokens)
            if drop is not None:
                camera = i if i < len(self.visual) else i - len(self.visual)
                dropped = drop[:, camera].view(-1, *[1] * (tokens.ndim - 1))
                tokens = torch.where(dropped, self.mask_token[i].to(tokens.dtype), tokens)
            sources.append(with_positions(tokens))
        sources.append(with_positions(self.proprio(cond_proprio)))
        if self.action is not None:
            sources.append(with_positions(self.action(action)))
        return torch.cat([tokens + self.source[i] for i, tokens in enumerate(sources)], 1)


@block("info_encoder")
class InfoEncoder(nn.Module):
    """Observation -> memory (B, N, dim): MultimodalBridge, then `layers` of self-attention over all tokens."""

    def __init__(
        self,
        dim,
        heads,
        ff,
        layers,
        state_dim,
        num_cameras,
        visual_dim,
        semantic_dim,
        extra_visual_dims=(),
        dropout=0.0,
    ):
        super().__init__()
        self.bridge = MultimodalBridge(
            dim, state_dim, num_cameras, visual_dim, semantic_dim, extra_visual_dims
        )
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, ff, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, cond_proprio, cond_visual, cond_semantic, drop=None) -> Tensor:
        x = self.bridge(cond_proprio, cond_visual, cond_semantic, drop)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class LatentEncoder(nn.Module):
    """Learned query tokens read the sources; a head of latent.py makes a distribution of them."""

    def __init__(
        self,
        dim,
        heads,
        ff,
        layers,
        state_dim,
        visual_dim,
        semantic_dim,
        latent_dim=None,
        num_codes=None,
        head="gaussian",
        action_dim=None,
        tokens=5,
        dropout=0.0,
    ):
        super().__init__()
        self.bridge = MultimodalBridge(
            dim, state_dim, 1, visual_dim, semantic_dim, action_dim=action_dim
        )
        self.cls = nn.Parameter(torch.empty(tokens, dim).normal_(std=0.02))
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, ff, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = latent_head(head, dim, tokens, latent_dim, num_codes)

    def distribution(self, *sources):
        x = self.bridge(*sources)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x[:, : len(self.cls)]))


@block("vae_posterior")
class VAEPosterior(LatentEncoder):
    """q(z | first camera, proprio, action): training only. With head `point` its tokens are for a codebook."""

    def forward(self, cond_proprio, cond_visual, cond_semantic, action, drop=None):
        return self.distribution(cond_proprio, cond_visual, cond_semantic, drop, action)


@block("vae_prior")
class VAEPrior(LatentEncoder):
    """p(z | first camera, proprio): what z, or with head `codes` which codes, are drawn from when acting."""

    def forward(self, cond_proprio, cond_visual, cond_semantic, drop=None):
        return self.distribution(cond_proprio, cond_visual, cond_semantic, drop)


class DecoderLayer(nn.Module):
    def __init__(self, dim, heads, ff, dropout):
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.self_attention, self.cross = Attention(dim, heads), Attention(dim, heads)
        self.ff = feed_forward(dim, ff)
        self.table = nn.Parameter(torch.zeros(9, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, modulation, keys_values, causal, *routing):
        """x (B, R, T, d), modulation (B, R, 9, d), keys and values (B, heads, N, d / heads) shared by the R rows."""
        rows = x.shape[1]
        shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3, gate3 = (
            modulation + self.table
        )[..., None, :].unbind(2)
        y = (self.norm(x) * (1 + scale1) + shift1).flatten(0, 1)
        x = x + gate1 * self.dropout(self.self_attention(y, causal=causal)).unflatten(0, (-1, rows))
        y = (self.norm(x) * (1 + scale2) + shift2).flatten(1, 2)
        x = x + gate2 * self.dropout(self.cross(y, keys_values)).unflatten(1, (rows, -1))
        return x + gate3 * self.dropout(self.ff(self.norm(x) * (1 + scale3) + shift3, *routing))


@block("vfp_single_action_decoder")
class ActionDecoder(nn.Module):
    """Velocity (or x1) of R noisy chunks per observation: x_t (B, R, T, A), t (B, R), memory (B, N, d), z (B, n, D).

    Time, and the mean of z, enter by AdaLN-Zero (Peebles & Xie 2023, arXiv:2212.09748) with one modulation shared by
    all layers plus a table per layer (Chen et al. 2023, arXiv:2310.00426), so that keys and values of the memory do
    not depend on t: `bind` computes them once per observation. z also joins the memory as tokens. With `prefix`, fixed
    (B, R, T) marks the actions of x_t that are given and clean.
    """

    def __init__(
        self,
        dim,
        heads,
        ff,
        layers,
        action_dim,
        latent_dim=None,
        dropout=0.0,
        causal=False,
        prefix=False,
    ):
        super().__init__()
        self.causal = causal
        self.embed = nn.Linear(action_dim, dim)
        self.prefix = nn.Parameter(torch.zeros(dim)) if prefix else None
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.latent = nn.Linear(latent_dim, dim) if latent_dim else None
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 9 * dim))
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, ff, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, action_dim)
        for last in (self.modulation[1], self.out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x_t, t, memory, z=None, fixed=None) -> Tensor:
        return self.bind(memory, z)(x_t, t, fixed=fixed)

    def bind(self, memory, z=None):
        """memory, z -> callable(x_t, t[, z, fixed]) with every layer's keys and values computed.

        z may hold k latents per observation, (k B, n, D): all observations with the first, then with the next.
        """
        return BoundDecoder(self, [layer.cross.keys_values(memory) for layer in self.layers], z)

    def run(self, x_t, t, keys_values, latent, fixed, *routing):
        x = self.embed(x_t)
        if fixed is not None:
            x = x + fixed[..., None] * known_prefix(self.prefix)
        x = x + sincos(
            torch.arange(x.shape[2], device=x.device, dtype=torch.float32), x.shape[-1]
        ).to(x.dtype)
        c = self.time(sincos(t, x.shape[-1], longest=4.0, shortest=4e-3).to(x.dtype))
        if latent is not None:
            c = c + latent.mean(1, keepdim=True)
        modulation = self.modulation(c).unflatten(-1, (9, -1))
        for layer, kv in zip(self.layers, keys_values, strict=True):
            x = layer(x, modulation, kv, self.causal, *routing)
        return self.out(self.norm(x), *routing)


class BoundDecoder:
    """An ActionDecoder that holds the keys and values of one batch of observations."""

    def __init__(self, decoder, keys_values, z=None):
        self.decoder, self.keys_values, self.z = decoder, keys_values, z
        self.known = (None, keys_values) if z is None else self._join(z)

    def _join(self, z):
        latent = self.decoder.latent(z)
        of_z = [layer.cross.keys_values(latent) for layer in self.decoder.layers]
        times = len(z) // max(len(self.keys_values[0][0]), 1)  # of nobody, too
        known = [
            tuple(x.repeat(times, 1, 1, 1) if times > 1 else x for x in kv)
            for kv in self.keys_values
        ]
        pairs = zip(known, of_z, strict=True)
        return latent, [
            tuple(torch.cat(both, 2) for both in zip(kv, kvz, strict=True)) for kv, kvz in pairs
        ]

    def detach(self):
        """The same without gradient to the memory and to its key and value projections."""
        return BoundDecoder(
            self.decoder, [tuple(x.detach() for x in kv) for kv in self.keys_values], self.z
        )

    def __call__(self, x_t, t, z=None, fixed=None, *routing) -> Tensor:
        latent, keys_values = self.known if z is None else self._join(z)
        return self.decoder.run(x_t, t, keys_values, latent, fixed, *routing)
