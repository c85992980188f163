"""Checks of a policy on two samples before training, and the dry run."""

import inspect
import linecache
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import nn

from common import build
from common.config import SCRIPTS, ConfigError, UserError, Yaml, to_dict
from common.data.loader import to_device
from common.noise import Noise
from common.policy import ActionPolicy

if TYPE_CHECKING:
    from common.run import Run

SHAPE_ERRORS = (  # texts of torch
    r"mat1 and mat2 shapes cannot be multiplied \(\d+x(?P<found>\d+) and (?P<expected>\d+)x",
    r"batch2 tensor to be: \[\d+, (?P<found>\d+)\] but got: \[\d+, (?P<expected>\d+)\]",
    r"normalized_shape=\[(.*, )?(?P<expected>\d+)\], expected .* of size ?\[.*?(?P<found>\d+)\]",
    r"expected input.* to have (?P<expected>\d+) channels, but got (?P<found>\d+) channels",
    r"size of tensor a \((?P<found>\d+)\) must match the size of tensor b \((?P<expected>\d+)\)",
)
BUILD = Path(build.__file__)  # calls the blocks
OUT_OF_MEMORY = r"out of memory|can't allocate memory|not enough memory"


def preflight(job: "Run", policy: nn.Module) -> None:
    """Run two samples through the policy, in training and acting, before training starts.

    Raises ConfigError if a component does not fit or is not used; see `explained` for other
    exceptions.
    """
    policy.to(job.device).eval()
    batch = to_device(job.data.windows[job.data.train_rows[:2]], job.device)
    batch["noise"] = Noise("preflight", device=job.device)
    batch["progress"] = 1.0
    with explained(job, policy, batch):
        if isinstance(policy, ActionPolicy):
            policy.check(batch)
        loss, scalars = policy(batch)
        sizes = {name: tuple(x.shape) for name, x in {"the loss": loss, **scalars}.items()}
        if any(sizes.values()):
            raise TypeError(f"forward must return a loss () and scalars () to log, found {sizes}")
        if isinstance(policy, ActionPolicy):
            act_once(policy, batch)
    used = parameters_of(loss)
    for name in policy.parts.trainable():
        trained = {k: p for k, p in policy.parts[name].named_parameters() if p.requires_grad}
        idle = [key for key, p in trained.items() if p not in used]
        if len(idle) == len(trained):
            raise ConfigError(
                f"component '{name}' is listed, but {job.script} does not use it: leave it out"
            )
        if idle and job.world > 1:
            raise ConfigError(
                f"component '{name}': {', '.join(idle[:5])} would be idle, "
                "which processes cannot share"
            )


@torch.no_grad()
def act_once(policy: ActionPolicy, batch: dict[str, Any]) -> torch.Tensor:
    """A chunk (B, T, A) for each observation of a batch, by one step from noise."""
    memory = policy.encode(batch)
    x1 = policy.stats.normalize("action", batch["action"])
    policy.posterior_latent(memory, x1, batch["noise"])
    z = policy.latent(memory, batch["noise"])
    policy.chosen_expert(z)
    return policy.sample(memory, torch.zeros_like(x1), steps=1, z=z)


@torch.no_grad()
def dry_run(job: "Run", policy: nn.Module) -> int:
    """Print one batch, the loss of two samples, one chunk, the config; write nothing."""
    batch = to_device(next(iter(job.loader())), job.device, job.cfg.data.augment)
    batch.pop("position")
    for key, value in batch.items():
        print(f"batch  {key:<32}{tuple(value.shape)!s:<24}{value.dtype}")
    # Two samples, as a whole batch takes minutes on a CPU.
    two = {key: value[:2] for key, value in batch.items()}
    two["noise"] = Noise("objective", job.cfg.seed, 0, 0, device=job.device)
    two["progress"] = 1.0
    with explained(job, policy, two):
        _, scalars = policy.train()(two)
    print("loss  ", ", ".join(f"{name} {value:.4f}" for name, value in scalars.items()))
    policy.eval()
    if job.cfg.data.cache == "features":
        job.data.cache_features(policy.parts, job.sources, job.accelerator, dry_run=True)
    sampled = ""
    if isinstance(policy, ActionPolicy):
        sampled = f"sample {tuple(act_once(policy, two).shape)}; "
    print(f"{sampled}{job.total} steps of {job.steps_per_epoch} per epoch")
    print(yaml.safe_dump(to_dict(job.cfg), sort_keys=False))
    return 0


