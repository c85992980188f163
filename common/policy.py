"""The protocol of every policy that acts: read this page before you write one, or drive one.

A training script defines `class Policy(ActionPolicy)`. Training only calls `policy(batch)`. Acting:

    memory = policy.encode(obs)                        # pictures and states, once per observation
    z = policy.latent(memory, noise)                   # which way to do the task, or None
    chunk = policy.sample(memory, x0, steps=2, z=z)    # Euler: `steps` evaluations of velocity()

`common/robot.py` does this for a robot. Nobody asks a policy for the names of its components.

Letters in shapes: B observations, R noisy chunks of each, T actions of a chunk, A numbers of an
action, P states of a history, S numbers of a state, N tokens of width d, n latent tokens of D.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common import flow, losses
from common.config import ConfigError
from common.data.normalizer import Normalizer
from common.noise import Noise, RowNoise
from common.parts import Parts


class Memory(NamedTuple):
    """An encoded observation: tokens (B, N, d) for the decoder, inputs of posterior and prior."""

    tokens: Tensor
    latent_inputs: dict[str, Any]


class ActionPolicy(nn.Module):
    """Observation -> action chunk, by flow matching from noise (t = 0) to data (t = 1).

    A script writes forward() and, with a latent, posterior_latent() and latent(). parts: the
    components; stats: units of state and action; weights: the config's `loss` section; sampling:
    its section of options when acting, None without any.
    """

    encoder = "info_embedder"  # component that makes the memory
    decoder = "action_decoder"  # component that reads it
    has_latent = False
    experts = 1
    sampling: Any = None

    def __init__(self, parts: Parts, stats: Normalizer, cfg: Any):
        super().__init__()
        self.parts = parts
        self.stats = stats
        self.weights = cfg.loss
        self.cameras = list(cfg.data.cameras)
        parts.require(self.encoder, self.decoder)
        horizon = cfg.data.action_horizon
        if self.weights.prefix >= horizon:
            raise ConfigError(
                f"loss.prefix: {self.weights.prefix} given actions may leave nothing of a chunk of "
                f"{horizon} (data.action_horizon)"
            )

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """One micro-batch with its noise -> the whole objective (), detached scalars to log."""
        raise NotImplementedError

    def check(self, batch: dict[str, Any]) -> None:
        """Raise ConfigError where components or keys do not fit. Called once, before training."""
        dropout = self.weights.camera_dropout
        if dropout and len(self.cameras) < 2:
            raise ConfigError(
                f"loss.camera_dropout: {dropout} hides one of several cameras, and data.cameras "
                f"has {len(self.cameras)}: set it to 0"
            )

    def check_sampling(self) -> None:
        """Raise ConfigError where `sampling` asks for something that the components lack."""

    def after_step(self, job: Any) -> None:
        """After each optimizer step: state that no gradient moves. Most policies have none."""

    def report(self, scalars: dict[str, float]) -> list[str]:
        """What a finished run should say: a line for each idle part. Most policies have none.

        scalars: means of those that were logged last.
        """
        return []

    def encode(self, obs: dict[str, Tensor], camera_mask: Tensor | None = None) -> Memory:
        """Observation (states in raw units, pictures in [0, 1]) -> Memory. Once per observation.

        camera_mask (B, cameras) bool: cameras of a sample that are hidden.
        """
        proprio = self.stats.normalize("state", obs["observation.state"])
        visual, semantic = self.parts.encode_cameras(obs, self.cameras)
        visual_mask = self.parts.visual_mask(camera_mask, self.cameras)
        tokens = self.parts[self.encoder](
            cond_proprio=proprio,
            cond_visual=visual,
            cond_semantic=semantic,
            visual_mask=visual_mask,
        )
        # The flow loss shapes the first camera's features; posterior and prior do not.
        latent_inputs = {
            "cond_proprio": proprio,
            "cond_visual": [x.detach() for x in visual[:1]],
            "cond_semantic": [x.detach() for x in semantic[:1]],
            "visual_mask": None if visual_mask is None else visual_mask[:, :1],
        }
        return Memory(tokens, latent_inputs)

    def draw_camera_mask(self, noise: Noise, batch: int) -> Tensor:
        """(B, cameras) bool: cameras hidden from a sample, in training (loss.camera_dropout)."""
        probability = self.weights.camera_dropout if self.training else 0.0
        return losses.draw_camera_mask(noise, batch, len(self.cameras), probability)

    def noisy_chunks(self, x1: Tensor, batch: dict[str, Any]) -> flow.NoisyChunks:
        """Normalised chunks x1 (B, T, A) -> what the decoder learns from, as `loss` says."""
        return flow.noisy_chunks(
            x1,
            batch["action_is_pad"],
            batch["noise"],
            self.weights.draws,
            self.weights.target,
            self.weights.prefix,
        )

    def kot(
        self, context: Any, chunks: flow.NoisyChunks, memory: Memory, batch: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """K-OT of chunks decoded in one step from noise with latents of the prior, and scalars."""
        decoder = self.parts[self.decoder]
        predicted = flow.one_step(decoder, context, chunks.x0[:, :1], self.weights.target)
        return losses.kot(
            predicted,
            chunks.x1[:, :1],
            memory.latent_inputs["cond_proprio"][:, -1],
            ignored=batch["action_is_pad"],
            **vars(self.weights.sinkhorn),
        )

    def latent(self, memory: Memory, noise: Noise | RowNoise) -> Tensor | None:
        """z (B, n, D) drawn from the prior: which way to do the task. None without a latent."""
        return None

    def posterior_latent(self, memory: Memory, x1: Tensor, noise: RowNoise) -> Tensor | None:
        """z (B, n, D) read from demonstrated, normalised x1 (B, T, A). None without a latent."""
        return None

    def chosen_expert(self, z: Tensor | None) -> Tensor | None:
        """Expert (B,) that decodes with latent z, of `experts`. None where there is only one."""
        return None

    def context(self, memory: Memory, z: Tensor | None) -> Any:
        """All that the decoder needs of memory and z and that does not depend on t: tensors."""
        return self.parts[self.decoder].context(memory=memory.tokens, z=z)

    def velocity(
        self, x: Tensor, t: float, context: Any, prefix_mask: Tensor | None = None
    ) -> Tensor:
        """Velocity (B, T, A) of normalised noisy chunks x (B, T, A) at time t; t = 0 is noise.

        prefix_mask (T,) bool marks given actions, which do not move.
        """
        decoder = self.parts[self.decoder]
        return flow.decoder_velocity(decoder, context, x, t, self.weights.target, prefix_mask)

    def sampling_velocity(self, memory: Memory, z: Tensor | None) -> Callable[..., Tensor]:
        """velocity(x, t, prefix_mask=) that sample() follows: with guidance, where there is any."""
        return partial(self.velocity, context=self.context(memory, z))

    @torch.no_grad()
    def sample(
        self,
        memory: Memory,
        x0: Tensor,
        steps: int = 10,
        z: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """Noise x0 (B, T, A) -> action chunk (B, T, A) in the dataset's units.

        steps: evaluations of the decoder (NFE); z: drawn from the prior where none is given; prefix
        (B, d, A): first actions that are given, in the dataset's units; the rest continues them.
        """
        if z is None:
            z = self.latent(memory, Noise(device=x0.device))
        velocity = self.sampling_velocity(memory, z)
        x = x0
        prefix_mask = None
        if prefix is not None:
            given = prefix.shape[1]
            x = torch.cat([self.stats.normalize("action", prefix), x0[:, given:]], 1)
            prefix_mask = torch.arange(x.shape[1], device=x.device) < given
        x1 = flow.euler(partial(velocity, prefix_mask=prefix_mask), x, steps)
        return self.stats.denormalize("action", x1)
