"""C-RADIOv3 (NVIDIA), an image backbone: timm's NaFlexVit with published weights of either layout.

Published weights: nvidia/C-RADIOv3-L (and -B, -H, -g), or the same ones in timm's layout,
timm/naflexvit_large_patch16_radio_v3.c_radio. Their licence is the NVIDIA Open Model License
(commercial use allowed).
"""

import math
import re
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from common.blocks.vision import PatchBackbone
from common.blocks.weights import locate, read_sizes, read_tensors, require
from common.build import block
from common.config import UserError

LICENCE = "NVIDIA Open Model License"
SIZES = {"B": "base", "L": "large", "H": "huge", "g": "giant"}
HEADS = {1280: 16}  # of size H; the others have one per 64 channels
PATCH = 16

# Names in NVIDIA's files
MODEL = "radio_model."
BACKBONE = f"{MODEL}model."
EMBEDDER = f"{BACKBONE}patch_generator.embedder.weight"
TABLE = f"{BACKBONE}patch_generator.pos_embed"
PREFIX = f"{BACKBONE}patch_generator.cls_token.token"
UNUSED = f"{BACKBONE}reg_token"
BUFFERS = {
    f"{MODEL}input_conditioner.norm_mean": "mean",
    f"{MODEL}input_conditioner.norm_std": "std",
    f"{MODEL}summary_idxs": "summary_idxs",
}


