"""Checkpoints: one safetensors file per component, written atomically, checked when read."""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from common import legacy, manifest
from common.blocks.weights import read_tensors, require
from common.build import import_plugins
from common.config import UserError, Yaml
from common.data.normalizer import Normalizer
from common.files import free_space
from common.optim import AveragedWeights
from common.parts import Origin, build_parts, load_component, require_like
from common.schema import Optim, Part
from common.trust import ROOT, check_plugins, load_script  # noqa: F401 (ROOT: for run.py)


def save(
    folder: Path,
    policy: nn.Module,
    optimizers: Sequence[Optimizer],
    average: AveragedWeights,
    meta: dict,
) -> None:
    """Write `folder`: component files with averaged weights, statistics, resume/, meta.json last.

    Everything goes to `<folder>.tmp` first, synced to disk, then renamed; an existing folder steps
    aside until then. Raises UserError, and older checkpoints stay as they are: if anything is not
    finite, before anything is written; with path and free space if the disk refuses.
    """
    if broken := not_finite(policy, optimizers, average):
        raise UserError(
            f"step {meta['step']}: not finite after the optimizer's step: {', '.join(broken)}. "
            f"This step is not saved; checkpoints in {folder.parent} are from before, and intact. "
            "Lower peak_lr, or look at the data."
        )
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
        free = free_space(folder)
        raise UserError(f"{folder}: could not be saved: {e}{free}; nothing else changed") from e


@torch.no_grad()
def not_finite(
    policy: nn.Module, optimizers: Sequence[Optimizer], average: AveragedWeights
) -> list[str]:
    """Parts of a policy with a weight, average, optimizer state or statistic that is not finite.

    Buffers do not count, nor does what is frozen: training leaves them as they are.
    """
    names = {p: name for name, p in policy.named_parameters()}
    tensors = [(name, p) for p, name in names.items()]
    tensors += [(f"stats.{name}", value) for name, value in policy.stats.state_dict().items()]
    tensors += average.weights().items()
    for optimizer in optimizers:
        tensors += [(names[p], x) for p, state in optimizer.state.items() for x in state.values()]
    owners = {}
    for name, value in tensors:
        words = name.split(".")
        owner = words[1] if words[0] == "parts" else words[0]
        if owner not in policy.parts.frozen:
            owners.setdefault(owner, []).append(torch.as_tensor(value).isfinite().all())
    return [owner for owner, flags in owners.items() if not all(flags)]


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
    """A safetensors file with the mode that the user's umask gives: save_file() has its own."""
    tensors = {k: x.detach().to("cpu", copy=True).contiguous() for k, x in tensors.items()}
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file)
    file.chmod(mode)
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
    """meta.json of a checkpoint, as common/manifest.py says.

    Raises UserError if it is not as it was written, or if a field is missing or of another kind.
    """
    file = folder / "meta.json"
    meta = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        meta = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if not isinstance(meta, dict) or meta.pop("sha256", None) != _digest(meta):
        raise UserError(f"{file} is missing or has other content than was written")
    manifest.check(meta, file)
    return meta


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
    """The first damaged file of a checkpoint and its damage; None if there is none.

    Weights that are not finite are a damage, too: nothing can be trained on or evaluated from them.
    """
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
    try:
        return _broken_numbers(folder, sorted(files))
    except UserError as e:
        return str(e)


def _broken_numbers(folder, files):
    """A file of a checkpoint whose trained numbers are not all finite, or None.

    Buffers of a component may be infinite: of its file only the names that an optimizer has count.
    """
    trained = set()
    for name in sorted(files, key=lambda name: not name.startswith("resume/optimizer_")):
        tensors = read_tensors(folder / name)
        if name.startswith("resume/optimizer_"):
            trained |= {key.rpartition("/")[0] for key in tensors}
        elif name == "resume/other.safetensors":
            continue
        elif "/" not in name and name != "dataset_stats.safetensors":
            prefix = f"parts.{Path(name).stem}."
            tensors = {key: x for key, x in tensors.items() if prefix + key in trained}
        broken = [key for key, x in tensors.items() if not x.isfinite().all()]
        if broken:
            return f"{folder / name}: {', '.join(broken[:3])} not finite"
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


def translated_meta(folder: Path) -> dict:
    """meta.json of a checkpoint, with today's script and keys."""
    return legacy.translated(read_meta(folder), folder)


