"""The components that train.yaml lists: built, loaded and frozen one by one."""

import inspect
import re
import shlex
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from common.blocks.weights import read_tensors, require, shapes_of
from common.build import GraphModel, build, check
from common.config import ConfigError, UserError, Yaml, nearest
from common.data.images import IMAGE
from common.schema import Model, Part

CAMERA_PART = re.compile(r"(.+)_(backbone|hand_extractor|da3)")
User = tuple[str, str]  # a component, and the camera whose pictures it reads


class Parts(nn.ModuleDict):
    """Components under their YAML names.

    frozen: stay in eval mode and without gradient; aliases: component -> the one whose module it
    shares; sources: frozen component -> the file that holds all of its weights; files: component
    -> the file that its weights are from, if any; hashes: frozen component -> sha256 of its file,
    once known.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        frozen: Iterable[str] = (),
        aliases: dict[str, str] | None = None,
        sources: dict[str, Path] | None = None,
    ):
        super().__init__(modules)
        self.frozen = set(frozen)
        self.aliases = dict(aliases or {})
        self.sources = dict(sources or {})
        self.files: dict[str, Path] = {}
        self.hashes: dict[str, str] = {}
        for name in self.frozen:
            self[name].requires_grad_(False)
        self.train()

    def trainable(self) -> list[str]:
        return [name for name in self if name not in self.frozen]

    def train(self, mode: bool = True) -> "Parts":
        super().train(mode)
        for name in self.frozen:
            self[name].eval()
        return self

    def require(self, *names: str) -> None:
        """Raise ConfigError unless all these components are listed."""
        missing = [name for name in names if name not in self]
        if missing:
            raise ConfigError(
                f"model.component_config_paths: this policy needs {', '.join(missing)}; "
                f"listed: {', '.join(self) or 'none'}{nearest(missing[0], self)}"
            )

    def only_block(self, name: str, attribute: str) -> Any:
        """The block of a component in the short form, with an attribute. Raises ConfigError."""
        if not hasattr(self[name], "block"):
            raise ConfigError(
                f"{name}: this policy needs a single block here, not a graph of blocks"
            )
        block = self[name].block
        if not hasattr(block, attribute):
            raise ConfigError(
                f"{name}: this policy needs a block with `{attribute}`, {type(block).__name__} has "
                "none: is it the file of another component?"
            )
        return block

    def encode_cameras(
        self, obs: dict[str, Tensor], cameras: Sequence[str]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Pictures of a batch -> visual inputs, and of each camera a summary (B, 1, S).

        Visual inputs are: of each camera a grid (B, h', w', C); then tokens (B, n, C) of each
        `<camera>_hand_extractor`; then depth features (B, L h', w', C) of `da3` for the first
        camera, or of `<camera>_da3` for its own: layers are stacked along h', and so are frames.
        Cameras that share a component go through it in one call. Features that obs holds already,
        under `features.<component>.<camera>` (channels last) and `....summary` (B, 1, S), are not
        computed again, and their pictures need not be there.
        """
        backbones, hands, depth = self.camera_components(cameras)
        features = self._features(obs, [*backbones, *hands, *depth])
        grids = [features[user][0].flatten(1, -3) for user in backbones]
        tokens = [features[user][0].flatten(1, -2) for user in hands]
        depths = [features[user][0].movedim(1, -4).flatten(1, -3) for user in depth]
        summaries = [features[user][1].flatten(1, -2).mean(1, keepdim=True) for user in backbones]
        return [*grids, *tokens, *depths], summaries

    def visual_mask(self, camera_mask: Tensor | None, cameras: Sequence[str]) -> Tensor | None:
        """Hidden cameras (B, cameras) -> hidden visual inputs: all made of a hidden picture."""
        if camera_mask is None:
            return None
        users = [user for kind in self.camera_components(cameras) for user in kind]
        return camera_mask[:, [list(cameras).index(camera) for _, camera in users]]

    def camera_components(self, cameras: Sequence[str]) -> list[list[User]]:
        """(component, camera) of backbones, of hand extractors, and of da3; see camera_users()."""
        return camera_users(self, self.aliases, cameras)

    def _features(self, obs: dict[str, Tensor], users: list[User]) -> dict[User, Sequence[Tensor]]:
        """Features (B, F, ..., channels last) of F frames, and a backbone's summary (B, F, S)."""
        features: dict[User, Sequence[Tensor]] = {}
        missing: dict[str, list[str]] = {}
        for name, camera in users:
            key = f"features.{name}.{camera}"
            if key in obs:
                keys = [k for k in (key, f"{key}.summary") if k in obs]
                features[name, camera] = [obs[k].float() for k in keys]
            else:
                missing.setdefault(name, []).append(camera)
        for name, cameras in missing.items():
            pictures = torch.cat([obs[IMAGE + camera] for camera in cameras])
            frames = pictures.shape[1] if pictures.ndim == 5 else 1
            results = self[name](image=pictures.flatten(0, -4))
            if isinstance(results, tuple):
                grid, summary = results
                results = [grid.movedim(1, -1), summary]
            else:
                results = [results]
            shares = [
                result.unflatten(0, (len(pictures), frames)).chunk(len(cameras))
                for result in results
            ]
            for camera, of_camera in zip(cameras, zip(*shares, strict=True), strict=True):
                features[name, camera] = of_camera
        return features

    def table(self, cfg: Any) -> str:
        """Parameters of each component, and the MiB that they take in training, in float32."""
        rows = {}
        for name, part in self.items():
            count = sum(p.numel() for p in part.parameters())
            trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
            optim = {**vars(cfg.train.optim), **cfg.model.component_optims.get(name, {})}
            averaged = bool(cfg.train.ema) and optim["type"] != "schedule_free_radam"
            # Every optimizer keeps two tensors per parameter; of schedule-free's, one is averaged.
            floats = [count, trained, 2 * trained, averaged * trained]
            rows[name] = [count, trained, count - trained, *floats]
        rows["total"] = [sum(column) for column in zip(*rows.values(), strict=True)]
        titles = ["parameters", "trainable", "frozen"]
        sizes = ["weights", "gradients", "optimizer", "EMA", "MiB"]
        lines = [
            f"{'component':<20}"
            + "".join(f"{title:>15}" for title in titles)
            + "".join(f"{title:>11}" for title in sizes)
        ]
        for name, row in rows.items():
            mib = [4 * n / 2**20 for n in [*row[3:], sum(row[3:])]]
            counts = "".join(f"{n:>15,}" for n in row[:3])
            lines.append(f"{name:<20}" + counts + "".join(f"{n:>11,.1f}" for n in mib))
        lines[-1:-1] = [f"{name:<20}same as {owner}" for name, owner in self.aliases.items()]
        lines.append("MiB of weights and of what training adds to them; activations come on top")
        return "\n".join(lines)


