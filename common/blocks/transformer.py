"""Transformer components: observation encoder, latent posterior and prior, action decoder.

All pre-norm with SDPA attention. Attention has no biases but the output's: a key bias cannot change
a softmax, a value bias is absorbed by the output's, and the norm in front already shifts queries.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common.blocks.embed import sincos, with_positions
from common.build import Count, block
from common.config import ConfigError
from common.distributions import latent_head

KeysValues = tuple[Tensor, Tensor]


def projector(size: int, dim: int) -> nn.Sequential:
    """Backbone tokens of any scale -> width dim."""
    return nn.Sequential(
        nn.LayerNorm(size),
        nn.Linear(size, 2 * dim),
        nn.SiLU(),
        nn.Linear(2 * dim, dim),
        nn.LayerNorm(dim),
    )


class Attention(nn.Module):
    """Multi-head attention of x (B, n, d) to itself, or to keys and values computed beforehand."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        self.heads = heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def keys_values(self, memory: Tensor) -> KeysValues:
        """memory (B, N, d) -> keys and values (B, heads, N, d / heads)."""
        # Two products: to split the result of one costs copies of the whole gradient.
        key_weight, value_weight = self.key_value.weight.chunk(2)
        keys = F.linear(memory, key_weight)
        return self._split(keys), self._split(F.linear(memory, value_weight))

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h c) -> b h n c", h=self.heads)

    def forward(
        self, x: Tensor, keys_values: KeysValues | None = None, causal: bool = False
    ) -> Tensor:
        keys, values = self.keys_values(x) if keys_values is None else keys_values
        query = self._split(self.query(x))
        mixed = F.scaled_dot_product_attention(query, keys, values, is_causal=causal)
        return self.out(rearrange(mixed, "b h n c -> b n (h c)"))