def require_same_cameras(folder: Path, meta: dict, cameras: dict[str, str]) -> None:
    """Raise UserError unless a run is resumed with the cameras of its checkpoint, in their order.

    Their order decides which weights a camera gets, and which one is the first.
    """
    was = meta["config"]["data"]["cameras"]
    if list(was.items()) != list(cameras.items()):
        raise UserError(
            f"{folder}: trained with other cameras, or in another order:\n"
            f"    data.cameras was {_flow(was)}\n"
            f"    data.cameras is  {_flow(cameras)}\n"
            "    a run keeps its cameras; for a new one from these weights set train.save_dir and "
            "train.load_dir, which finds cameras by their names"
        )


def _flow(mapping):
    return "{" + ", ".join(f"{key}: {value}" for key, value in mapping.items()) + "}"


def origin(load_dir: Path) -> Origin:
    """The checkpoint that train.load_dir names, by its folder or as the newest of a run folder."""
    folder = load_dir if (load_dir / "meta.json").is_file() else newest(load_dir)
    if folder is None:
        raise UserError(f"train.load_dir: {load_dir} holds no checkpoint")
    meta = read_meta(folder)
    components = meta["components"].keys() - meta["aliases"].keys()
    cameras = list(meta["config"]["data"]["cameras"])
    return Origin(folder, components, meta["aliases"], cameras, meta["facts"])


def load(
    folder: Path,
    meta: dict,
    policy: nn.Module,
    optimizers: Sequence[Optimizer],
    average: AveragedWeights,
) -> None:
    """Put a checkpoint into a policy of the same components, to train on. meta: translated."""
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
    policy.stats.load_state_dict(read_stats(folder, meta["facts"]))
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
        for name, value in _read_some(raw, parameters).items():
            parameters[name].copy_(value)
    other = folder / "resume/other.safetensors"
    policy.load_state_dict(_read_some(other, policy.state_dict()), strict=False)
    for i, (optimizer, saved) in enumerate(zip(optimizers, meta["optimizers"], strict=True)):
        _load_optimizer(folder / f"resume/optimizer_{i}.safetensors", optimizer, parameters)
        for group, own in zip(optimizer.param_groups, saved, strict=True):
            _load_counters(folder, group, own, COUNTERS.get(_kind(optimizer), own))


def _read_some(file, own):
    """Tensors of a file for some of a policy's own, by name; none if there is no file."""
    tensors = read_tensors(file) if file.exists() else {}
    unknown = sorted(tensors.keys() - own.keys())
    if unknown:
        raise UserError(
            f"{file} holds {', '.join(unknown[:3])}, which this script's policy lacks: resume "
            "with the version that wrote it, or start a new run with train.load_dir"
        )
    title = f"{file}: not of the policy as configured"
    require_like({name: own[name] for name in tensors}, tensors, title)
    return tensors


STATISTICS = ("mean", "std", "min", "max", "q01", "q99")
STATES = {  # optimizer -> what it keeps for each parameter, of the parameter's shape or a number
    "AdamW": {"step": (), "exp_avg": None, "exp_avg_sq": None},
    "RAdamScheduleFree": {"z": None, "exp_avg_sq": None},
}


COUNTERS = {"AdamW": (), "RAdamScheduleFree": ("k", "weight_sum", "lr_max", "scheduled_lr")}


def _kind(optimizer):
    return type(getattr(optimizer, "optimizer", optimizer)).__name__  # Accelerate wraps it


def _load_counters(folder, group, saved, names):
    """Give a group of an optimizer the counters of a checkpoint, but not its settings."""
    for name, now in _counters(group).items():
        if name not in names or name not in saved:
            continue
        if type(saved[name]) is not type(now):
            raise UserError(
                f"{folder}/meta.json: optimizers: {name}: expected {type(now).__name__}, "
                f"found {saved[name]}"
            )
        group[name] = saved[name]


def _load_optimizer(file, optimizer, parameters):
    """Give an optimizer the state of a file; parameters: name -> parameter of the policy."""
    tensors = read_tensors(file)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = {name: p for name, p in parameters.items() if id(p) in trained}
    kind = _kind(optimizer)
    names = {key.rpartition("/")[0] for key in tensors}
    if unknown := sorted(names - own.keys()):
        raise UserError(f"{file}: {unknown[0]} is no weight of this run")
    if kind in STATES:
        expected = {
            f"{name}/{state}": tuple(own[name].shape if shape is None else shape)
            for name in names
            for state, shape in STATES[kind].items()
        }
        require(expected, tensors, f"{file}: not the state of {kind} for this run's weights")
    for key, value in tensors.items():
        name, _, state = key.rpartition("/")
        p = own[name]
        if value.dtype != (p.dtype if value.shape == p.shape else torch.float32):
            raise UserError(f"{file}: {key} is of {value.dtype}, its weights are of {p.dtype}")
        optimizer.state[p][state] = value.to(p.device)


