"""Small components without attention, for low-dimensional tasks and for training on a CPU in minutes.

They take the same inputs as those of transformer.py, and may be mixed with them where the shapes agree.
"""

import torch
from torch import Tensor, nn

from common.blocks.embed import known_prefix, sincos
from common.build import block
from common.config import ConfigError
from common.distributions import latent_head


class Sum(nn.Module):
    """Every source flattened, projected to `dim` and added up, then normed: one vector (B, dim) per observation."""

    def __init__(
        self,
        dim,
        state_dim,
        proprio_history,
        num_cameras=0,
        visual_size=0,
        semantic_dim=0,
        chunk_size=0,
    ):
        super().__init__()
        self.proprio = nn.Linear(state_dim * proprio_history, dim)
        self.visual = nn.ModuleList(nn.Linear(visual_size, dim) for _ in range(num_cameras))
        self.semantic = nn.ModuleList(nn.Linear(semantic_dim, dim) for _ in range(num_cameras))
        self.mask_token = nn.Parameter(torch.zeros(num_cameras, dim)) if num_cameras else None
        self.action = nn.Linear(chunk_size, dim) if chunk_size else None
        self.norm = nn.LayerNorm(dim)

    def forward(self, cond_proprio, cond_visual, cond_semantic, drop=None, action=None) -> Tensor:
        if not len(cond_visual) == len(cond_semantic) == len(self.visual):
            found = f"{len(cond_visual)} visual and {len(cond_semantic)} semantic inputs given"
            raise ConfigError(f"{found}, built for {len(self.visual)} cameras")
        x = self.proprio(cond_proprio.flatten(1))
        for i, (project, grid, project_semantic, semantic) in enumerate(
            zip(self.visual, cond_visual, self.semantic, cond_semantic, strict=True)
        ):
            seen = project(grid.flatten(1)) + project_semantic(semantic.flatten(1))
            x = x + (
                seen
                if drop is None
                else torch.where(drop[:, i, None], self.mask_token[i].to(seen.dtype), seen)
            )
        return self.norm(x if self.action is None else x + self.action(action.flatten(1)))


@block("mlp_info_encoder")
class MLPInfoEncoder(nn.Module):
    """Observation -> memory (B, 1, dim): the summed sources, then `layers` residual layers."""

    def __init__(
        self, dim, layers, state_dim, proprio_history, num_cameras=0, visual_size=0, semantic_dim=0
    ):
        super().__init__()
        self.sum = Sum(dim, state_dim, proprio_history, num_cameras, visual_size, semantic_dim)
        self.layers = nn.ModuleList(residual(dim, dim) for _ in range(layers))

    def forward(self, cond_proprio, cond_visual, cond_semantic, drop=None) -> Tensor:
        x = self.sum(cond_proprio, cond_visual, cond_semantic, drop)
        for layer in self.layers:
            x = x + layer(x)
        return x[:, None]


def residual(dim, hidden):
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, dim)
    )


class MLPLatent(nn.Module):
    """The summed sources of the first camera -> one latent token; a head of latent.py makes a distribution of it."""

    def __init__(
        self,
        dim,
        layers,
        state_dim,
        proprio_history,
        latent_dim=None,
        num_codes=None,
        head="gaussian",
        visual_size=0,
        semantic_dim=0,
        action_dim=0,
        action_horizon=0,
    ):
        super().__init__()
        cameras, chunk = int(visual_size > 0), action_dim * action_horizon
        self.sum = Sum(dim, state_dim, proprio_history, cameras, visual_size, semantic_dim, chunk)
        self.layers = nn.ModuleList(residual(dim, dim) for _ in range(layers))
        self.head = latent_head(head, dim, 1, latent_dim, num_codes)

    def distribution(self, *sources):
        x = self.sum(*sources)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x[:, None])


@block("mlp_posterior")
class MLPPosterior(MLPLatent):
    """q(z | first camera, proprio, action): training only; takes action_dim and action_horizon.

    With head `point` its token is for a codebook.
    """

    def forward(self, cond_proprio, cond_visual, cond_semantic, action, drop=None):
        return self.distribution(cond_proprio, cond_visual, cond_semantic, drop, action)


@block("mlp_prior")
class MLPPrior(MLPLatent):
    """p(z | first camera, proprio): what z, or with head `codes` which code, is drawn from when acting."""

    def forward(self, cond_proprio, cond_visual, cond_semantic, drop=None):
        return self.distribution(cond_proprio, cond_visual, cond_semantic, drop)


@block("mlp_action_decoder")
class MLPActionDecoder(nn.Module):
    """Velocity (or x1) of R noisy chunks as flat vectors: residual layers, scaled and shifted by memory, z and time.

    x_t (B, R, T, A), t (B, R), memory (B, 1, memory_dim), z (B, n, D) with n D = latent_size. What memory and z
    contribute to the modulation is computed once by `bind`. With `prefix`, fixed (B, R, T) marks the actions of x_t
    that are given and clean.
    """

    def __init__(
        self, dim, layers, memory_dim, action_dim, action_horizon, latent_size=0, prefix=False
    ):
        super().__init__()
        self.embed = nn.Linear(action_horizon * action_dim, dim)
        self.memory = nn.Linear(memory_dim, dim)
        self.latent = nn.Linear(latent_size, dim) if latent_size else None
        self.prefix = nn.Linear(action_horizon, dim, bias=False) if prefix else None
        self.time = nn.Linear(32, dim, bias=False)
        self.modulation = nn.ModuleList(nn.Linear(dim, 2 * dim) for _ in range(layers))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.out = nn.Linear(dim, action_horizon * action_dim)

    def forward(self, x_t, t, memory, z=None, fixed=None) -> Tensor:
        return self.bind(memory, z)(x_t, t, fixed=fixed)

    def bind(self, memory, z=None):
        """memory, z -> callable(x_t, t[, z, fixed]); z may hold several latents of each observation, (k B, n, D)."""
        return BoundMLP(self, self.memory(memory).mean(1, keepdim=True), z)

    def run(self, x_t, t, known, fixed, *routing):
        x = self.embed(x_t.flatten(2))
        if fixed is not None:
            x = x + known_prefix(self.prefix)(fixed.to(x.dtype))
        c = nn.functional.silu(
            known + self.time(sincos(t, 32, longest=4.0, shortest=4e-2).to(x.dtype))
        )
        for layer, modulation in zip(self.layers, self.modulation, strict=True):
            scale, shift = modulation(c).chunk(2, -1)
            x = x + layer(self.norm(x) * (1 + scale) + shift, *routing)
        return self.out(self.norm(x), *routing).view_as(x_t)


class BoundMLP:
    """An MLPActionDecoder that holds what one batch of observations contributes: the projected memory (B, 1, dim)."""

    def __init__(self, decoder, memory, z=None):
        self.decoder, self.memory, self.z = decoder, memory, z
        self.known = memory if z is None else self._join(z)

    def _join(self, z):
        return (
            self.memory.repeat(len(z) // len(self.memory), 1, 1)
            + self.decoder.latent(z.flatten(1))[:, None]
        )

    def detach(self):
        """The same without gradient to the memory and its projection."""
        return BoundMLP(self.decoder, self.memory.detach(), self.z)

    def __call__(self, x_t, t, z=None, fixed=None, *routing) -> Tensor:
        return self.decoder.run(x_t, t, self.known if z is None else self._join(z), fixed, *routing)