def feed_forward(dim: int, ff: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, ff), nn.GELU(), nn.Linear(ff, dim))


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network over tokens (B, N, dim)."""

    def __init__(self, dim: int, heads: int, ff: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.ff = feed_forward(dim, ff)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.ff(self.norm2(x)))


@block("multimodal_bridge")
class MultimodalBridge(nn.Module):
    """Each source projected to one width, with source embeddings and positions; nothing is mixed.

    cond_proprio (B, P, S); cond_visual: per visual input a grid (B, h, w, C) or tokens (B, N, C),
    the cameras first; cond_semantic: per camera (B, 1, C); action (B, T, A) where action_dim is
    given -> (B, N, dim). visual_mask (B, len(cond_visual)) bool puts learned mask tokens in place
    of a visual input, and of its camera's summary, per sample.

    Args:
        dim: width of the tokens.
        state_dim: numbers of a state; null: from the dataset.
        num_cameras: cameras; null: from the dataset.
        visual_dim: channels of a camera's features.
        semantic_dim: numbers of a camera's summary.
        extra_visual_dims: channels of each further visual input (hand extractors, depth).
        action_dim: numbers of an action, where a chunk is read too.
    """

    def __init__(
        self,
        dim: int,
        state_dim: int,
        num_cameras: Count,
        visual_dim: int,
        semantic_dim: int,
        extra_visual_dims: tuple = (),
        action_dim: int | None = None,
    ):
        super().__init__()
        sizes = [visual_dim] * num_cameras + list(extra_visual_dims)
        self.visual = nn.ModuleList(projector(size, dim) for size in sizes)
        self.semantic = nn.ModuleList(projector(semantic_dim, dim) for _ in range(num_cameras))
        # No norm on low-dimensional inputs: it would remove their mean and scale.
        self.proprio = nn.Linear(state_dim, dim)
        self.action = nn.Linear(action_dim, dim) if action_dim else None
        masked = len(sizes) + num_cameras
        sources = masked + 1 + bool(action_dim)
        self.source = nn.Parameter(torch.empty(sources, dim).normal_(std=0.02))
        self.mask_token = nn.Parameter(torch.empty(masked, dim).normal_(std=0.02))

    @torch.no_grad()
    def reorder_inputs(self, visual: Sequence[int], cameras: Sequence[int]) -> None:
        """Give input i the weights of input visual[i], and its summary those of cameras[i]."""
        if len(visual) != len(self.visual):
            return  # built for other inputs than the policy's, which the first forward reports
        rows = [*visual, *(len(visual) + i for i in cameras)]
        self.visual = nn.ModuleList(self.visual[i] for i in visual)
        self.semantic = nn.ModuleList(self.semantic[i] for i in cameras)
        self.source[: len(rows)] = self.source[rows]
        self.mask_token.copy_(self.mask_token[rows])

    def forward(
        self,
        cond_proprio: Tensor,
        cond_visual: list[Tensor],
        cond_semantic: list[Tensor],
        visual_mask: Tensor | None = None,
        action: Tensor | None = None,
    ) -> Tensor:
        given = (len(cond_visual), len(cond_semantic))
        built = (len(self.visual), len(self.semantic))
        if given != built:
            raise ConfigError(
                f"{given[0]} visual and {given[1]} semantic inputs given, "
                f"built for {built[0]} and {built[1]}"
            )
        projectors = [*self.visual, *self.semantic]
        inputs = [*cond_visual, *cond_semantic]
        sources = [project(x) for project, x in zip(projectors, inputs, strict=True)]
        if visual_mask is not None:
            # Of each summary, the mask is that of its camera.
            masks = torch.cat([visual_mask, visual_mask[:, : given[1]]], 1).unbind(1)
            for i, masked in enumerate(masks):
                masked = masked.view(-1, *[1] * (sources[i].ndim - 1))
                token = self.mask_token[i].to(sources[i].dtype)
                sources[i] = torch.where(masked, token, sources[i])
        sources.append(self.proprio(cond_proprio))
        if self.action is not None:
            sources.append(self.action(action))
        placed = [with_positions(tokens) + self.source[i] for i, tokens in enumerate(sources)]
        return torch.cat(placed, 1)


@block("info_encoder")
class InfoEncoder(nn.Module):
    """Observation -> memory (B, N, dim): multimodal_bridge, then self-attention over all tokens.

    Args:
        dim: width of the tokens.
        heads: attention heads.
        ff: width of the feed-forward networks.
        layers: encoder layers.
        state_dim: numbers of a state; null: from the dataset.
        num_cameras: cameras; null: from the dataset.
        visual_dim: channels of a camera's features.
        semantic_dim: numbers of a camera's summary.
        extra_visual_dims: channels of each further visual input (hand extractors, depth).
        dropout: of each residual branch.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        ff: int,
        layers: int,
        state_dim: int,
        num_cameras: Count,
        visual_dim: int,
        semantic_dim: int,
        extra_visual_dims: tuple = (),
        dropout: float = 0.0,
    ):
        super().__init__()
        self.bridge = MultimodalBridge(
            dim, state_dim, num_cameras, visual_dim, semantic_dim, extra_visual_dims
        )
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, ff, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(
        self,
        cond_proprio: Tensor,
        cond_visual: list[Tensor],
        cond_semantic: list[Tensor],
        visual_mask: Tensor | None = None,
    ) -> Tensor:
        x = self.bridge(cond_proprio, cond_visual, cond_semantic, visual_mask)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class LatentEncoder(nn.Module):
    """Learned query tokens read the sources; a head makes a distribution of them.

    Args:
        dim: width of the tokens.
        heads: attention heads.
        ff: width of the feed-forward networks.
        layers: encoder layers.
        state_dim: numbers of a state; null: from the dataset.
        visual_dim: channels of the first camera's features.
        semantic_dim: numbers of the first camera's summary.
        latent_dim: numbers of a latent token; not with head codes.
        num_codes: codes of the codebook; with head codes.
        head: gaussian, flow, point or codes.
        action_dim: numbers of an action (a posterior reads the chunk); null: from the dataset.
        tokens: latent tokens.
        dropout: of each residual branch.
    """

    first_camera_only = True

    def __init__(
        self,
        dim: int,
        heads: int,
        ff: int,
        layers: int,
        state_dim: int,
        visual_dim: int,
        semantic_dim: int,
        latent_dim: int | None = None,
        num_codes: int | None = None,
        head: str = "gaussian",
        action_dim: int | None = None,
        tokens: int = 5,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.bridge = MultimodalBridge(
            dim, state_dim, 1, visual_dim, semantic_dim, action_dim=action_dim
        )
        self.cls = nn.Parameter(torch.empty(tokens, dim).normal_(std=0.02))
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, ff, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = latent_head(head, dim, tokens, latent_dim, num_codes)

    def distribution(self, *sources: Any) -> Any:
        x = self.bridge(*sources)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x[:, : len(self.cls)]))


@block("vae_posterior")
class VAEPosterior(LatentEncoder):
    """q(z | first camera, proprio, action): for training only.

    With head `point` its tokens are for a codebook.
    """

    def forward(
        self,
        cond_proprio: Tensor,
        cond_visual: list[Tensor],
        cond_semantic: list[Tensor],
        action: Tensor,
        visual_mask: Tensor | None = None,
    ) -> Any:
        return self.distribution(cond_proprio, cond_visual, cond_semantic, visual_mask, action)


@block("vae_prior")
class VAEPrior(LatentEncoder):
    """p(z | first camera, proprio): acting draws z from it, or with head `codes` its code."""

    def forward(
        self,
        cond_proprio: Tensor,
        cond_visual: list[Tensor],
        cond_semantic: list[Tensor],
        visual_mask: Tensor | None = None,
    ) -> Any:
        return self.distribution(cond_proprio, cond_visual, cond_semantic, visual_mask)