def read_stats(folder: Path, facts: dict[str, int]) -> dict[str, Tensor]:
    """Statistics of a checkpoint, as statistics() returns them, of the widths in its facts.

    Raises UserError for others.
    """
    file = folder / manifest.STATS
    tensors = read_tensors(file)
    expected = {
        f"{name}_{kind}": (facts[f"{name}_dim"],)
        for name in ("state", "action")
        for kind in STATISTICS
    }
    require(expected, tensors, f"{file}: not the statistics of the state and action")
    if any(x.dtype != torch.float32 for x in tensors.values()):
        raise UserError(f"{file}: expected numbers of float32")
    if not all(x.isfinite().all() for x in tensors.values()):
        raise UserError(f"{file}: expected finite numbers")
    return tensors


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
    groups = [len(optimizer.param_groups) for optimizer in optimizers]
    saved = [len(counters) for counters in meta["optimizers"]]
    if saved != groups:
        problems.append(f"groups of optimizers: {saved} in the checkpoint, {groups} configured")
    return problems


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
    no pickle is read, and nothing is fetched from a hub. It runs no code but the project's: the
    training script that meta.json names, if it lies beside common/, the blocks of common/ and of
    torch.nn, and plugins below the project's folder. Any other script or plugin runs only if it is
    given here.
    """
    folder = find_checkpoint(folder)
    meta = translated_meta(folder)
    frozen = meta["frozen"]
    weights = weights or {}
    if unknown := sorted(weights.keys() - frozen.keys()):
        known = sorted(frozen) or "none"
        raise UserError(f"--weights: {unknown} not among the frozen components: {known}")
    module = load_script(folder, meta["script"], script)
    reader = manifest.json_reader(folder / "meta.json", "config")
    cfg = reader.read(module.Config, meta["config"], ())
    check_plugins(folder, cfg.plugins, plugins)
    import_plugins(cfg.plugins)
    _require_facts(folder, meta["facts"], cfg.data)
    stats = read_stats(folder, meta["facts"])
    stats = Normalizer(cfg.data.normalize, stats, cfg.data.min_std)
    sources = {}
    cfg.model.component_build_args = {}
    for name, text in meta["components"].items():
        sources[name] = Yaml.parse(text, f"{folder}/meta.json:{name}")
        _leave_out_hub_ids(sources[name])
        part = Part(freeze=name in frozen, same_as=meta["aliases"].get(name))
        if name in frozen:
            part.init = _frozen_file(folder, name, frozen[name], weights.get(name))
        elif name not in meta["aliases"]:
            part.init = folder / f"{name}.safetensors"
        cfg.model.component_build_args[name] = part
    parts = build_parts(cfg.model, sources, meta["facts"], list(cfg.data.cameras))
    return module.Policy(parts, stats, cfg).eval(), cfg


def _require_facts(folder, facts, data):
    """Raise UserError unless the numbers of the dataset agree with the configuration."""
    configured = {
        "num_cameras": len(data.cameras),
        "action_horizon": data.action_horizon,
        "proprio_history": data.obs_proprio_history,
    }
    for name in ("state_dim", "action_dim", *configured):
        found = facts.get(name)
        expected = configured.get(name, found)
        if found is None or found != expected:
            raise UserError(
                f"{folder}/meta.json: facts.{name}: expected {expected or 'a number'}, "
                f"found {found or 'none'}"
            )


def _leave_out_hub_ids(source):
    """A checkpoint has the weights of its components: nothing is fetched from a hub for them."""
    data = source.data
    params = data.get("params")
    for entry in [data, *_mappings(data.get("blocks"))]:
        args = entry.get("args")
        if not isinstance(args, dict) or not isinstance(args.get("weights"), str):
            continue
        name = args["weights"].removeprefix("$")
        in_params = args["weights"] != name and isinstance(params, dict)
        owner, key = (params, name) if in_params else (args, "weights")
        if not Path(str(owner.get(key))).expanduser().exists():
            owner[key] = None


def _mappings(value):
    return [x for x in value.values() if isinstance(x, dict)] if isinstance(value, dict) else []
