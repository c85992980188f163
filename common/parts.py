"""The components that train.yaml lists: built, loaded, frozen one by one, and together the parts of one policy."""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.blocks.weights import read_tensors, require
from common.build import build
from common.config import ConfigError
from common.data.images import IMAGE
from common.schema import Part


class Memory(NamedTuple):
    """What a look gives: tokens (B, N, d) for the decoder; what a latent's posterior and prior read."""

    tokens: Tensor
    first_camera: dict


def first_camera(proprio, visual, semantic, drop=None) -> dict[str, Tensor]:
    """What a latent's posterior and prior read. The flow loss shapes these features; posterior and prior do not."""
    seen = {
        "cond_visual": [x.detach() for x in visual[:1]],
        "cond_semantic": [x.detach() for x in semantic[:1]],
    }
    return {**seen, "cond_proprio": proprio, "drop": None if drop is None else drop[:, :1]}


class Parts(nn.ModuleDict):
    """Components under their YAML names. Frozen ones stay in eval mode; an alias is a component that shares another."""

    def __init__(self, modules, frozen=(), aliases=None, sources=None):
        super().__init__(modules)
        self.frozen, self.aliases = set(frozen), dict(aliases or {})
        self.sources = dict(
            sources or {}
        )  # frozen component -> the file that all of its weights come from
        self.loaded = set()  # components whose weights are from a file
        self.hashes = {}  # frozen component -> sha256 of that file, once it was needed
        for name in self.frozen:
            self[name].requires_grad_(False)
        self.train()

    def trainable(self) -> list[str]:
        return [name for name in self if name not in self.frozen]

    def train(self, mode=True):
        super().train(mode)
        for name in self.frozen:
            self[name].eval()
        return self

    def look(self, obs: dict[str, Tensor], cameras: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        """What a batch shows -> visual inputs, and per camera a summary (B, 1, S).

        Visual inputs: per camera a grid (B, h', w', C); then tokens (B, n, C) of each `<camera>_hand_extractor`; then
        what `da3` makes of the first camera, and `<camera>_da3` of its own, (B, L h', w', C): layers are stacked along
        h', and so are several frames. Cameras that share a component go through it in one call. Where obs holds what a
        component would say, under `features.<component>.<camera>` (channels last) and for a backbone
        `features.<component>.<camera>.summary` (B, 1, S), it is not run, and the pictures need not be there.
        """
        eyes, hands, depth = self.lookers(cameras)
        seen = self._seen(obs, [*eyes, *hands, *depth])
        grids = [seen[key][0].flatten(1, -3) for key in eyes]
        summaries = [seen[key][1].flatten(1, -2).mean(1, keepdim=True) for key in eyes]
        tokens = [seen[key][0].flatten(1, -2) for key in hands]
        return [
            *grids,
            *tokens,
            *(seen[key][0].movedim(1, -4).flatten(1, -3) for key in depth),
        ], summaries

    def hidden(self, drop: Tensor | None, cameras: list[str]) -> Tensor | None:
        """Which cameras are hidden (B, cameras) -> which visual inputs are: whatever is made of a hidden picture."""
        order = [cameras.index(camera) for some in self.lookers(cameras) for _, camera in some]
        return None if drop is None else drop[:, order]

    def lookers(self, cameras: list[str]) -> tuple[list, list, list]:
        """(component, camera) of what looks at pictures: backbones, hand extractors, da3 (at the first camera).

        A camera's component is its own, `<camera>_da3`, or one that this shares; or one without a camera in its name.
        """
        found = []
        for kind, serves in {"backbone": cameras, "hand_extractor": [], "da3": cameras[:1]}.items():
            own = {
                camera: self.aliases.get(f"{camera}_{kind}", f"{camera}_{kind}")
                for camera in cameras
            }
            eyes = [
                (kind if kind in self and camera in serves else name, camera)
                for camera, name in own.items()
            ]
            found.append([(name, camera) for name, camera in eyes if name in self])
        return tuple(found)

    def _seen(self, obs, wanted):
        """{(component, camera): (features, channels last[, summary])} of those wanted: (B, F, ...), or as obs has them.

        One call of each component; F frames.
        """
        seen, asked = {}, {}
        for name, camera in wanted:
            key = f"features.{name}.{camera}"
            if key in obs:
                seen[name, camera] = [obs[k].float() for k in (key, f"{key}.summary") if k in obs]
            else:
                asked.setdefault(name, []).append(camera)
        for name, cameras in asked.items():
            batch = torch.cat([obs[IMAGE + camera] for camera in cameras])
            frames = (len(batch), batch.shape[1] if batch.ndim == 5 else 1)
            results = self[name](image=batch.flatten(0, -4))
            results = (
                (results[0].movedim(1, -1), results[1])
                if isinstance(results, tuple)
                else (results,)
            )
            shares = [result.unflatten(0, frames).chunk(len(cameras)) for result in results]
            seen |= zip(
                [(name, camera) for camera in cameras], zip(*shares, strict=True), strict=True
            )
        return seen

    def table(self, cfg) -> str:
        """Per component its parameters, and the MiB that they take in training, all of it float32."""
        rows = {}
        for name, part in self.items():
            count = sum(p.numel() for p in part.parameters())
            trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
            optim = {**vars(cfg.train.optim), **cfg.model.component_optims.get(name, {})}
            # Every optimizer keeps two tensors per parameter; of schedule-free's, one is the average.
            averaged = bool(cfg.train.ema) and optim["type"] != "schedule_free_radam"
            rows[name] = (
                count,
                trained,
                count - trained,
                count,
                trained,
                2 * trained,
                averaged * trained,
            )
        rows["total"] = [sum(column) for column in zip(*rows.values(), strict=True)]
        lines = [f"{'component':<20}{'parameters':>15}{'trainable':>15}{'frozen':>15}"]
        lines[0] += f"{'weights':>11}{'gradients':>11}{'optimizer':>11}{'EMA':>11}{'MiB':>11}"
        for name, row in rows.items():
            sizes = [4 * n / 2**20 for n in (*row[3:], sum(row[3:]))]
            lines.append(
                f"{name:<20}"
                + "".join([*(f"{n:>15,}" for n in row[:3]), *(f"{n:>11,.1f}" for n in sizes)])
            )
        lines[-1:-1] = [f"{name:<20}same as {owner}" for name, owner in self.aliases.items()]
        lines.append(
            "MiB of weights and what training adds; not estimated: activations, which come on top"
        )
        return "\n".join(lines)


def build_parts(model, sources: dict, facts: dict, cameras, load_dir: Path | None = None) -> Parts:
    """Every listed component, its weights as component_build_args and load_dir say.

    model: the config's section; sources: component -> its Yaml; facts: of the dataset. A component called
    `<camera>_backbone` (`_hand_extractor`, `_da3`) of a camera that the dataset lacks is left out with a notice. What
    has nothing to learn is frozen. A block with load_weights() reads published files, of `weights` or of `init`, in its
    own way; one that nothing is loaded into starts random, with a notice.
    """
    groups = {}  # the component that names a shared module -> those that share it
    for name in sources:
        of_camera = re.fullmatch(r"(.+)_(backbone|hand_extractor|da3)", name)
        if of_camera and of_camera[1] not in cameras:
            print(f"notice: {name} is left out, data.cameras has no '{of_camera[1]}'")
            continue
        groups.setdefault(model.component_build_args.get(name, Part()).same_as or name, []).append(
            name
        )
    owners = {name if name in group else group[0]: name for name, group in groups.items()}
    aliases = {
        name: owner for owner, shared in owners.items() for name in groups[shared] if name != owner
    }
    args = {
        owner: model.component_build_args.get(shared, Part()) for owner, shared in owners.items()
    }
    for camera in cameras:
        own = f"{camera}_backbone"
        if not {"backbone", own, "state_resnet34_encoder"} & {*owners, *aliases}:
            raise ConfigError(
                f"model.component_config_paths: camera '{camera}' has neither '{own}' nor 'backbone'"
            )
    if "da3" in owners and not cameras:
        raise ConfigError(
            "model.component_config_paths: 'da3' is listed, but data.cameras names no camera to look at"
        )
    modules = {name: build(sources[name], facts) for name in owners}
    learning = [
        name
        for name, module in modules.items()
        if any(p.requires_grad for p in module.parameters())
    ]
    frozen = [name for name in modules if args[name].freeze or name not in learning]
    for name in [name for name in frozen if name in model.component_optims]:
        raise ConfigError(
            f"model.component_optims.{name}: '{name}' is frozen: it has no optimizer of its own"
        )
    files, whole = {}, []
    for name, module in modules.items():
        file, holds_all = initialise(module, name, args[name].init, load_dir)
        files |= {name: file} if file else {}
        whole += [name] if holds_all else []
    if load_dir and not any(file.parent == load_dir for file in files.values()):
        raise ConfigError(
            f"train.load_dir: {load_dir} holds no file for any of {', '.join(modules)}"
        )
    for name, file in files.items():
        print(f"{name}: weights from {file}")
    parts = Parts(modules, frozen, aliases, {name: files[name] for name in frozen if name in whole})
    parts.loaded = set(files)
    return parts


def initialise(
    module: nn.Module, name: str, init, load_dir: Path | None
) -> tuple[Path | None, bool]:
    """Weights of one component: the file they are from, if there is one, and whether it holds all of the component."""
    own = {
        prefix: inner for prefix, inner in module.named_modules() if hasattr(inner, "load_weights")
    }
    blocks, keys = [*own.values()], module.state_dict().keys()
    saved = load_dir and load_dir / f"{name}.safetensors"
    if init == "scratch":
        named = []
    elif init and len(own) == 1 and not keys & read_tensors(init).keys():
        blocks[0].weights = str(init)  # the block's kind of file, moved
        named = blocks
    elif init or (saved and saved.is_file()):
        return load_component(module, init or saved, name), True
    else:
        named = [inner for inner in blocks if getattr(inner, "weights", None)]
    for inner in [inner for inner in blocks if inner not in named]:
        usual = getattr(inner, "weights", None) or getattr(inner, "published", None)
        print(
            f"NOTICE: {name} starts with RANDOM weights"
            + (f", not those of {usual}" if usual else "")
        )
    files = [inner.load_weights() for inner in named]
    whole = len(files) == len(own) == 1 and all(
        key.startswith(f"{next(iter(own))}.") for key in keys
    )
    return (files[-1] if files else None), whole


def load_component(module: nn.Module, file: Path, name: str) -> Path:
    """Weights of one component from a safetensors file, exactly; the file. Raises UserError that lists what differs."""
    tensors, own = (
        read_tensors(file),
        {key: value.shape for key, value in module.state_dict().items()},
    )
    require(own, tensors, f"{file}: not the weights of component '{name}' as configured")
    module.load_state_dict(tensors)
    return file
