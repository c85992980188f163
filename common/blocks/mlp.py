"""Small components without attention, for low-dimensional tasks and training on a CPU in minutes.

They take the same inputs as those of transformer.py, and may be mixed with them where shapes agree.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.blocks.embed import sincos
from common.blocks.transformer import NEEDS_LATENT, NEEDS_PREFIX
from common.build import block
from common.config import ConfigError
from common.distributions import latent_head


def residual(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))


class Sum(nn.Module):
    """Every source flattened, projected to `dim`, added up and normed: (B, dim) per observation.

    visual_mask (B, cameras) bool puts a learned vector in place of a camera's features and summary.
    """

    def __init__(
        self,
        dim: int,
        state_dim: int,
        proprio_history: int,
        num_cameras: int = 0,
        visual_size: int = 0,
        semantic_dim: int = 0,
        chunk_size: int = 0,
    ):
        super().__init__()
        self.proprio = nn.Linear(state_dim * proprio_history, dim)
        self.visual = nn.ModuleList(nn.Linear(visual_size, dim) for _ in range(num_cameras))
        self.semantic = nn.ModuleList(nn.Linear(semantic_dim, dim) for _ in range(num_cameras))
        if num_cameras:
            self.mask_token = nn.Parameter(torch.zeros(num_cameras, dim))
        self.action = nn.Linear(chunk_size, dim) if chunk_size else None
        self.norm = nn.LayerNorm(dim)

    @torch.no_grad()
    def reorder_inputs(self, visual: Sequence[int], cameras: Sequence[int]) -> None:
        """Give camera i the weights of camera cameras[i]."""
        if len(cameras) != len(self.visual):
            return  # built for other inputs than the policy's, which the first forward reports
        self.visual = nn.ModuleList(self.visual[i] for i in cameras)
        self.semantic = nn.ModuleList(self.semantic[i] for i in cameras)
        self.mask_token.copy_(self.mask_token[list(cameras)])

    def forward(
        self,
        cond_proprio: Tensor,
        cond_visual: list[Tensor],
        cond_semantic: list[Tensor],
        visual_mask: Tensor | None = None,
        action: Tensor | None = None,
    ) -> Tensor:
        if not len(cond_visual) == len(cond_semantic) == len(self.visual):
            raise ConfigError(
                f"{len(cond_visual)} visual and {len(cond_semantic)} semantic inputs given, "
                f"built for {len(self.visual)} cameras"
            )
        x = self.proprio(cond_proprio.flatten(1))
        for i, (grid, summary) in enumerate(zip(cond_visual, cond_semantic, strict=True)):
            camera = self.visual[i](grid.flatten(1)) + self.semantic[i](summary.flatten(1))
            if visual_mask is not None:
                token = self.mask_token[i].to(camera.dtype)
                camera = torch.where(visual_mask[:, i, None], token, camera)
            x = x + camera
        if self.action is not None:
            # pyrefly: ignore[missing-attribute]  # a block that is built for chunks gets them
            x = x + self.action(action.flatten(1))
        return self.norm(x)


@block("mlp_info_encoder")
class MLPInfoEncoder(nn.Module):
    """Observation -> memory (B, 1, dim): the summed sources, then residual layers.

    Args:
        dim: width.
        layers: residual layers.
        state_dim: numbers of a state; null: from the dataset.
        proprio_history: states of an observation; null: from the dataset.
        num_cameras: cameras; null: from the dataset.
        visual_size: numbers of a camera's features, h' w' C.
        semantic_dim: numbers of a camera's summary.
    """

    def __init__(
        self,
        dim: int,
        layers: int,
        state_dim: int,
        proprio_history: int,
        num_cameras: int = 0,
        visual_size: int = 0,
        semantic_dim: int = 0,
    ):
        super().__init__()
        self.sum = Sum(dim, state_dim, proprio_history, num_cameras, visual_size, semantic_dim)
        self.layers = nn.ModuleList(residual(dim) for _ in range(layers))

    def forward(
        self,
        cond_proprio: Tensor,
        cond_visual: list[Tensor],
        cond_semantic: list[Tensor],
        visual_mask: Tensor | None = None,
    ) -> Tensor:
        x = self.sum(cond_proprio, cond_visual, cond_semantic, visual_mask)
        for layer in self.layers:
            x = x + layer(x)
        return x[:, None]


class MLPLatent(nn.Module):
    """The summed sources of the first camera -> one latent token, as a distribution.

    Args:
        dim: width.
        layers: residual layers.
        state_dim: numbers of a state; null: from the dataset.
        proprio_history: states of an observation; null: from the dataset.
        latent_dim: numbers of the latent token; not with head codes.
        num_codes: codes of the codebook; with head codes.
        head: gaussian, flow, point or codes.
        visual_size: numbers of the first camera's features, h' w' C; 0 without cameras.
        semantic_dim: numbers of the first camera's summary.
        action_dim: numbers of an action (a posterior reads the chunk); null: from the dataset.
        action_horizon: actions of a chunk (likewise); null: from the dataset.
    """

    first_camera_only = True

    def __init__(
        self,
        dim: int,
        layers: int,
        state_dim: int,
        proprio_history: int,
        latent_dim: int | None = None,
        num_codes: int | None = None,
        head: str = "gaussian",
        visual_size: int = 0,
        semantic_dim: int = 0,
        action_dim: int = 0,
        action_horizon: int = 0,
    ):
        super().__init__()
        self.sum = Sum(
            dim,
            state_dim,
            proprio_history,
            int(visual_size > 0),
            visual_size,
            semantic_dim,
            action_dim * action_horizon,
        )
        self.layers = nn.ModuleList(residual(dim) for _ in range(layers))
        self.head = latent_head(head, dim, 1, latent_dim, num_codes)

    def distribution(self, *sources: Any) -> Any:
        x = self.sum(*sources)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x[:, None])


@block("mlp_posterior")
class MLPPosterior(MLPLatent):
    """q(z | first camera, proprio, action): for training only.

    It needs action_dim and action_horizon. With head `point` its token is for a codebook.
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


