"""The components that train.yaml lists: built, loaded, frozen one by one, and together the parts of one policy."""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from common.build import build
from common.config import ConfigError, Part, UserError


class Parts(nn.ModuleDict):
    """Components under their YAML names. Frozen ones stay in eval mode; an alias is a component that shares another."""

    def __init__(self, modules, frozen=(), aliases=None, sources=None):
        super().__init__(modules)
        self.frozen, self.aliases = set(frozen), dict(aliases or {})
        self.sources = dict(sources or {})  # frozen component -> the file that its weights come from
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

    def look(self, images: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Pictures by camera, (B, 3, h, w) or (B, F, 3, h, w) -> per camera a grid (B, h', w', C) and (B, 1, S).

        Cameras that share a backbone go through it in one call. Several frames are stacked along h'.
        """
        shared = {}
        for camera in images:
            own = f"{camera}_backbone"
            shared.setdefault("backbone" if "backbone" in self else self.aliases.get(own, own), []).append(camera)
        grids, summaries = {}, {}
        for name, cameras in shared.items():
            batch = torch.cat([images[camera] for camera in cameras])
            frames = (len(batch), batch.shape[1] if batch.ndim == 5 else 1)
            features, summary = self[name](image=batch.flatten(0, -4))
            features = features.unflatten(0, frames).permute(0, 1, 3, 4, 2).flatten(1, 2)
            summary = summary.unflatten(0, frames).mean(1, keepdim=True)
            grids |= zip(cameras, features.chunk(len(cameras)), strict=True)
            summaries |= zip(cameras, summary.chunk(len(cameras)), strict=True)
        return [grids[camera] for camera in images], [summaries[camera] for camera in images]


def build_parts(model, sources: dict, facts: dict, cameras, load_dir: Path | None = None) -> Parts:
    """Every listed component, its weights as component_build_args and load_dir say.

    model: the config's section; sources: component -> its Yaml; facts: of the dataset. A component called
    `<camera>_backbone` or `<camera>_hand_extractor` of a camera that the dataset lacks is left out with a notice.
    """
    groups = {}  # the component that names a shared module -> those that share it
    for name in sources:
        of_camera = re.fullmatch(r"(.+)_(backbone|hand_extractor)", name)
        if of_camera and of_camera[1] not in cameras:
            print(f"notice: {name} is left out, data.cameras has no '{of_camera[1]}'")
            continue
        groups.setdefault(model.component_build_args.get(name, Part()).same_as or name, []).append(name)
    owners = {name if name in group else group[0]: name for name, group in groups.items()}
    aliases = {name: owner for owner, shared in owners.items() for name in groups[shared] if name != owner}
    args = {owner: model.component_build_args.get(shared, Part()) for owner, shared in owners.items()}
    for camera in cameras:
        own = f"{camera}_backbone"
        if not {"backbone", own} & {*owners, *aliases}:
            raise ConfigError(f"model.component_config_paths: camera '{camera}' has neither '{own}' nor 'backbone'")
    modules = {name: build(sources[name], facts) for name in owners}
    frozen = [name for name in modules if args[name].freeze]
    files = {}
    for name, module in modules.items():
        init, own = args[name].init, [inner for inner in module.modules() if getattr(inner, "weights", None)]
        if init == "scratch":
            continue
        if init and own and not module.state_dict().keys() & read_tensors(init).keys():
            own[0].weights = str(init)  # the block's kind of file, moved
            files[name] = own[0].load_weights()
        elif init:
            files[name] = load_component(module, init, name)
        elif load_dir and (load_dir / f"{name}.safetensors").is_file():
            files[name] = load_component(module, load_dir / f"{name}.safetensors", name)
        else:
            for inner in own:
                files[name] = inner.load_weights()
    if load_dir and not any(file.parent == load_dir for file in files.values()):
        raise ConfigError(f"train.load_dir: {load_dir} holds no file for any of {', '.join(modules)}")
    for name, file in files.items():
        print(f"{name}: weights from {file}")
    return Parts(modules, frozen, aliases, {name: file for name, file in files.items() if name in frozen})


def load_component(module: nn.Module, file: Path, name: str) -> Path:
    """Weights of one component from a safetensors file, exactly; the file. Raises UserError that lists what differs."""
    tensors = read_tensors(file)
    own = module.state_dict()
    wrong = [f"missing {key}" for key in own if key not in tensors]
    wrong += [f"unexpected {key}" for key in tensors if key not in own]
    wrong += [
        f"{key} is {tuple(tensors[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape
    ]
    if wrong:
        shown = "\n    ".join(wrong[:12] + ([f"and {len(wrong) - 12} more"] if len(wrong) > 12 else []))
        raise UserError(f"{file}: not the weights of component '{name}' as configured:\n    {shown}")
    module.load_state_dict(tensors)
    return file


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; pickles are refused, nothing of them is read."""
    if not Path(file).is_file():
        raise UserError(f"{file}: no such file")
    if Path(file).suffix != ".safetensors":
        raise UserError(f"{file}: expected a .safetensors file; pickles (.pt, .pth, .bin) are not read")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file}: not a readable safetensors file ({e})") from e
