"""Checkpoints: one safetensors file per component, written whole or not at all, checked before they are read."""

import hashlib
import importlib.util
import json
import math
import os
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from common.blocks.weights import read_tensors
from common.build import import_plugins
from common.config import UserError, Yaml, from_dict
from common.data.normalizer import Normalizer
from common.parts import build_parts, load_component
from common.schema import Optim, Part

ROOT = Path(__file__).resolve().parents[1]


def save(folder: Path, policy, optimizers, average, meta: dict):
    """Write `folder`: component files with the weights to run, statistics, resume/, and meta.json last.

    Everything goes to `<folder>.tmp` first, synced to disk, then renamed; an existing folder steps aside until then.
    Raises UserError naming path and free space where the disk refuses; older checkpoints stay as they are.
    """
    tmp, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        (tmp / "resume").mkdir(parents=True)
        averaged = average.weights()
        for name in policy.parts.trainable():
            prefix = f"parts.{name}."
            state = policy.parts[name].state_dict()
            _write(
                tmp / f"{name}.safetensors",
                {key: averaged.get(prefix + key, state[key]) for key in state},
            )
        _write(tmp / "dataset_stats.safetensors", policy.stats.state_dict())
        raw = {name: p for name, p in policy.named_parameters() if name in averaged}
        held = ("stats.", *(f"parts.{name}." for name in policy.parts))
        other = {
            key: value for key, value in policy.state_dict().items() if not key.startswith(held)
        }
        for file, tensors in (("raw", raw), ("other", other)):
            if tensors:
                _write(tmp / f"resume/{file}.safetensors", tensors)
        names = {id(p): name for name, p in policy.named_parameters()}
        meta = {**meta, "frozen": _record_frozen(folder.parent, policy.parts), "optimizers": []}
        meta["schedules"] = _schedules(optimizers)
        for i, optimizer in enumerate(optimizers):
            state = {
                f"{names[id(p)]}/{key}": v
                for p, values in optimizer.state.items()
                for key, v in values.items()
            }
            _write(tmp / f"resume/optimizer_{i}.safetensors", state)
            meta["optimizers"].append([_progress(group) for group in optimizer.param_groups])
        files = sorted(file for file in tmp.rglob("*") if file.is_file())
        meta["files"] = {
            str(file.relative_to(tmp)): [file.stat().st_size, sha256(file)] for file in files
        }
        with (tmp / "meta.json").open("w") as f:
            json.dump({**meta, "sha256": _digest(meta)}, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        for part in (tmp / "resume", tmp):
            _sync(part)
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


def _schedules(optimizers):
    return {
        group["component"]: group["schedule"]
        for optimizer in optimizers
        for group in optimizer.param_groups
    }


def _progress(group):
    """What the optimizer itself keeps in a group (schedule-free's counters); settings come from the config."""
    settings = {f.name for f in fields(Optim)} | {"params", "component", "lr", "schedule"}
    return {k: v for k, v in group.items() if k not in settings and isinstance(v, int | float)}


def _record_frozen(save_dir, parts):
    """Frozen components by file and hash; those that no file holds are written once into frozen/."""
    record = {}
    for name in sorted(parts.frozen):
        file = parts.sources.get(name)
        if file is None:
            file = save_dir / "frozen" / f"{name}.safetensors"
            if not file.exists():
                file.parent.mkdir(exist_ok=True)
                _write(file.with_suffix(".tmp"), parts[name].state_dict())
                file.with_suffix(".tmp").rename(file)
        record[name] = {
            "path": os.path.relpath(file, save_dir) if file.parent.parent == save_dir else str(file)
        }
        if name not in parts.hashes:
            parts.hashes[name] = sha256(file)
        record[name]["sha256"] = parts.hashes[name]
    return record


def _frozen_file(folder, name, record, given=None) -> Path:
    """The file of a frozen component: as given, or as recorded. Raises UserError if it is gone or not the same."""
    file = Path(given or folder.parent / record["path"]).expanduser()
    if not file.is_file():
        raise UserError(
            f"{file}: weights of frozen '{name}' are gone; evaluate.py takes --weights {name}=PATH"
        )
    if sha256(file) != record["sha256"]:
        raise UserError(f"{file}: not the file that '{name}' was trained with (sha256 differs)")
    return file


def _write(file, tensors):
    save_file(
        {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()},
        file,
    )
    _sync(file)


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def sha256(file: Path) -> str:
    with Path(file).open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _digest(meta: dict) -> str:
    return hashlib.sha256(json.dumps(meta).encode()).hexdigest()


def read_meta(folder: Path) -> dict:
    """meta.json of a checkpoint. Raises UserError if it is not as it was written."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta.pop("sha256") == _digest(meta):
            return meta
    except (OSError, ValueError, KeyError):
        pass
    raise UserError(f"{folder}/meta.json is missing or has other content than was written")


def steps(save_dir: Path) -> dict[Path, float]:
    """Checkpoint folders -> their step, oldest first; inf where meta.json, which is written last, is not whole."""
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
    """The first file of a checkpoint that is not as meta.json says, with what is wrong."""
    try:
        files = read_meta(folder)["files"]
    except UserError as e:
        return str(e)
    for name, (size, digest) in files.items():
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size} bytes, {size} were written"
        if sha256(file) != digest:
            return f"{file} has other content than was written"
    return None


def newest(save_dir: Path) -> Path | None:
    """The checkpoint with the largest step whose files are all as written; tells of those it passes over.

    None where there are no checkpoints; raises UserError where all are damaged.
    """
    problems = []
    for folder in reversed(steps(save_dir)):
        problem = damage(folder)
        if problem is None:
            print(
                "".join(f"warning: {text}; {folder.name} is taken instead\n" for text in problems),
                end="",
            )
            return folder
        problems.append(problem)
    if problems:
        raise UserError(
            "\n".join(
                [*problems, f"{save_dir}: no checkpoint is whole; move them away to begin anew"]
            )
        )
    return None


def repair(save_dir: Path):
    """Clear what an interrupted save left: half-written folders go, a folder set aside comes back if it is needed."""
    for left in save_dir.glob("*_*.tmp"):
        shutil.rmtree(left)
    for left in save_dir.glob("*_*.old"):
        if left.with_suffix("").exists():
            shutil.rmtree(left)
        else:
            left.rename(left.with_suffix(""))


def prune(save_dir: Path, keep_last: int, step: int):
    """Delete all but the newest `keep_last` checkpoints up to `step`; any later one was damaged and passed over."""
    found = steps(save_dir)
    kept = [folder for folder, at in found.items() if at <= step][-keep_last:]
    for folder in found.keys() - set(kept):
        shutil.rmtree(
            folder.rename(folder.with_name(folder.name + ".tmp"))
        )  # half deleted, it would look damaged


def load(folder: Path, policy, optimizers, average) -> dict:
    """Put a checkpoint into a policy of the same components, to train on; its meta.json."""
    meta, parts, problems = read_meta(folder), policy.parts, []
    was = {
        "components": set(meta["components"]),
        "frozen": set(meta["frozen"]),
        "shared": {*meta["aliases"].items()},
    }
    now = {
        "components": {*parts, *parts.aliases},
        "frozen": parts.frozen,
        "shared": {*parts.aliases.items()},
    }
    was["optimizers"], now["optimizers"] = (
        {*meta["schedules"].items()},
        {*_schedules(optimizers).items()},
    )
    for what in [what for what in now if was[what] != now[what]]:
        here, there = (sorted(x) or "none" for x in (now[what] - was[what], was[what] - now[what]))
        problems.append(f"{what}: {there} in the checkpoint, {here} configured")
    for name in [] if problems else parts.trainable():
        try:
            load_component(parts[name], folder / f"{name}.safetensors", name)
        except UserError as e:
            problems.append(str(e))
    if problems:
        advice = "a run keeps its components; for a new one from these weights set train.save_dir and train.load_dir"
        raise UserError(
            "\n".join([f"{folder}: not of the run that is configured", *problems, f"    {advice}"])
        )
    policy.stats.load_state_dict(read_tensors(folder / "dataset_stats.safetensors"))
    for name, record in meta["frozen"].items():
        file = _frozen_file(folder, name, record, parts.sources.get(name))
        if name not in parts.sources:
            load_component(parts[name], file, name)
    device = next(policy.parameters()).device
    parameters = dict(policy.named_parameters())
    with torch.no_grad():
        for name, shadow in average.ema.items():
            shadow.copy_(parameters[name])
        if (folder / "resume/raw.safetensors").exists():
            for name, value in read_tensors(folder / "resume/raw.safetensors").items():
                parameters[name].copy_(value)
    if (folder / "resume/other.safetensors").exists():
        policy.load_state_dict(read_tensors(folder / "resume/other.safetensors"), strict=False)
    for i, (optimizer, groups) in enumerate(zip(optimizers, meta["optimizers"], strict=True)):
        for key, value in read_tensors(folder / f"resume/optimizer_{i}.safetensors").items():
            name, _, kind = key.rpartition("/")
            optimizer.state[parameters[name]][kind] = value.to(device)
        for group, progress in zip(optimizer.param_groups, groups, strict=True):
            group.update(progress)
    return meta


def load_script(path: str):
    """The training script of a checkpoint as a module; `path` as saved: beside common/, or absolute."""
    file = ROOT / path
    if not file.is_file():
        raise UserError(f"{file}: the script that trained this checkpoint is gone")
    loaded = sys.modules.get(file.stem)
    if getattr(loaded, "__file__", None) == str(file):
        return loaded
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def open_policy(folder: Path, weights: dict[str, Path] | None = None):
    """(policy, config) of a checkpoint folder, or of the newest one in a run folder, as it was trained.

    weights: frozen component -> where its file is now. A missing or changed file is an error that names it.
    """
    folder = Path(folder)
    if not (folder / "meta.json").is_file():
        found = newest(folder) if folder.is_dir() else None
        if found is None:
            raise UserError(
                f"{folder}: no checkpoint here (a folder with meta.json, or a run folder of such folders)"
            )
        folder = found
    elif problem := damage(folder):
        raise UserError(f"{problem}; take another checkpoint of this run")
    meta, weights = read_meta(folder), weights or {}
    if unknown := sorted(weights.keys() - meta["frozen"]):
        raise UserError(
            f"--weights: {unknown} not among the frozen components: {sorted(meta['frozen']) or 'none'}"
        )
    script = load_script(meta["script"])
    cfg = from_dict(script.Config, meta["config"])
    import_plugins(cfg.plugins)
    files = {
        name: _frozen_file(folder, name, record, weights.get(name))
        for name, record in meta["frozen"].items()
    }
    cfg.model.component_build_args = {
        name: Part(init=files.get(name), freeze=name in files, same_as=meta["aliases"].get(name))
        for name in meta["components"]
    }
    sources = {
        name: Yaml.parse(text, f"{folder}/meta.json:{name}")
        for name, text in meta["components"].items()
    }
    parts = build_parts(cfg.model, sources, meta["facts"], cfg.data.cameras, folder)
    stats = Normalizer(cfg.data.normalize, read_tensors(folder / "dataset_stats.safetensors"))
    return script.Policy(parts, stats, cfg).eval(), cfg