def camera_users(
    components: Collection[str], aliases: dict[str, str], cameras: Sequence[str]
) -> list[list[User]]:
    """(component, camera) of backbones, of hand extractors, and of da3.

    A camera's component is `<camera>_<kind>`, or the one that this shares; or one without a camera
    in its name: `backbone` serves all cameras, `da3` the first.
    """
    found = []
    for kind, served in (("backbone", cameras), ("hand_extractor", []), ("da3", cameras[:1])):
        users = []
        for camera in cameras:
            own = f"{camera}_{kind}"
            name = kind if kind in components and camera in served else aliases.get(own, own)
            if name in components:
                users.append((name, camera))
        found.append(users)
    return found


@dataclass
class Origin:
    """The checkpoint that train.load_dir names: its folder, component names, cameras and facts."""

    folder: Path
    components: Collection[str]
    aliases: dict[str, str]
    cameras: list[str]
    facts: dict[str, int]


def build_parts(
    model: Model,
    sources: dict[str, Yaml],
    facts: dict[str, int],
    cameras: Sequence[str],
    origin: Origin | None = None,
) -> Parts:
    """Every listed component, initialised as component_build_args and the origin say.

    model: the config's section; sources: component -> its Yaml; facts: numbers of the dataset. A
    component of a camera that data.cameras lacks, such as `<camera>_backbone`, is left out with a
    notice. A component without anything to learn is frozen. A block with load_weights() reads
    published files, of `weights` or of `init`, in its own way; one that nothing is loaded into
    starts random, with a notice. Raises one error that lists all weights that do not fit.
    """
    for name, camera in of_absent_cameras(sources, cameras).items():
        print(f"notice: {name} is left out, data.cameras has no '{camera}'")
    owners = shared_modules(model, sources, cameras)
    aliases = {
        name: owner for owner, (_, names) in owners.items() for name in names if name != owner
    }
    args = {
        owner: model.component_build_args.get(named, Part()) for owner, (named, _) in owners.items()
    }
    check_cameras({*owners, *aliases}, cameras)
    modules = {name: build(sources[name], facts) for name in owners}
    frozen = [
        name
        for name, module in modules.items()
        if args[name].freeze or not any(p.requires_grad for p in module.parameters())
    ]
    for name in frozen:
        if name in model.component_optims:
            raise ConfigError(
                f"model.component_optims.{name}: '{name}' is frozen: it has no optimizer of its own"
            )
    files = {}
    whole = set()
    problems = []
    misfits = []  # components whose file in load_dir does not fit
    for name, module in modules.items():
        try:
            file, holds_all = initialise(module, name, args[name].init, origin)
        except UserError as e:
            problems.append(str(e))
            in_origin = origin and (origin.folder / f"{name}.safetensors").is_file()
            if in_origin and not args[name].init:
                misfits.append(owners[name][0])
            continue
        if file:
            files[name] = file
        if holds_all:
            whole.add(name)
    parts = Parts(modules, frozen, aliases)
    if origin:
        if not any((origin.folder / f"{name}.safetensors").is_file() for name in modules):
            raise ConfigError(
                f"train.load_dir: {origin.folder} holds no file for any of {', '.join(modules)}"
            )
        loaded = [name for name, file in files.items() if file.parent == origin.folder]
        moved, unmapped = move_cameras(parts, loaded, origin, cameras)
        whole -= moved  # no longer what the file holds
        problems += unmapped.values()
        misfits += [owners[name][0] for name in unmapped]
    if misfits:
        problems.append(f"    {from_scratch(model, misfits)}")
    if problems:
        raise UserError("\n".join(problems))
    parts.sources = {name: files[name] for name in frozen if name in whole}
    parts.files = files
    return parts


