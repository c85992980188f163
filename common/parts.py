"""The components that train.yaml lists: built, loaded and frozen one by one."""

import re
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.blocks.weights import read_tensors, require, shapes_of
from common.build import GraphModel, build, check
from common.config import ConfigError, Yaml, nearest
from common.data.images import IMAGE
from common.schema import Model, Part

CAMERA_PART = re.compile(r"(.+)_(backbone|hand_extractor|da3)")
User = tuple[str, str]  # a component, and the camera whose pictures it reads


class Parts(nn.ModuleDict):
    """Components under their YAML names.

    frozen: stay in eval mode and without gradient; aliases: component -> the one whose module it
    shares; sources: frozen component -> the file that holds all of its weights; loaded: components
    whose weights are from a file; hashes: frozen component -> sha256 of its file, once known.
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
        self.loaded: set[str] = set()
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

    def only_block(self, name: str) -> Any:
        """The block of a component in the short form, for what only it has. Raises ConfigError."""
        if not hasattr(self[name], "block"):
            raise ConfigError(
                f"{name}: this policy needs a single block here, not a graph of blocks"
            )
        return self[name].block

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
        """(component, camera) of backbones, of hand extractors, and of da3.

        A camera's component is `<camera>_<kind>`, or the one that this shares; or one without a
        camera in its name: `backbone` serves all cameras, `da3` the first.
        """
        found = []
        for kind, served in (("backbone", cameras), ("hand_extractor", []), ("da3", cameras[:1])):
            users = []
            for camera in cameras:
                own = f"{camera}_{kind}"
                name = kind if kind in self and camera in served else self.aliases.get(own, own)
                if name in self:
                    users.append((name, camera))
            found.append(users)
        return found

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


def build_parts(
    model: Model,
    sources: dict[str, Yaml],
    facts: dict[str, int],
    cameras: Sequence[str],
    load_dir: Path | None = None,
) -> Parts:
    """Every listed component, initialised as component_build_args and load_dir say.

    model: the config's section; sources: component -> its Yaml; facts: numbers of the dataset. A
    component of a camera that data.cameras lacks, such as `<camera>_backbone`, is left out with a
    notice. A component without anything to learn is frozen. A block with load_weights() reads
    published files, of `weights` or of `init`, in its own way; one that nothing is loaded into
    starts random, with a notice.
    """
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
    whole = []
    for name, module in modules.items():
        file, holds_all = initialise(module, name, args[name].init, load_dir)
        if file:
            files[name] = file
            print(f"{name}: weights from {file}")
        if holds_all:
            whole.append(name)
    if load_dir and not any(file.parent == load_dir for file in files.values()):
        raise ConfigError(
            f"train.load_dir: {load_dir} holds no file for any of {', '.join(modules)}"
        )
    parts = Parts(modules, frozen, aliases, {name: files[name] for name in frozen if name in whole})
    parts.loaded = set(files)
    return parts


def shared_modules(
    model: Model, sources: dict[str, Yaml], cameras: Sequence[str]
) -> dict[str, tuple[str, list[str]]]:
    """Owner of a module -> (the component that `same_as` names, all components that share it)."""
    groups: dict[str, list[str]] = {}
    for name in sources:
        of_camera = CAMERA_PART.fullmatch(name)
        if of_camera and of_camera[1] not in cameras:
            print(f"notice: {name} is left out, data.cameras has no '{of_camera[1]}'")
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
    with redirect_stdout(StringIO()):  # notices come with the components
        owners = shared_modules(model, sources, cameras)
    check_cameras({name for _, names in owners.values() for name in names}, cameras)
    for name in owners:
        check(sources[name], facts)


def initialise(
    module: GraphModel, name: str, init: Any, load_dir: Path | None
) -> tuple[Path | None, bool]:
    """Load a component's weights: their file, if there is one, and whether it holds all of them."""
    own = {prefix: b for prefix, b in module.named_modules() if hasattr(b, "load_weights")}
    blocks = [*own.values()]
    keys = module.state_dict().keys()
    saved = load_dir / f"{name}.safetensors" if load_dir else None
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
    require(shapes_of(module.state_dict()), tensors, title)
    module.load_state_dict(tensors)
    return file