@block("RadioV3")
@block("radiov3")
class RadioV3(PatchBackbone):
    """C-RADIOv3: features (B, C, h / 16, w / 16) and summary (B, S); 1024 and 3072 at size L.

    Pictures are uint8, or floats in [0, 1]. Sides are resized to the nearest multiple of 16, ties
    to an even multiple. embed_dim, depth, table and prefix override those of the size.

    Args:
        weights: a safetensors file, a folder or a Hub id; null: random.
        size: B, L, H or g; null: that of the weights, or L without weights.
        channels: expected [C, S], which are checked; S also gives the number of summary tokens.
        tune: all, or how many of the last blocks learn; the others get no gradient.
        gradient_checkpointing: true computes the blocks again in the backward pass, which saves
            memory.
        embed_dim: width C of the tokens.
        depth: number of blocks.
        num_heads: attention heads; null: the usual number for embed_dim.
        table: side of the position table.
        prefix: number of learned tokens before those of the patches.
    """

    def __init__(
        self,
        weights: str | None = None,
        size: str | None = None,
        channels: list[int] | None = None,
        tune: int | str = "all",
        gradient_checkpointing: bool = False,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        table: int | None = None,
        prefix: int | None = None,
    ):
        super().__init__()
        import timm  # takes two seconds

        given = {
            "size": size,
            "embed_dim": embed_dim,
            "depth": depth,
            "table": table,
            "prefix": prefix,
        }
        given = {name: value for name, value in given.items() if value is not None}
        self.weights = weights
        self.sizes = {}  # arguments that the weights give
        if weights and size is None and not {"embed_dim", "depth", "table"} <= given.keys():
            otherwise = "size, or embed_dim, depth and table"
            self.sizes = read_sizes(weights, LICENCE, sizes_of, otherwise)
        sizes = {"size": "L", **self.sizes, **given}
        size = sizes["size"]
        if size not in SIZES:
            raise ValueError(f"size: {size} is none of {', '.join(SIZES)}")
        self.published = f"nvidia/C-RADIOv3-{size}"

        options = {"num_heads": num_heads}  # timm drops None
        if "embed_dim" in sizes:
            dim = sizes["embed_dim"]
            options["embed_dim"] = dim
            options["num_heads"] = num_heads or HEADS.get(dim, max(1, dim // 64))
        if "table" in sizes:
            options["pos_embed_grid_size"] = (sizes["table"], sizes["table"])
        if "prefix" in sizes:
            options["reg_tokens"] = sizes["prefix"] - 1
        self.model = timm.create_model(
            f"naflexvit_{SIZES[size]}_patch16_radio_v3",
            num_classes=0,
            depth=sizes.get("depth"),
            **options,
        )
        dim = self.model.embed_dim
        depth = len(self.model.blocks)
        self.prefix = self.model.num_prefix_tokens
        possible = [[dim, count * dim] for count in range(1, self.prefix + 1)]
        if channels is not None and list(channels) not in possible:
            raise ValueError(f"channels: {channels} here, but this size gives {[dim, 3 * dim]}")
        summary_tokens = channels[1] // dim if channels else 3

        self.recompute = gradient_checkpointing
        self.frozen_stages = 0  # the first is the embedding
        if tune != "all":
            is_number = isinstance(tune, int) and not isinstance(tune, bool)
            if not is_number or not 1 <= tune <= depth:
                raise ValueError(
                    f"tune: {tune} is neither all nor a number of blocks from 1 to {depth}"
                )
            self.model.requires_grad_(False)
            self.model.blocks[-tune:].requires_grad_(True)
            self.frozen_stages = 1 + depth - tune
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(self.model.pretrained_cfg[name]).view(3, 1, 1))
        self.register_buffer("summary_idxs", torch.arange(summary_tokens))

    def load_weights(self) -> Path:
        """Reads `weights`, in NVIDIA's layout or timm's, and returns the file.

        Raises UserError that lists what differs.
        """
        file = locate(self.weights, LICENCE)
        tensors = read_tensors(file)
        expected = {name: value.shape for name, value in self.model.state_dict().items()}
        held = {name: value.shape for name, value in tensors.items()}
        title = (
            f"{file}: not the weights of RadioV3 as configured ({describe(expected)});"
            f" the file has {describe(held)}"
        )
        if any(name.startswith(MODEL) for name in tensors):
            tensors = self._from_nvidia(tensors, expected, title, file)
        else:
            require(expected, tensors, title)
        self.model.load_state_dict(tensors)
        return file

    def _from_nvidia(self, tensors, expected, title, file):
        """The model's tensors of a file in NVIDIA's layout, checked; the buffers are copied."""
        # Names outside of `radio_model.` are the teachers' heads.
        tensors = {
            name.replace(".gamma", ".grandma"): x
            for name, x in tensors.items()
            if name.startswith(MODEL) and name != UNUSED
        }
        buffers = {name: getattr(self, own) for name, own in BUFFERS.items() if name in tensors}
        _, side, _, dim = expected["embeds.pos_embed"]
        required = {
            BACKBONE + name.replace(".gamma", ".grandma"): shape
            for name, shape in expected.items()
            if name.startswith("blocks.")
        }
        required[EMBEDDER] = (dim, 3 * PATCH**2)
        required[TABLE] = (1, side**2, dim)
        required[PREFIX] = (self.prefix, dim)
        required |= {name: buffer.shape for name, buffer in buffers.items()}
        require(required, tensors, title)
        for name, buffer in buffers.items():
            buffer.copy_(tensors.pop(name))
        indices = self.summary_idxs.tolist()
        if not set(indices) <= set(range(self.prefix)):
            raise UserError(f"{file}: summary_idxs {indices} of {self.prefix} learned tokens")
        embedder = tensors.pop(EMBEDDER)
        table = tensors.pop(TABLE)
        prefix = tensors.pop(PREFIX)[None]
        blocks = {
            name.removeprefix(BACKBONE).replace(".grandma", ".gamma"): x
            for name, x in tensors.items()
        }
        return blocks | {
            "embeds.proj.weight": rearrange(embedder, "d (c p q) -> d (p q c)", c=3, p=PATCH),
            "embeds.proj.bias": embedder.new_zeros(dim),
            "embeds.pos_embed": table.unflatten(1, (side, side)),
            "embeds.cls_token": prefix[:, :1],
            "embeds.reg_token": prefix[:, 1:],
        }

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, 3, H, W) -> features (B, C, h, w), summary (B, S), where h = H / 16."""
        grid = [max(1, round(side / PATCH)) for side in image.shape[2:]]
        x = self.resized(image, grid, PATCH)
        stages = [self._embed, *self.model.blocks]
        with torch.no_grad():
            for stage in stages[: self.frozen_stages]:
                x = stage(x)
        recompute = self.recompute and torch.is_grad_enabled()
        for stage in stages[self.frozen_stages :]:
            x = checkpoint(stage, x, use_reentrant=False) if recompute else stage(x)
        features = x[:, self.prefix :].transpose(1, 2).unflatten(2, grid)
        summary = x.index_select(1, self.summary_idxs).flatten(1)
        return features, summary

    def _embed(self, image):
        """(B, 3, H, W) -> (B, prefix + h w, C): learned tokens, then the patches row by row."""
        embeds = self.model.embeds
        x = ((image - self.mean) / self.std).to(embeds.proj.weight.dtype)
        x = rearrange(x, "b c (h p) (w q) -> b h w (p q c)", p=PATCH, q=PATCH)
        positions = self._positions(*x.shape[1:3])
        x = embeds.proj(x.flatten(1, 2)) + positions.to(embeds.cls_token.dtype)
        prefix = torch.cat([embeds.cls_token, embeds.reg_token], 1)
        return torch.cat([prefix.expand(len(x), -1, -1), x], 1)

    def _positions(self, h, w):
        """(1, h w, C): the table resized to a square of the longer side, its top left h x w."""
        table = self.model.embeds.pos_embed.permute(0, 3, 1, 2).float()
        if (h, w) != tuple(table.shape[2:]):
            side = max(h, w)
            table = F.interpolate(table, (side, side), mode="bilinear", align_corners=False)
        return table[:, :, :h, :w].flatten(2).transpose(1, 2)


def sizes_of(shapes: dict[str, tuple]) -> dict | None:
    """Arguments of RadioV3 for a file with these shapes, in either layout; None for other files."""
    table = shapes.get(TABLE, shapes.get("embeds.pos_embed", ()))
    pattern = rf"(?:{BACKBONE})?blocks\.(\d+)\."
    numbers = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
    if len(table) not in (3, 4) or not numbers:
        return None
    # Sizes B and L have LayerScale, H and g don't.
    has_layer_scale = any("blocks.0.ls1." in name for name in shapes)
    registers = shapes.get("embeds.reg_token", (1, 7))[1]
    return {
        "size": "L" if has_layer_scale else "H",
        "embed_dim": table[-1],
        "depth": 1 + max(numbers),
        "table": table[1] if len(table) == 4 else math.isqrt(table[1]),
        "prefix": shapes.get(PREFIX, (1 + registers,))[0],
    }


def describe(shapes: dict[str, tuple]) -> str:
    """The sizes of the model that a file with these shapes holds, for a message."""
    sizes = sizes_of(shapes)
    if sizes is None:
        return "none of its names"
    scale = "LayerScale" if sizes.pop("size") == "L" else "no LayerScale"
    return ", ".join([*(f"{name} {value}" for name, value in sizes.items()), scale])