def parameters_of(loss: torch.Tensor) -> set:
    """The leaves that a loss has gradients for, found in its graph without a backward pass."""
    found = set()
    seen = set()
    nodes = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        nodes += [following for following, _ in node.next_functions]
    return found


@contextmanager
def explained(job: "Run", policy: nn.Module, batch: dict) -> Iterator[None]:
    """Names the component that an exception comes out of.

    A shape that contradicts a number of the component's YAML becomes a ConfigError, and a UserError
    gets the component in front. Anything else is a mistake in code: it is raised unchanged, below a
    header on stderr, so that its traceback shows.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        name, call = _component(policy, error)
        file = job.cfg.model.component_config_paths.get(name)
        where = f"component '{name}' ({file})" if name else job.script
        if isinstance(error, UserError):
            files = job.cfg.model.component_config_paths.items()
            named = [f"{key}: {path}" for key, path in files if key in str(error) and key != name]
            text = f"{where}: {error}" if name else str(error)
            raise ConfigError("\n    ".join([text, *named])) from error
        tensors = {key: x for key, x in batch.items() if isinstance(x, torch.Tensor)}
        shapes = ", ".join(f"{key} {tuple(x.shape)}" for key, x in tensors.items())
        mistake = ""
        if name and _in_own_block(error):
            mistake = _shape_mistake(error, job.sources[name], job.data.facts)
        elif name and isinstance(error, TypeError) and _frames(error)[-1] == BUILD:
            mistake = "its block does not take these inputs: is it the file of another component?"
        if mistake:
            lines = [f"{where}: {mistake}", f"{type(error).__name__}: {error}", call]
            lines.append(f"the first batch is {shapes}")
            text = "\n    ".join(filter(None, lines))
            if job.script in SCRIPTS:
                raise ConfigError(text) from error
            print(text, file=sys.stderr)  # a fork's own code may be at fault: see the traceback
            raise
        print(f"{where} fails on two samples: {shapes}", file=sys.stderr)
        raise


def _component(policy, error) -> tuple[str | None, str]:
    """(component that an exception came out of, "called in script.py:88: line of code")."""
    owners = {id(m): name for name, part in policy.parts.items() for m in part.modules()}
    script = inspect.getfile(type(policy))
    name = None
    call = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        owner = owners.get(id(frame.f_locals.get("self")))
        if owner:
            name = owner
        elif name is None and file == script:
            code = linecache.getline(file, line).strip()
            call = f"called in {Path(file).name}:{line}: {code}"
    return name, call


def _frames(error: BaseException) -> list[Path]:
    """Files of the code that an exception came through, without torch's; the innermost one last."""
    files = [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)]
    torch_folder = Path(torch.__file__).parent
    return [file for file in files if not file.is_relative_to(torch_folder)]


def _in_own_block(error: BaseException) -> bool:
    """Whether the innermost code outside of torch is a block of ours, no plugin and no script."""
    return _frames(error)[-1].is_relative_to(Path(__file__).parent / "blocks")


def _shape_mistake(error, source, facts) -> str:
    """The keys of a component's YAML that hold a size of torch's message, found and expected size.

    Empty if the exception is none of a shape, or no key holds either size.
    """
    texts = [re.search(text, str(error)) for text in SHAPE_ERRORS]
    match = next(filter(None, texts), None)
    if match is None or not isinstance(error, RuntimeError | ValueError):
        return ""
    found = int(match["found"])
    expected = int(match["expected"])
    numbers = dict(_numbers(source.data, (), facts))
    keys = [key for key, number in numbers.items() if number == expected]
    keys = keys or [key for key, number in numbers.items() if number == found]
    if not keys:
        return ""
    original = Yaml.read(source.path)  # `source` may have sizes filled in, on other lines
    places = [str(original.error(key, str(numbers[key]))) for key in keys]
    return "\n    ".join([f"found size {found}, expected {expected}", *places])


def _numbers(value, keys, facts):
    """(keys, number) of every integer in a YAML; null stands for the dataset's fact of its name."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(inner, (*keys, key), facts)
    elif value is None and keys[-1] in facts:
        yield keys, facts[keys[-1]]
    elif type(value) is int:
        yield keys, value


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on the device or on the host."""
    by_text = isinstance(error, RuntimeError) and re.search(OUT_OF_MEMORY, str(error))
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(by_text)
