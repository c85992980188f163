"""The protocol of every policy that acts: read this page before you write one, or drive one.

A training script defines `class Policy(ActionPolicy)`. Training calls `policy(batch)` alone. Acting goes

    memory = policy.encode(obs)                     # pictures and states, once per observation
    z = policy.latent(memory, noise)                # which way to do the task; None without a latent
    chunk = policy.sample(memory, x0, steps=2, z=z) # Euler: `steps` evaluations of policy.velocity

and `common/robot.py` does this for a robot. Nobody asks a policy for the names of its components.

Letters in shapes: B observations, R noisy chunks of each, T actions of a chunk, A numbers of an
action, P states of a history, S numbers of a state, N tokens of width d, n latent tokens of D.
"""

from typing import NamedTuple

from torch import Tensor, nn


class Memory(NamedTuple):
    """An encoded observation: tokens (B, N, d) for the decoder, and what posterior and prior read."""

    tokens: Tensor
    latent_inputs: dict


class ActionPolicy(nn.Module):
    """Observation -> action chunk, by flow matching from noise (t = 0) to data (t = 1)."""
