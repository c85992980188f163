"""C-RADIOv3 (NVIDIA): pictures in [0, 1] -> features (B, C, h / 16, w / 16), summary (B, S); 1024 and 3072 at size L.

Published weights: nvidia/C-RADIOv3-L (and -B, -H, -g), or timm/naflexvit_large_patch16_radio_v3.c_radio, which holds
the same. Their licence is the NVIDIA Open Model License (commercial use allowed).
"""

import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from common.blocks.weights import locate, read_sizes, read_tensors, require
from common.build import block
from common.config import UserError

LICENCE = "NVIDIA Open Model License"
SIZES = {"B": "base", "L": "large", "H": "huge", "g": "giant"}
HEADS = {1280: 16}  # of size H; the others have one per 64 channels
PATCH = 16
# Names in NVIDIA's files
BACKBONE = "radio_model.model."
EMBEDDER, TABLE = (
    f"{BACKBONE}patch_generator.embedder.weight",
    f"{BACKBONE}patch_generator.pos_embed",
)
PREFIX = f"{BACKBONE}patch_generator.cls_token.token"
LEFTOVER = f"{BACKBONE}reg_token"  # nothing uses it
NORM = "radio_model.input_conditioner.norm_"
BUFFERS = {f"{NORM}mean": "mean", f"{NORM}std": "std", "radio_model.summary_idxs": "summary_idxs"}