@block("mlp_prior")
class MLPPrior(MLPLatent):
    """p(z | first camera, proprio): acting draws z from it, or with head `codes` its code."""

    def forward(
        self,
        cond_proprio: Tensor,
        cond_visual: list[Tensor],
        cond_semantic: list[Tensor],
        visual_mask: Tensor | None = None,
    ) -> Any:
        return self.distribution(cond_proprio, cond_visual, cond_semantic, visual_mask)


class MLPContext(NamedTuple):
    """All that MLPActionDecoder needs of observations: projected memory plus z (B, 1, dim)."""

    condition: Tensor


@block("mlp_action_decoder")
class MLPActionDecoder(nn.Module):
    """Velocity (or x1) of R noisy chunks as flat vectors: residual layers, scaled and shifted.

    x_t (B, R, T, A), t (B, R) and a context of memory (B, 1, memory_dim) and z (B, n, D), with
    n D = latent_size -> (B, R, T, A). Memory, z and time give scale and shift of each layer;
    `context` computes the share of memory and z once. prefix_mask (B, R, T) marks actions of x_t
    that are given and clean.

    Args:
        dim: width.
        layers: residual layers.
        memory_dim: width of the memory.
        action_dim: numbers of an action; null: from the dataset.
        action_horizon: actions of a chunk; null: from the dataset.
        latent_size: numbers of a latent, n D; 0 without a latent.
        prefix: learn to continue given actions (loss.prefix).
    """

    def __init__(
        self,
        dim: int,
        layers: int,
        memory_dim: int,
        action_dim: int,
        action_horizon: int,
        latent_size: int = 0,
        prefix: bool = False,
    ):
        super().__init__()
        self.embed = nn.Linear(action_horizon * action_dim, dim)
        self.memory = nn.Linear(memory_dim, dim)
        if latent_size:
            self.latent = nn.Linear(latent_size, dim)
        self.prefix = nn.Linear(action_horizon, dim, bias=False) if prefix else None
        self.time = nn.Linear(32, dim, bias=False)
        self.modulation = nn.ModuleList(nn.Linear(dim, 2 * dim) for _ in range(layers))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.out = nn.Linear(dim, action_horizon * action_dim)

    def context(self, memory: Tensor, z: Tensor | None = None) -> MLPContext:
        """memory (B, N, memory_dim), z (k B, n, D) -> the context of k B rows; see with_latent."""
        context = MLPContext(self.memory(memory).mean(1, keepdim=True))
        return context if z is None else self.with_latent(context, z)

    def with_latent(self, context: MLPContext, z: Tensor) -> MLPContext:
        """Add latents z (k B, n, D), k of each observation, to a context (B rows) without."""
        if not hasattr(self, "latent"):
            raise ConfigError(NEEDS_LATENT.format("latent_size"))
        condition = context.condition.repeat(len(z) // len(context.condition), 1, 1)
        return MLPContext(condition + self.latent(z.flatten(1))[:, None])

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        context: MLPContext,
        prefix_mask: Tensor | None = None,
        *routing,
    ) -> Tensor:
        """x_t (B, R, T, A), t (B, R) -> (B, R, T, A). routing is for experts."""
        x = self.embed(x_t.flatten(2))
        if prefix_mask is not None:
            if self.prefix is None:
                raise ConfigError(NEEDS_PREFIX)
            x = x + self.prefix(prefix_mask.to(x.dtype))
        time = self.time(sincos(t, 32, longest=4.0, shortest=4e-2).to(x.dtype))
        condition = nn.functional.silu(context.condition + time)
        for layer, modulation in zip(self.layers, self.modulation, strict=True):
            scale, shift = modulation(condition).chunk(2, -1)
            x = x + layer(self.norm(x) * (1 + scale) + shift, *routing)
        return self.out(self.norm(x), *routing).view_as(x_t)
