"""Optimizers, learning rates as functions of the step, and the averaged weights that are the ones to run."""

import copy
import math
from contextlib import contextmanager

import torch
from schedulefree import RAdamScheduleFree
from torch import nn

from common.config import ConfigError


def build(parts: nn.ModuleDict, cfg) -> list[torch.optim.Optimizer]:
    """One optimizer per distinct type, one group per component with and one without weight decay.

    parts: the policy's components; cfg: train.yaml. Decay is for what a layer calls `weight` and has two axes or more
    (linear layers, convolutions, experts); not for embeddings, biases, norms, codebooks and learned tokens.
    """
    by_type = {}
    for name in parts.trainable():
        settings = {**vars(cfg.train.optim), **cfg.model.component_optims.get(name, {})}
        layers = [
            module for module in parts[name].modules() if not isinstance(module, nn.Embedding)
        ]
        weights = [getattr(module, "weight", None) for module in layers]
        decayed = {id(x) for x in weights if isinstance(x, nn.Parameter) and x.ndim > 1}
        for decay in (True, False):
            chosen = [
                p
                for p in parts[name].parameters()
                if p.requires_grad and (id(p) in decayed) == decay
            ]
            group = {**settings, "component": name, "params": chosen, "lr": 0.0}
            if not decay:
                group["weight_decay"] = 0.0
            if chosen:
                by_type.setdefault(group.pop("type"), []).append(group)
    return [_optimizer(kind, groups) for kind, groups in by_type.items()]


def _optimizer(kind, groups):
    for group in groups:
        group["schedule"] = kind
        group["betas"] = tuple(group["betas"])
    if kind == "schedule_free_radam":
        optimizer = RAdamScheduleFree(groups, lr=0.0, silent_sgd_phase=True)
        optimizer.train()
        return optimizer
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def learning_rate(group: dict, step: int, total: int) -> float:
    """The rate of the update from `step` to `step + 1` of `total` optimizer steps.

    adamw_warmup_cosine_decay: linear from start_lr to peak_lr in warmup_steps, then a cosine to end_lr;
    adamw_onecycle: torch's OneCycleLR with its defaults (30 % up, cosine, from peak / 25 to peak / 250,000);
    schedule_free_radam: constant, its own average replaces the decay.
    """
    peak = group["peak_lr"]
    if group["schedule"] == "schedule_free_radam":
        return peak
    if group["schedule"] == "adamw_onecycle":
        start, end, warmup = peak / 25, peak / 25e4, 0.3 * total - 1
        if step <= warmup:
            return _cosine(start, peak, step / warmup)
        return _cosine(peak, end, min((step - warmup) / (total - 1 - warmup), 1.0))
    start, end, warmup = group["start_lr"], group["end_lr"], group["warmup_steps"]
    if step < warmup:
        return start + (peak - start) * step / max(warmup - 1, 1)
    return _cosine(peak, end, min((step - warmup) / max(total - warmup - 1, 1), 1.0))


def _cosine(a, b, share):
    return b + (a - b) / 2 * (1 + math.cos(math.pi * share))


def set_learning_rate(optimizers, step: int, total: int) -> float:
    """Set every group's rate for this step; the largest of them, to log."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["lr"] = learning_rate(group, step, total)
    return max(group["lr"] for group in groups)


@torch.no_grad()
def forget(optimizers, average, parameter: nn.Parameter, rows: torch.Tensor):
    """Start these rows of a parameter afresh: no moments, averages of what the rows are now."""
    averages = [average.ema[name] for name, p in average.raw.items() if p is parameter]
    for state in [optimizer.state.get(parameter, {}) for optimizer in optimizers]:
        averages += [value for name, value in state.items() if name == "z"]  # schedule-free
        for name, value in state.items():
            if name != "z" and isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                value[rows] = 0
    for value in averages:
        value[rows] = parameter[rows]


def slow_copy(parts, name: str) -> nn.Module:
    """A copy of a component for `follow`, without gradient."""
    if name not in parts:
        raise ConfigError(f"no component '{name}' is listed; there are {', '.join(parts)}")
    return copy.deepcopy(parts[name]).requires_grad_(False)


@torch.no_grad()
def follow(slow: nn.Module, own: nn.Module, decay: float, step: int):
    """After optimizer step number `step` (from 1): the moving average of a component, with its buffers as they are."""
    torch._foreach_lerp_(
        list(slow.parameters()), [p.detach() for p in own.parameters()], 1 - warmed(decay, step)
    )
    for buffer, value in zip(slow.buffers(), own.buffers(), strict=True):
        buffer.copy_(value)


def warmed(decay: float, step: int) -> float:
    """The decay of a moving average after `step` updates: young averages forget faster."""
    return min(decay, (1 + step) / (10 + step))


class Average:
    """The weights to run: an exponential moving average, the schedule-free average, or the weights themselves.

    EMA decay is min(decay, (1 + n) / (10 + n)) after n updates; parameters of a schedule-free optimizer need none.
    """

    def __init__(self, policy: nn.Module, optimizers, decay: float | None):
        self.optimizers, self.decay = optimizers, decay
        free = {
            id(p)
            for o in optimizers
            if _is_free(o)
            for group in o.param_groups
            for p in group["params"]
        }
        named = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
        self.free = {name: p for name, p in named if id(p) in free}
        self.raw = {name: p for name, p in named if id(p) not in free} if decay else {}
        self.ema = {name: p.detach().clone() for name, p in self.raw.items()}

    @torch.no_grad()
    def update(self, step: int):
        """After optimizer step number `step` (from 1)."""
        if self.ema:
            now = [p.detach() for p in self.raw.values()]
            torch._foreach_lerp_(list(self.ema.values()), now, 1 - warmed(self.decay, step))

    @torch.no_grad()
    def weights(self) -> dict[str, torch.Tensor]:
        """Parameter name -> averaged weights, for all parameters that have any. Training is not disturbed."""
        averaged = dict(self.ema)
        groups = {
            id(p): (o, group)
            for o in self.optimizers
            for group in o.param_groups
            for p in group["params"]
        }
        for name, p in self.free.items():
            optimizer, group = groups[id(p)]
            z = optimizer.state[p].get("z")
            # schedulefree's eval(), out of place: x = y + (1 - 1 / beta1) (z - y)
            averaged[name] = (
                p.detach().clone() if z is None else p.detach().lerp(z, 1 - 1 / group["betas"][0])
            )
        return averaged

    @contextmanager
    def applied(self):
        """The averaged weights in the policy's place, the trained ones back at the end."""
        averaged, own = self.weights(), self.raw | self.free
        kept = {name: p.data for name, p in own.items()}
        for name, p in own.items():
            p.data = averaged[name]
        try:
            yield
        finally:
            for name, p in own.items():
                p.data = kept[name]


def _is_free(optimizer):
    return hasattr(
        getattr(optimizer, "optimizer", optimizer), "train"
    ) and "schedule_free_radam" in {group["schedule"] for group in optimizer.param_groups}