class DecoderLayer(nn.Module):
    """Self-attention over a chunk, cross-attention to the memory, feed-forward, each modulated."""

    def __init__(self, dim: int, heads: int, ff: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.self_attention = Attention(dim, heads)
        self.cross = Attention(dim, heads)
        self.ff = feed_forward(dim, ff)
        self.table = nn.Parameter(torch.zeros(9, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, modulation: Tensor, keys_values: KeysValues, causal: bool, *routing
    ) -> Tensor:
        """x (B, R, T, d), modulation (B, R, 9, d), keys and values (B, heads, N, d / heads)."""
        draws = x.shape[1]
        shift, scale, gate = (modulation + self.table).unflatten(2, (3, 3))[..., None, :].unbind(3)
        y = self.norm(x) * (1 + scale[:, :, 0]) + shift[:, :, 0]
        y = self.self_attention(y.flatten(0, 1), causal=causal).unflatten(0, (-1, draws))
        x = x + gate[:, :, 0] * self.dropout(y)
        y = self.norm(x) * (1 + scale[:, :, 1]) + shift[:, :, 1]
        y = self.cross(y.flatten(1, 2), keys_values).unflatten(1, (draws, -1))
        x = x + gate[:, :, 1] * self.dropout(y)
        y = self.norm(x) * (1 + scale[:, :, 2]) + shift[:, :, 2]
        return x + gate[:, :, 2] * self.dropout(self.ff(y, *routing))


class DecoderContext(NamedTuple):
    """All that ActionDecoder needs of a batch of observations, none of which depends on t.

    keys_values: of each layer, of the memory's tokens and then of z's; latent: z's tokens
    (B, n, d), None without z.
    """

    keys_values: list[KeysValues]
    latent: Tensor | None


@block("vfp_single_action_decoder")
class ActionDecoder(nn.Module):
    """Velocity (or x1) of R noisy chunks per observation, by cross-attention to the memory.

    x_t (B, R, T, A), t (B, R) and a context of memory (B, N, d) and z (B, n, D) -> (B, R, T, A).
    Time, and the mean of z, enter by AdaLN-Zero (Peebles & Xie 2023, arXiv:2212.09748) with one
    modulation shared by all layers plus a table per layer (Chen et al. 2023, arXiv:2310.00426), so
    that keys and values do not depend on t: `context` computes them once per observation. z also
    joins the memory as tokens. prefix_mask (B, R, T) marks actions of x_t that are given and clean.

    Args:
        dim: width of the tokens, and of the memory.
        heads: attention heads.
        ff: width of the feed-forward networks.
        layers: decoder layers.
        action_dim: numbers of an action; null: from the dataset.
        latent_dim: numbers of a latent token; left out without a latent.
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
        action_dim: int,
        latent_dim: int | None = None,
        dropout: float = 0.0,
        causal: bool = False,
        prefix: bool = False,
    ):
        super().__init__()
        self.causal = causal
        self.embed = nn.Linear(action_dim, dim)
        self.prefix = nn.Parameter(torch.zeros(dim)) if prefix else None
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        if latent_dim:
            self.latent = nn.Linear(latent_dim, dim)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 9 * dim))
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, ff, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, action_dim)
        for last in (self.modulation[1], self.out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def context(self, memory: Tensor, z: Tensor | None = None) -> DecoderContext:
        """memory (B, N, d), z (k B, n, D) -> the context of k B rows; see with_latent."""
        context = DecoderContext([layer.cross.keys_values(memory) for layer in self.layers], None)
        return context if z is None else self.with_latent(context, z)

    def with_latent(self, context: DecoderContext, z: Tensor) -> DecoderContext:
        """Add latents z (k B, n, D), k of each observation, to a context (B rows) without latent.

        All observations with their first latent come first, then all with their second.
        """
        if not hasattr(self, "latent"):
            raise ConfigError(NEEDS_LATENT.format("latent_dim"))
        latent = self.latent(z)
        times = len(z) // len(context.keys_values[0][0])
        joined = []
        for layer, (keys, values) in zip(self.layers, context.keys_values, strict=True):
            latent_keys, latent_values = layer.cross.keys_values(latent)
            if times > 1:
                keys = keys.repeat(times, 1, 1, 1)
                values = values.repeat(times, 1, 1, 1)
            keys = torch.cat([keys, latent_keys], 2)
            values = torch.cat([values, latent_values], 2)
            joined.append((keys, values))
        return DecoderContext(joined, latent)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        context: DecoderContext,
        prefix_mask: Tensor | None = None,
        *routing,
    ) -> Tensor:
        """x_t (B, R, T, A), t (B, R) -> (B, R, T, A). routing is for experts."""
        x = self.embed(x_t)
        if prefix_mask is not None:
            if self.prefix is None:
                raise ConfigError(NEEDS_PREFIX)
            x = x + prefix_mask[..., None] * self.prefix
        positions = torch.arange(x.shape[2], device=x.device, dtype=torch.float32)
        x = x + sincos(positions, x.shape[-1]).to(x.dtype)
        condition = self.time(sincos(t, x.shape[-1], longest=4.0, shortest=4e-3).to(x.dtype))
        if context.latent is not None:
            condition = condition + context.latent.mean(1, keepdim=True)
        modulation = self.modulation(condition).unflatten(-1, (9, -1))
        for layer, keys_values in zip(self.layers, context.keys_values, strict=True):
            x = layer(x, modulation, keys_values, self.causal, *routing)
        return self.out(self.norm(x), *routing)


NEEDS_LATENT = "a latent is given: build the decoder with {}, the numbers of the latent"
NEEDS_PREFIX = "the first actions are given (loss.prefix): build the decoder with `prefix: true`"