def from_scratch(model: Model, names: Iterable[str]) -> str:
    """Advice to start these components from random weights: the key to paste, with its entries."""
    entries = {}
    for name in [*model.component_build_args, *names]:
        part = model.component_build_args.get(name, Part())
        part = replace(part, init="scratch") if name in names else part
        entries[name] = {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(part).items()
            if value != getattr(Part(), key)
        }
    entries = {name: entry for name, entry in entries.items() if entry}
    text = yaml.safe_dump(entries, default_flow_style=True, width=10**6, sort_keys=False).strip()
    setting = shlex.quote(f"model.component_build_args={text}")
    return f"to start just these from random weights, add:\n    {setting}"


def matched(was: Sequence, now: Sequence) -> list[int] | None:
    """Index in `was` of each item of `now`; items that are new take the places of those gone.

    None if the numbers differ.
    """
    if len(was) != len(now):
        return None
    gone = [i for i, item in enumerate(was) if item not in now]
    return [was.index(item) if item in was else gone.pop(0) for item in now]


def visual_inputs(
    components: Collection[str], aliases: dict[str, str], cameras: Sequence[str]
) -> list[tuple[int, str]]:
    """(kind, camera) of each visual input of a policy, in its order."""
    kinds = enumerate(camera_users(components, aliases, cameras))
    return [(kind, camera) for kind, users in kinds for _, camera in users]


def move_cameras(
    parts: Parts, loaded: Sequence[str], origin: Origin, cameras: Sequence[str]
) -> tuple[set[str], dict[str, str]]:
    """Give each camera the weights that its name had in the origin, in the components loaded there.

    Returns the components that changed, and component -> why its weights fit no other camera. A
    block whose weights depend on the order of cameras has reorder_inputs(visual, cameras); one that
    reads the first camera only says so by first_camera_only. Cameras that are new take the weights
    of those that are gone, with a notice.
    """
    was = origin.cameras
    now = list(cameras)
    if was == now:
        return set(), {}
    new = [camera for camera in now if camera not in was]
    gone = [camera for camera in was if camera not in now]
    if new or gone:
        print(
            f"notice: data.cameras has {new or 'none'} that {origin.folder} was not trained with, "
            f"and lacks {gone or 'none'} of it"
        )
    order = matched(was, now)
    before = visual_inputs(origin.components, origin.aliases, was)
    visual = matched(before, visual_inputs(parts, parts.aliases, now))
    if order and new:
        print(f"notice: {new} start from the weights of {gone}, in this order")
    if order:
        other_first = order[0] != 0
    else:
        other_first = was[:1] != now[:1] and not {*was[:1], *now[:1]}.isdisjoint({*was} & {*now})
    mixed = order is not None and order != sorted(order)
    moved = set()
    unmapped = {}
    for name in loaded:
        blocks = list(parts[name].modules())
        if any(getattr(b, "first_camera_only", False) for b in blocks):
            if other_first:
                unmapped[name] = (
                    f"{origin.folder}: '{name}' reads the first camera only, which was '{was[0]}' "
                    f"there and is '{now[0]}' in data.cameras: its weights fit no other"
                )
            continue
        movable = [b for b in blocks if hasattr(b, "reorder_inputs")]
        if movable and order is not None and visual is not None:
            if mixed or visual != sorted(visual):
                for b in movable:
                    b.reorder_inputs(visual, order)
                moved.add(name)
        elif not movable and (mixed or other_first) and reads_cameras(parts[name]):
            print(
                f"warning: '{name}' gets the cameras in the order {now}; in {origin.folder} it was "
                f"{was}, and its weights stay as they are (its blocks have no reorder_inputs)"
            )
    return moved, unmapped