@block("RadioV3")
@block("radiov3")
class RadioV3(nn.Module):
    """timm's NaFlexVit as C-RADIOv3 uses it. Sides that are no multiple of 16 are resized to the nearest, ties to even.

    weights: a safetensors file, a folder or a Hub id; null: random. size: L, B, H or g; null: that of the weights (L
    where there are none). embed_dim, depth, table (side of the position table) and prefix (learned tokens in front)
    override the size, num_heads what is usual for embed_dim. channels: [C, S], checked. tune: all, or how many of the
    last blocks learn; the rest gets no gradient. gradient_checkpointing: compute the blocks again in the backward pass
    rather than keep their insides. align_corners: how the table is resized. NVIDIA's torch hub code says false for
    every size; its Hub repositories of B and H still say true.
    """

    def __init__(
        self,
        weights=None,
        size=None,
        channels=None,
        tune="all",
        gradient_checkpointing=False,
        align_corners=False,
        embed_dim=None,
        depth=None,
        num_heads=None,
        table=None,
        prefix=None,
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
        given = {key: value for key, value in given.items() if value is not None}
        self.sizes = {}  # arguments that the weights give
        if weights and size is None and not {"embed_dim", "depth", "table"} <= given.keys():
            self.sizes = read_sizes(
                weights, LICENCE, sizes_of, "size, or embed_dim, depth and table"
            )
        sizes = {"size": "L", **self.sizes, **given}
        size, dim, depth, table, prefix = (
            sizes.get(key) for key in ("size", "embed_dim", "depth", "table", "prefix")
        )
        if size not in SIZES:
            raise ValueError(f"size: {size} is none of {', '.join(SIZES)}")
        options = {
            "embed_dim": dim,
            "depth": depth,
            "pos_embed_grid_size": table and (table, table),
        }
        options["num_heads"] = num_heads or (dim and HEADS.get(dim, max(1, dim // 64)))
        options["reg_tokens"] = prefix and prefix - 1
        self.model = timm.create_model(
            f"naflexvit_{SIZES[size]}_patch16_radio_v3", num_classes=0, **options
        )
        self.weights, self.align_corners, self.recompute = (
            weights,
            align_corners,
            gradient_checkpointing,
        )
        self.published = f"nvidia/C-RADIOv3-{size}"
        dim, depth, self.prefix = (
            self.model.embed_dim,
            len(self.model.blocks),
            self.model.num_prefix_tokens,
        )
        possible = [[dim, n * dim] for n in range(1, self.prefix + 1)]
        if channels is not None and list(channels) not in possible:
            raise ValueError(f"channels: {channels} here, but this size gives {[dim, 3 * dim]}")
        self.fixed = 0  # stages without gradient; the first is the embedding
        if tune != "all":
            if not isinstance(tune, int) or isinstance(tune, bool) or not 1 <= tune <= depth:
                raise ValueError(
                    f"tune: {tune} is neither all nor a number of blocks from 1 to {depth}"
                )
            self.model.requires_grad_(False)
            self.model.blocks[-tune:].requires_grad_(True)
            self.fixed = 1 + depth - tune
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(self.model.pretrained_cfg[name]).view(3, 1, 1))
        self.register_buffer("summary_idxs", torch.arange(channels[1] // dim if channels else 3))
        self._tables, self._tables_of, self._told = {}, None, False

    def load_weights(self) -> Path:
        """Reads `weights`, in NVIDIA's layout or timm's; the file. Raises UserError that lists what differs."""
        file = locate(self.weights, LICENCE)
        tensors, expected = (
            read_tensors(file),
            {name: value.shape for name, value in self.model.state_dict().items()},
        )
        held = described({name: value.shape for name, value in tensors.items()})
        what = f"{file}: not the weights of RadioV3 as configured ({described(expected)}); the file has {held}"
        _, side, _, dim = expected["embeds.pos_embed"]
        buffers, original = {}, any(name.startswith("radio_model.") for name in tensors)
        if original:  # other names than radio_model.* are the teachers' heads
            tensors = {
                name: x
                for name, x in tensors.items()
                if name.startswith("radio_model.") and name != LEFTOVER
            }
            tensors = {name.replace(".gamma", ".grandma"): x for name, x in tensors.items()}
            buffers = {name: getattr(self, own) for name, own in BUFFERS.items() if name in tensors}
            expected = {
                name.replace(".gamma", ".grandma"): shape for name, shape in expected.items()
            }
            expected = {
                f"{BACKBONE}{name}": shape
                for name, shape in expected.items()
                if name.startswith("blocks.")
            }
            expected |= {
                EMBEDDER: (dim, 3 * PATCH**2),
                TABLE: (1, side**2, dim),
                PREFIX: (self.prefix, dim),
            }
            expected |= {name: buffer.shape for name, buffer in buffers.items()}
        require(expected, tensors, what)
        if original:
            for name, buffer in buffers.items():
                buffer.copy_(tensors.pop(name))
            if not set(self.summary_idxs.tolist()) <= set(range(self.prefix)):
                raise UserError(
                    f"{file}: summary_idxs {self.summary_idxs.tolist()} of {self.prefix} learned tokens"
                )
            patches, table, prefix = (tensors.pop(name) for name in (EMBEDDER, TABLE, PREFIX))
            tensors = {
                name.removeprefix(BACKBONE).replace(".grandma", ".gamma"): x
                for name, x in tensors.items()
            }
            tensors["embeds.proj.weight"] = (
                patches.unflatten(1, (3, PATCH, PATCH)).permute(0, 2, 3, 1).flatten(1)
            )
            tensors["embeds.proj.bias"] = patches.new_zeros(dim)
            tensors["embeds.pos_embed"] = table.unflatten(1, (side, side))
            tensors["embeds.cls_token"], tensors["embeds.reg_token"] = (
                prefix[None, :1],
                prefix[None, 1:],
            )
        self.model.load_state_dict(tensors)
        return file

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, 3, H, W), uint8 or float in [0, 1] -> features (B, C, h, w), summary (B, S); h = H / 16."""
        x = self._sized(image)
        h, w = x.shape[2] // PATCH, x.shape[3] // PATCH
        stages = [self._embed, *self.model.blocks]
        with torch.no_grad():
            for stage in stages[: self.fixed]:
                x = stage(x)
        for stage in stages[self.fixed :]:
            again = self.recompute and torch.is_grad_enabled()
            x = checkpoint(stage, x, use_reentrant=False) if again else stage(x)
        features = x[:, self.prefix :].transpose(1, 2).unflatten(2, (h, w))
        return features, x.index_select(1, self.summary_idxs).flatten(1)

    def _sized(self, image):
        """Float pictures in [0, 1] whose sides are multiples of 16."""
        if (
            image.ndim != 4
            or image.shape[1] != 3
            or not (image.dtype == torch.uint8 or image.is_floating_point())
        ):
            raise ValueError(
                f"expected pictures (B, 3, H, W), uint8 or float; found {tuple(image.shape)} {image.dtype}"
            )
        image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
        old = tuple(image.shape[2:])
        new = tuple(max(PATCH, round(n / PATCH) * PATCH) for n in old)
        if new == old:
            return image
        if not self._told and not torch.compiler.is_compiling():
            self._told = True
            print(
                f"notice: RadioV3 resizes pictures of {old} to {new}, the nearest multiples of {PATCH}"
            )
        return F.interpolate(image, new, mode="bilinear", align_corners=False)

    def _embed(self, image):
        """(B, 3, H, W) -> (B, prefix + h w, C): learned tokens, then patches row by row with their positions."""
        embeds, (H, W) = self.model.embeds, image.shape[2:]
        x = ((image - self.mean) / self.std).to(embeds.proj.weight.dtype)
        x = x.unflatten(3, (W // PATCH, PATCH)).unflatten(2, (H // PATCH, PATCH))
        x = embeds.proj(x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
        x = x + self._positions(H // PATCH, W // PATCH).to(embeds.cls_token.dtype)
        prefix = torch.cat([embeds.cls_token, embeds.reg_token], 1)
        return torch.cat([prefix.expand(len(x), -1, -1), x], 1)

    def _positions(self, h, w):
        """(1, h w, C) in float32: the table resized to a square of the longer side, its top left h x w.

        Kept per grid size until the table changes; made afresh where that cannot be told, and in compiled code.
        """
        table = self.model.embeds.pos_embed
        if table.requires_grad or torch.compiler.is_compiling() or table.is_inference():
            return self._resized(table, h, w)
        state = table.data_ptr(), table._version, table.device, table.dtype
        if state != self._tables_of:
            self._tables, self._tables_of = {}, state
        if (h, w) not in self._tables:
            with torch.inference_mode(False), torch.no_grad():
                self._tables[h, w] = self._resized(table, h, w).contiguous()
        return self._tables[h, w]

    def _resized(self, table, h, w):
        grid, side = table.permute(0, 3, 1, 2).float(), max(h, w)
        if (h, w) != tuple(grid.shape[2:]):
            grid = F.interpolate(
                grid, (side, side), mode="bilinear", align_corners=self.align_corners
            )
        return grid[:, :, :h, :w].flatten(2).transpose(1, 2)


def sizes_of(shapes: dict[str, tuple]) -> dict | None:
    """RadioV3's arguments for the model that a file in either layout holds; None if it holds none."""
    table, tokens = (
        shapes.get(TABLE, shapes.get("embeds.pos_embed", ())),
        shapes.get("embeds.reg_token", (1, 7)),
    )
    blocks = [
        int(found[2])
        for found in (re.match(rf"({BACKBONE})?blocks\.(\d+)\.", name) for name in shapes)
        if found
    ]
    if len(table) not in (3, 4) or not blocks:
        return None
    scaled = any(
        "blocks.0.ls1." in name for name in shapes
    )  # sizes B and L have LayerScale, H and g don't
    sizes = {"size": "L" if scaled else "H", "embed_dim": table[-1], "depth": 1 + max(blocks)}
    side = table[1] if len(table) == 4 else math.isqrt(table[1])
    return sizes | {"table": side, "prefix": shapes.get(PREFIX, (1 + tokens[1],))[0]}


def described(shapes) -> str:
    """The sizes of what a file holds, for a message."""
    if (sizes := sizes_of(shapes)) is None:
        return "none of its names"
    scale = "LayerScale" if sizes.pop("size") == "L" else "no LayerScale"
    return ", ".join([*(f"{key} {value}" for key, value in sizes.items()), scale])
