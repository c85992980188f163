"""Optimizers, learning rates as functions of the step, and averages of weights."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from schedulefree import RAdamScheduleFree
from torch import Tensor, nn
from torch.optim import Optimizer

from common.config import ConfigError
from common.parts import Parts

SCHEDULE_FREE = "schedule_free_radam"


def build(parts: Parts, cfg: Any) -> list[Optimizer]:
    """One optimizer per distinct type; per component one group with and one without weight decay.

    parts: the policy's components. cfg: train.yaml.
    """
    groups = {}
    for name in parts.trainable():
        settings = {**vars(cfg.train.optim), **cfg.model.component_optims.get(name, {})}
        settings["betas"] = tuple(settings["betas"])
        kind = settings.pop("type")
        settings |= {"component": name, "schedule": kind, "lr": 0.0}
        decayed = _decayed(parts[name])
        trained = [p for p in parts[name].parameters() if p.requires_grad]
        weights = [p for p in trained if id(p) in decayed]
        others = [p for p in trained if id(p) not in decayed]
        for params, decay in ((weights, settings["weight_decay"]), (others, 0.0)):
            if params:
                group = {**settings, "params": params, "weight_decay": decay}
                groups.setdefault(kind, []).append(group)
    return [_optimizer(kind, chosen) for kind, chosen in groups.items()]


def _decayed(part: nn.Module) -> set[int]:
    """Ids of the parameters that a layer calls `weight` and that have two axes or more.

    These are linear layers, convolutions and experts; not embeddings, biases, norms, codebooks and
    learned tokens.
    """
    layers = [module for module in part.modules() if not isinstance(module, nn.Embedding)]
    weights = [getattr(layer, "weight", None) for layer in layers]
    return {id(p) for p in weights if isinstance(p, nn.Parameter) and p.ndim > 1}


def _optimizer(kind, groups):
    if kind == SCHEDULE_FREE:
        optimizer = RAdamScheduleFree(groups, lr=0.0, silent_sgd_phase=True)
        optimizer.train()
        return optimizer
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def learning_rate(group: dict, step: int, total: int) -> float:
    """The rate of the update from `step` to `step + 1` of `total` optimizer steps.

    adamw_warmup_cosine_decay: linear from start_lr to peak_lr in warmup_steps, then a cosine to
    end_lr. adamw_onecycle: torch's OneCycleLR with its defaults (30 % up, cosine, from peak / 25 to
    peak / 250,000). schedule_free_radam: constant, as its average replaces the decay.
    """
    peak = group["peak_lr"]
    if group["schedule"] == SCHEDULE_FREE:
        return peak
    if group["schedule"] == "adamw_onecycle":
        warmup = 0.3 * total - 1
        if step <= warmup:
            return _cosine(peak / 25, peak, step / warmup)
        return _cosine(peak, peak / 25e4, (step - warmup) / (total - 1 - warmup))
    warmup = group["warmup_steps"]
    if step < warmup:
        start = group["start_lr"]
        return start + (peak - start) * step / max(warmup - 1, 1)
    return _cosine(peak, group["end_lr"], (step - warmup) / max(total - warmup - 1, 1))


def _cosine(a, b, share):
    return b + (a - b) / 2 * (1 + math.cos(math.pi * min(share, 1.0)))


def set_learning_rate(optimizers: Sequence[Optimizer], step: int, total: int) -> float:
    """Set the rate of every group for this step. Returns the largest, to log."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["lr"] = learning_rate(group, step, total)
    return max(group["lr"] for group in groups)


@torch.no_grad()
def reset_rows(
    optimizers: Sequence[Optimizer],
    average: "AveragedWeights",
    parameter: nn.Parameter,
    rows: Tensor | slice,
) -> None:
    """Forget the history of rows of a parameter: zero moments, averages equal to the rows."""
    averages = [average.ema[name] for name in average.ema if average.trained[name] is parameter]
    for optimizer in optimizers:
        for name, value in optimizer.state.get(parameter, {}).items():
            if name == "z":  # of schedule-free
                averages.append(value)
            elif isinstance(value, Tensor) and value.shape == parameter.shape:
                value[rows] = 0
    for value in averages:
        value[rows] = parameter[rows]


def slow_copy(parts: Parts, name: str) -> nn.Module:
    """A copy of a component without gradient, for `update_slow_copy`."""
    if name not in parts:
        raise ConfigError(f"no component '{name}' is listed; there are {', '.join(parts)}")
    return copy.deepcopy(parts[name]).requires_grad_(False)


@torch.no_grad()
def update_slow_copy(slow: nn.Module, trained: nn.Module, decay: float, step: int) -> None:
    """Moving average of a component's weights after optimizer step `step` (from 1).

    Buffers are copied.
    """
    weights = [p.detach() for p in trained.parameters()]
    torch._foreach_lerp_(list(slow.parameters()), weights, 1 - ema_decay(decay, step))
    for buffer, value in zip(slow.buffers(), trained.buffers(), strict=True):
        buffer.copy_(value)


def ema_decay(decay: float, step: int) -> float:
    """Decay of a moving average after `step` updates: shorter memory at first."""
    return min(decay, (1 + step) / (10 + step))


class AveragedWeights:
    """The weights to run: a moving average, the schedule-free average, or the trained ones.

    trained: name -> parameter, of all that have an average. ema: name -> moving average, of
    decay min(decay, (1 + n) / (10 + n)) after n updates; parameters of a schedule-free optimizer
    need none.
    """

    def __init__(self, policy: nn.Module, optimizers: Sequence[Optimizer], decay: float | None):
        self.decay = decay
        self.schedule_free = {}  # parameter -> its optimizer, beta1
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                if group.get("schedule") == SCHEDULE_FREE:
                    for p in group["params"]:
                        self.schedule_free[p] = optimizer, group["betas"][0]
        self.trained = {}
        for name, p in policy.named_parameters():
            if p.requires_grad and (decay or p in self.schedule_free):
                self.trained[name] = p
        self.ema = {
            name: p.detach().clone()
            for name, p in self.trained.items()
            if p not in self.schedule_free
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step `step` (from 1)."""
        if self.ema and self.decay:
            weights = [self.trained[name].detach() for name in self.ema]
            averages = list(self.ema.values())
            torch._foreach_lerp_(averages, weights, 1 - ema_decay(self.decay, step))

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """Parameter name -> averaged weights, if it has any. Training is not disturbed."""
        averaged = {}
        for name, p in self.trained.items():
            averaged[name] = self.ema[name] if name in self.ema else self._schedule_free(p)
        return averaged

    def _schedule_free(self, p):
        """The result of schedulefree's eval(), out of place: x = y + (1 - 1 / beta1) (z - y)."""
        optimizer, beta1 = self.schedule_free[p]
        z = optimizer.state[p].get("z")
        return p.detach().clone() if z is None else p.detach().lerp(z, 1 - 1 / beta1)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averaged weights in the policy's place, the trained ones back at the end."""
        averaged = self.weights()
        own = {name: p.data for name, p in self.trained.items()}
        for name, p in self.trained.items():
            p.data = averaged[name]
        try:
            yield
        finally:
            for name, p in self.trained.items():
                p.data = own[name]
