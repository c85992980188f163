"""Checkpoints: one safetensors file per component, written atomically, checked when read."""

import contextlib
import hashlib
import importlib.machinery
import importlib.util
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.optim import Optimizer

from common import legacy
from common.blocks.weights import read_tensors
from common.build import import_plugins
from common.config import UserError, Yaml, from_dict
from common.data.normalizer import Normalizer
from common.optim import AveragedWeights
from common.parts import build_parts, load_component
from common.schema import Optim, Part

ROOT = Path(__file__).resolve().parents[1]


def save(
    folder: Path,
    policy: nn.Module,
    optimizers: Sequence[Optimizer],
    average: AveragedWeights,
    meta: dict,
) -> None:
    """Write `folder`: component files with averaged weights, statistics, resume/, meta.json last.

    Everything goes to `<folder>.tmp` first, synced to disk, then renamed; an existing folder steps
    aside until then. Raises UserError with path and free space if the disk refuses; older
    checkpoints stay as they are.
    """
    tmp = folder.with_name(folder.name + ".tmp")
    old = folder.with_name(folder.name + ".old")
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        (tmp / "resume").mkdir(parents=True)
        _write_weights(tmp, policy, average)
        meta = {
            "format": legacy.FORMAT,
            **meta,
            "frozen": _record_frozen(folder.parent, policy.parts),
            "schedules": _schedules(optimizers),
            "optimizers": _write_optimizers(tmp, policy, optimizers),
        }
        _write_meta(tmp, meta)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        tmp.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(tmp, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free / 2**20
        raise UserError(
            f"{folder}: could not be saved: {e} ({free:.0f} MiB free); nothing else changed"
        ) from e


def _write_weights(tmp, policy, average):
    averaged = average.weights()
    for name in policy.parts.trainable():
        state = policy.parts[name].state_dict()
        for key in state:
            state[key] = averaged.get(f"parts.{name}.{key}", state[key])
        _write(tmp / f"{name}.safetensors", state)
    _write(tmp / "dataset_stats.safetensors", policy.stats.state_dict())
    raw = {name: p for name, p in policy.named_parameters() if name in averaged}
    if raw:
        _write(tmp / "resume/raw.safetensors", raw)
    written = ("stats.", *(f"parts.{name}." for name in policy.parts))
    state = policy.state_dict()
    other = {key: value for key, value in state.items() if not key.startswith(written)}
    if other:
        _write(tmp / "resume/other.safetensors", other)


def _write_optimizers(tmp, policy, optimizers):
    """Write each optimizer's state by parameter name; the counters of its groups."""
    names = {p: name for name, p in policy.named_parameters()}
    counters = []
    for i, optimizer in enumerate(optimizers):
        tensors = {}
        for p, state in optimizer.state.items():
            tensors |= {f"{names[p]}/{key}": value for key, value in state.items()}
        _write(tmp / f"resume/optimizer_{i}.safetensors", tensors)
        counters.append([_counters(group) for group in optimizer.param_groups])
    return counters


def _counters(group):
    """Numbers that the optimizer itself keeps in a group (schedule-free's), without settings."""
    settings = {f.name for f in fields(Optim)} | {"params", "component", "lr", "schedule"}
    return {k: v for k, v in group.items() if k not in settings and isinstance(v, int | float)}


def _schedules(optimizers):
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return {group["component"]: group["schedule"] for group in groups}


def _write_meta(tmp, meta):
    files = sorted(file for file in tmp.rglob("*") if file.is_file())
    sizes = {str(file.relative_to(tmp)): [file.stat().st_size, sha256(file)] for file in files}
    meta = {**meta, "files": sizes}
    with (tmp / "meta.json").open("w") as f:
        json.dump({**meta, "sha256": _digest(meta)}, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    _sync(tmp / "resume")
    _sync(tmp)


def _record_frozen(save_dir, parts):
    """Path and hash of each frozen component's file; frozen/ gets those that no file holds."""
    record = {}
    for name in sorted(parts.frozen):
        file = parts.sources.get(name)
        if file is None:
            file = save_dir / "frozen" / f"{name}.safetensors"
            if not file.exists():
                file.parent.mkdir(exist_ok=True)
                _write(file.with_suffix(".tmp"), parts[name].state_dict())
                file.with_suffix(".tmp").rename(file)
        if name not in parts.hashes:
            parts.hashes[name] = sha256(file)
        beside = file.parent.parent == save_dir
        path = os.path.relpath(file, save_dir) if beside else str(file)
        record[name] = {"path": path, "sha256": parts.hashes[name]}
    return record


def _frozen_file(folder, name, record, given=None) -> Path:
    """The file of a frozen component: as given, or as recorded.

    Raises UserError if it is gone or not the same.
    """
    file = Path(given or folder.parent / record["path"]).expanduser()
    if not file.is_file():
        raise UserError(
            f"{file}: weights of frozen '{name}' are gone; evaluate.py takes --weights {name}=PATH"
        )
    if sha256(file) != record["sha256"]:
        raise UserError(f"{file}: not the file that '{name}' was trained with (sha256 differs)")
    return file


def _write(file, tensors):
    tensors = {k: x.detach().to("cpu", copy=True).contiguous() for k, x in tensors.items()}
    save_file(tensors, file)
    _sync(file)


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _digest(meta: dict) -> str:
    return hashlib.sha256(json.dumps(meta).encode()).hexdigest()


def read_meta(folder: Path) -> dict:
    """meta.json of a checkpoint. Raises UserError if it is not as it was written."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        meta = json.loads((folder / "meta.json").read_text())
        if meta.pop("sha256") == _digest(meta):
            return meta
    raise UserError(f"{folder}/meta.json is missing or has other content than was written")


def steps(save_dir: Path) -> dict[Path, float]:
    """Checkpoint folders -> their step, oldest first; inf if meta.json is damaged or missing."""
    found = {}
    for folder in save_dir.glob("*_*"):
        kind, _, number = folder.name.partition("_")
        if kind in ("epoch", "step") and number.isdigit():
            try:
                found[folder] = read_meta(folder)["step"]
            except UserError:
                found[folder] = math.inf
    return dict(sorted(found.items(), key=lambda item: item[1]))


def damage(folder: Path) -> str | None:
    """The first damaged file of a checkpoint and its damage; None if there is none."""
    try:
        files = read_meta(folder)["files"]
    except UserError as e:
        return str(e)
    for name, (size, digest) in files.items():
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        found = file.stat().st_size
        if found != size:
            return f"{file} has {found} bytes, {size} were written"
        if sha256(file) != digest:
            return f"{file} has other content than was written"
    return None


def newest(save_dir: Path) -> Path | None:
    """The undamaged checkpoint with the largest step, or None; warns of later, damaged ones.

    Raises UserError if all are damaged.
    """
    problems = []
    for folder in reversed(steps(save_dir)):
        problem = damage(folder)
        if problem is None:
            for text in problems:
                print(f"warning: {text}; {folder.name} is taken instead")
            return folder
        problems.append(problem)
    if problems:
        problems.append(f"{save_dir}: no checkpoint is whole; move them away to begin anew")
        raise UserError("\n".join(problems))
    return None


def repair(save_dir: Path) -> None:
    """Remove folders that an interrupted save left; one that was set aside comes back if needed."""
    for left in save_dir.glob("*_*.tmp"):
        shutil.rmtree(left)
    for left in save_dir.glob("*_*.old"):
        if left.with_suffix("").exists():
            shutil.rmtree(left)
        else:
            left.rename(left.with_suffix(""))


def prune(save_dir: Path, keep_last: int, step: int) -> None:
    """Delete all but the newest `keep_last` checkpoints up to `step`.

    Later ones were damaged when the run resumed: they go as well.
    """
    found = steps(save_dir)
    kept = [folder for folder, at in found.items() if at <= step][-keep_last:]
    for folder in found.keys() - set(kept):
        tmp = folder.with_name(folder.name + ".tmp")  # half deleted, a folder would look damaged
        shutil.rmtree(folder.rename(tmp))


def load(
    folder: Path, policy: nn.Module, optimizers: Sequence[Optimizer], average: AveragedWeights
) -> dict:
    """Put a checkpoint into a policy of the same components, to train on; its meta.json."""
    meta = legacy.translated(read_meta(folder), folder)
    parts = policy.parts
    problems = _differences(meta, parts, optimizers)
    for name in [] if problems else parts.trainable():
        try:
            load_component(parts[name], folder / f"{name}.safetensors", name)
        except UserError as e:
            problems.append(str(e))
    if problems:
        problems.append(
            "    a run keeps its components; for a new one from these weights set train.save_dir "
            "and train.load_dir"
        )
        raise UserError("\n".join([f"{folder}: not of the run that is configured", *problems]))
    policy.stats.load_state_dict(read_tensors(folder / "dataset_stats.safetensors"))
    policy.stats.min_std = meta["config"]["data"]["min_std"]
    for name, record in meta["frozen"].items():
        file = _frozen_file(folder, name, record, parts.sources.get(name))
        if name not in parts.sources:
            load_component(parts[name], file, name)
    parameters = dict(policy.named_parameters())
    raw = folder / "resume/raw.safetensors"
    with torch.no_grad():
        for name, value in average.ema.items():
            value.copy_(parameters[name])
        for name, value in (read_tensors(raw) if raw.exists() else {}).items():
            parameters[name].copy_(value)
    other = folder / "resume/other.safetensors"
    if other.exists():
        unknown = policy.load_state_dict(read_tensors(other), strict=False).unexpected_keys
        if unknown:
            raise UserError(
                f"{other} holds {', '.join(unknown[:3])}, which this script's policy lacks: resume "
                "with the version that wrote it, or start a new run with train.load_dir"
            )
    for i, (optimizer, counters) in enumerate(zip(optimizers, meta["optimizers"], strict=True)):
        for key, value in read_tensors(folder / f"resume/optimizer_{i}.safetensors").items():
            name, _, kind = key.rpartition("/")
            p = parameters[name]
            optimizer.state[p][kind] = value.to(p.device)
        for group, own in zip(optimizer.param_groups, counters, strict=True):
            group.update(own)
    return meta


def _differences(meta, parts, optimizers):
    """Differences between the components of a checkpoint and those that are configured."""
    pairs = {
        "components": (meta["components"], [*parts, *parts.aliases]),
        "frozen": (meta["frozen"], parts.frozen),
        "shared": (meta["aliases"].items(), parts.aliases.items()),
        "optimizers": (meta["schedules"].items(), _schedules(optimizers).items()),
    }
    problems = []
    for kind, (saved, configured) in pairs.items():
        only_saved = sorted(set(saved) - set(configured))
        only_configured = sorted(set(configured) - set(saved))
        if only_saved or only_configured:
            there = f"{only_saved or 'none'} in the checkpoint"
            problems.append(f"{kind}: {there}, {only_configured or 'none'} configured")
    return problems


def load_script(folder: Path, recorded: str, given: Path | None = None) -> ModuleType:
    """The training script of the checkpoint in `folder` as a module.

    recorded: its name in meta.json, which is run only if it is that of a file beside common/.
    given: the script that the user names instead. Raises UserError for any other.
    """
    if given is not None:
        file = given.expanduser().resolve()
        if not file.is_file():
            raise UserError(f"--script: no such file: {file}")
        return _as_module(file)
    file = ROOT / recorded
    if Path(recorded).name != recorded or file.resolve().parent != ROOT:
        raise UserError(
            f"{folder}: trained by the script {recorded!r}, which is not beside common/ and is "
            "not run for a checkpoint's sake. If you trust it: --script PATH"
        )
    if not file.is_file():
        raise UserError(
            f"{file}: the script that trained this checkpoint is gone; --script PATH names it "
            "elsewhere"
        )
    return _as_module(file)


def _as_module(file):
    module = sys.modules.get(file.stem)
    if module is None or getattr(module, "__file__", None) != str(file):
        spec = importlib.util.spec_from_file_location(file.stem, file)
        if spec is None or spec.loader is None:
            raise UserError(f"{file}: not a Python file")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    if not is_dataclass(getattr(module, "Config", None)) or not hasattr(module, "Policy"):
        raise UserError(f"{file}: not a training script: it has no Config and Policy")
    return module


def check_plugins(folder: Path, recorded: Sequence[str], trusted: Sequence[str]) -> None:
    """Raise UserError unless each plugin of a checkpoint is the project's, or named by the user."""
    foreign = [
        name for name in recorded if name not in trusted and not _of_project(name, folder.resolve())
    ]
    if foreign:
        raise UserError(
            f"{folder}: needs the plugins {foreign}, which are not the project's and are not "
            f"imported for a checkpoint's sake. If you trust them: --plugins {' '.join(foreign)}"
        )


def _of_project(name, folder):
    """Whether a module is found below ROOT, and not in the run's folder. Imports nothing."""
    run_folder = folder if ROOT.is_relative_to(folder.parent) else folder.parent
    search = [str(ROOT)]
    words = name.split(".")
    if not all(word.isidentifier() for word in words):
        return False
    for word in words:
        spec = importlib.machinery.PathFinder.find_spec(word, search)
        if spec is None:
            return False
        search = list(spec.submodule_search_locations or [])
        for path in [spec.origin] if spec.origin else search:
            file = Path(path).resolve()
            if not file.is_relative_to(ROOT) or file.is_relative_to(run_folder):
                return False
    return True


def find_checkpoint(folder: Path | str) -> Path:
    """A checkpoint folder itself, or the newest one of a run folder, with all files as written.

    Raises UserError where there is none, or where it is damaged.
    """
    folder = Path(folder).expanduser()
    if not (folder / "meta.json").is_file():
        found = newest(folder) if folder.is_dir() else None
        if found is None:
            raise UserError(
                f"{folder}: no checkpoint here (a folder with meta.json, or a run folder of such "
                "folders)"
            )
        return found
    problem = damage(folder)
    if problem:
        raise UserError(f"{problem}; take another checkpoint of this run")
    return folder


def open_policy(
    folder: Path,
    weights: dict[str, Path] | None = None,
    script: Path | None = None,
    plugins: Sequence[str] = (),
) -> tuple:
    """(policy, config) of a checkpoint folder, or of the newest one in a run folder.

    weights: frozen component -> the file that holds it now. script: the training script, where it
    is not beside common/. plugins: those of the checkpoint that are not the project's, and may be
    imported. Raises UserError for a missing or changed file.

    A checkpoint may come from a stranger. Opening one reads meta.json, safetensors files of its
    folder, and the safetensors files of frozen components, wherever meta.json says that they are;
    no pickle is read. It runs no code but the project's: the training script that meta.json names,
    if it lies beside common/, the blocks of common/ and torch.nn, and plugins below the project's
    folder. Any other script or plugin runs only if it is given here.
    """
    folder = find_checkpoint(folder)
    meta = legacy.translated(read_meta(folder), folder)
    frozen = meta["frozen"]
    weights = weights or {}
    if unknown := sorted(weights.keys() - frozen.keys()):
        known = sorted(frozen) or "none"
        raise UserError(f"--weights: {unknown} not among the frozen components: {known}")
    module = load_script(folder, meta["script"], script)
    cfg = from_dict(module.Config, meta["config"])
    check_plugins(folder, cfg.plugins, plugins)
    import_plugins(cfg.plugins)
    sources = {}
    cfg.model.component_build_args = {}
    for name, text in meta["components"].items():
        sources[name] = Yaml.parse(text, f"{folder}/meta.json:{name}")
        part = Part(freeze=name in frozen, same_as=meta["aliases"].get(name))
        if name in frozen:
            part.init = _frozen_file(folder, name, frozen[name], weights.get(name))
        cfg.model.component_build_args[name] = part
    parts = build_parts(cfg.model, sources, meta["facts"], cfg.data.cameras, folder)
    values = read_tensors(folder / "dataset_stats.safetensors")
    stats = Normalizer(cfg.data.normalize, values, cfg.data.min_std)
    return module.Policy(parts, stats, cfg).eval(), cfg