def reads_cameras(module: GraphModel) -> bool:
    """Whether a component takes inputs of several cameras, by their names in the policies."""
    names = module._inputs
    if names is None:
        names = inspect.signature(getattr(module.block, "forward", module.block)).parameters
    return not {"cond_visual", "cond_semantic", "images"}.isdisjoint(names)


def of_absent_cameras(sources: Iterable[str], cameras: Sequence[str]) -> dict[str, str]:
    """Component -> its camera, of those whose camera data.cameras lacks."""
    matches = {name: CAMERA_PART.fullmatch(name) for name in sources}
    own = {name: match[1] for name, match in matches.items() if match}
    return {name: camera for name, camera in own.items() if camera not in cameras}


def shared_modules(
    model: Model, sources: dict[str, Yaml], cameras: Sequence[str]
) -> dict[str, tuple[str, list[str]]]:
    """Owner of a module -> (the component that `same_as` names, all components that share it).

    Components of absent cameras are left out.
    """
    groups: dict[str, list[str]] = {}
    absent = of_absent_cameras(sources, cameras)
    for name in sources:
        if name in absent:
            continue
        named = model.component_build_args.get(name, Part()).same_as or name
        groups.setdefault(named, []).append(name)
    # The component that same_as names may be of an absent camera: then the first user owns it.
    return {
        (named if named in names else names[0]): (named, names) for named, names in groups.items()
    }


def check_cameras(components: set[str], cameras: Sequence[str]) -> None:
    """Raise ConfigError where a camera has no component, or a component no camera."""
    for camera in cameras:
        own = f"{camera}_backbone"
        if not {"backbone", own, "state_resnet34_encoder"} & components:
            raise ConfigError(
                f"model.component_config_paths: camera '{camera}' has neither '{own}' "
                "nor 'backbone'"
            )
    if "da3" in components and not cameras:
        raise ConfigError(
            "model.component_config_paths: 'da3' is listed, but data.cameras names no camera"
        )


def check_sources(
    model: Model, sources: dict[str, Yaml], facts: dict[str, int], cameras: Sequence[str]
) -> None:
    """Raise what build_parts() would where the dataset is not there yet, and need not be.

    facts: those of its numbers that are known.
    """
    owners = shared_modules(model, sources, cameras)
    check_cameras({name for _, names in owners.values() for name in names}, cameras)
    for name in owners:
        check(sources[name], facts)


def initialise(
    module: GraphModel, name: str, init: Any, origin: Origin | None
) -> tuple[Path | None, bool]:
    """Load a component's weights: their file, if there is one, and whether it holds all of them."""
    own = {prefix: b for prefix, b in module.named_modules() if hasattr(b, "load_weights")}
    blocks = [*own.values()]
    keys = module.state_dict().keys()
    saved = origin.folder / f"{name}.safetensors" if origin else None
    file = init or (saved if saved and saved.is_file() else None)
    if file == "scratch":
        published = []
    elif init and len(own) == 1 and not keys & read_tensors(init).keys():
        blocks[0].weights = str(init)  # the published file, given as init
        published = blocks
    elif file:
        return load_component(module, file, name), True
    else:
        published = [b for b in blocks if getattr(b, "weights", None)]
    if origin and not init and not blocks:
        print(f"NOTICE: {name} starts with RANDOM weights: {saved} does not exist")
    for b in blocks:
        if b not in published:
            usual = getattr(b, "weights", None) or getattr(b, "published", None)
            instead = f", not those of {usual}" if usual else ""
            print(f"NOTICE: {name} starts with RANDOM weights{instead}")
    files = [b.load_weights() for b in published]
    if not files:
        return None, False
    whole = len(files) == len(own) == 1 and all(
        key.startswith(f"{next(iter(own))}.") for key in keys
    )
    return files[-1], whole


def load_component(module: nn.Module, file: Path, name: str) -> Path:
    """Load a component from a safetensors file, exactly; the file. UserError lists what differs."""
    tensors = read_tensors(file)
    title = f"{file}: not the weights of component '{name}' as configured"
    require_like(module.state_dict(), tensors, title)
    module.load_state_dict(tensors)
    return file


def require_like(own: dict[str, Tensor], tensors: dict[str, Tensor], title: str) -> None:
    """Raise UserError, under `title`, unless names, shapes and kinds of number are the same.

    A float may be of another size: it is converted.
    """
    require(shapes_of(own), tensors, title)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() != own[name].is_floating_point() or tensor.is_complex():
            raise UserError(f"{title}: {name} is {tensor.dtype}, expected {own[name].dtype}")
