"""Depth Anything 3's image backbone (Lin et al. 2025, arXiv:2511.10647), our own code.

It is DINOv2's ViT (Oquab et al. 2023, arXiv:2304.07193) without registers, with the authors' key
names. From the block `alt_start` on, a camera token replaces the class token, queries and keys get
a norm per head, and rope rotates them: by row and column in even blocks; in odd ones it only tells
patches from the class token (the paper attends to several views there; a sample here is one view).
"""

import math
import re
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.blocks.vision import PatchBackbone
from common.blocks.weights import locate, read_sizes, read_tensors, require, shapes_of
from common.build import Index, block

PATCH = 14
NON_COMMERCIAL = "CC BY-NC 4.0: no commercial use"
LICENCES = {
    "depth-anything/DA3-LARGE-1.1": NON_COMMERCIAL,
    "depth-anything/DA3-LARGE": NON_COMMERCIAL,
    "depth-anything/DA3-SMALL": "Apache-2.0",
    "depth-anything/DA3-BASE": "Apache-2.0",
    "depth-anything/DA3METRIC-LARGE": "Apache-2.0",
    "depth-anything/DA3MONO-LARGE": "Apache-2.0",
}
UNKNOWN = "licence: see their source"
ONE_VIEW = {"embed_dim": 1024, "depth": 24, "alt_start": -1}  # without camera token and rope
PRESETS = {  # name -> published weights, sizes
    "small": ("depth-anything/DA3-SMALL", {"embed_dim": 384, "depth": 12, "alt_start": 4}),
    "base": ("depth-anything/DA3-BASE", {"embed_dim": 768, "depth": 12, "alt_start": 4}),
    "large": ("depth-anything/DA3-LARGE-1.1", {"embed_dim": 1024, "depth": 24, "alt_start": 8}),
    "metric_large": ("depth-anything/DA3METRIC-LARGE", ONE_VIEW),
    "mono_large": ("depth-anything/DA3MONO-LARGE", ONE_VIEW),
}
PREFIX = "model.backbone.pretrained."
HEADS = ("model.head.", "model.cam_enc.", "model.cam_dec.")  # depth and rays, poses in and out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rope of x (..., N, d); cos, sin (N, 2, d / 4) are the angles of row and column.

    Each half of the channels is rotated by one of them, its channel i paired with i + d / 4.
    """
    a, b = x.unflatten(-1, (2, 2, -1)).unbind(-2)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -2).flatten(-3)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, has_rope: bool):
        super().__init__()
        self.heads = heads
        self.has_rope = has_rope
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        if has_rope:
            self.q_norm = nn.LayerNorm(dim // heads, eps=1e-5)
            self.k_norm = nn.LayerNorm(dim // heads, eps=1e-5)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.has_rope:  # float32, like cos and sin, until both are rotated
            query = rotate(self.q_norm(query), cos, sin).to(value.dtype)
            key = rotate(self.k_norm(key), cos, sin).to(value.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * x


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, has_rope: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, has_rope)
        self.ls1 = LayerScale(dim)
        self.ls2 = LayerScale(dim)
        layers = {"fc1": nn.Linear(dim, 4 * dim), "act": nn.GELU(), "fc2": nn.Linear(4 * dim, dim)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), cos, sin))
        return x + self.ls2(self.mlp(self.norm2(x)))


@block("da3")
class DepthAnything3(PatchBackbone):
    """Depth Anything 3: features (B, len(layers), h', w', C) with one patch per 14 pixels.

    Pictures are uint8, or floats in [0, 1]. Sides are resized to the nearest multiple of 14, ties
    up. The block is frozen by design: no gradient, always in eval mode. Sizes (embed_dim, depth,
    alt_start, table_side) go with model: null; those that are missing are read from the weights.

    Args:
        layers: numbers of the blocks whose outputs are returned, after the final norm and in this
            order; negative ones count from the end. Blocks after the last one are dropped.
        model: small (C = 384), base (768), large, metric_large or mono_large (1024); null: sizes.
        weights: a safetensors file, a folder or a Hub id; null: random. DA3-LARGE-1.1 and DA3-LARGE
            of depth-anything are CC BY-NC 4.0, not for commercial use; DA3-SMALL, DA3-BASE,
            DA3METRIC-LARGE and DA3MONO-LARGE are Apache-2.0.
        normalize: true applies ImageNet's mean and deviation, as the weights expect; false is for
            policies that were trained without.
        embed_dim: width C of the tokens.
        depth: number of blocks in the weights.
        num_heads: attention heads; null: one per 64 channels.
        alt_start: first block with camera token and rope; -1: none.
        table_side: side of the position table; 37 without weights.
    """

    def __init__(
        self,
        layers: list[Index],
        model: str | None = None,
        weights: str | None = None,
        normalize: bool = True,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        alt_start: Index | None = None,
        table_side: int | None = None,
    ):
        super().__init__()
        given = {
            "embed_dim": embed_dim,
            "depth": depth,
            "alt_start": alt_start,
            "table_side": table_side,
        }
        given = {name: value for name, value in given.items() if value is not None}
        known = ", ".join(PRESETS)
        if model is not None:
            if model not in PRESETS:
                raise ValueError(f"model: no '{model}'; known: {known}, or null and sizes")
            if given or num_heads:
                raise ValueError(f"sizes go with model: null; '{model}' has its own")
            given = PRESETS[model][1]
        needed = {"embed_dim", "depth"}
        self.sizes = {}  # arguments that the weights give
        if weights and not needed <= given.keys():
            self.sizes = read_sizes(
                weights,
                LICENCES.get(weights, UNKNOWN),
                lambda shapes: sizes_of(without_heads(shapes)),
                f"model ({known}), or embed_dim and depth",
            )
        sizes = {"alt_start": -1, "table_side": 37, **self.sizes, **given}
        if not needed <= sizes.keys():
            raise ValueError(f"give model ({known}), weights, or embed_dim and depth")
        names = [model] if model else presets(sizes)
        self.published = PRESETS[names[0]][0] if names else ""
        self.weights = weights or ""
        self.normalize = normalize

        dim = sizes["embed_dim"]
        depth = sizes["depth"]
        num_heads = num_heads or max(1, dim // 64)
        if dim % (4 * num_heads):
            raise ValueError(
                f"embed_dim {dim} is not {num_heads} heads of a multiple of 4 channels"
            )
        if not layers or not all(-depth <= layer < depth for layer in layers):
            raise ValueError(f"layers: expected some of {-depth} to {depth - 1}, found {layers}")
        self.layers = [layer % depth for layer in layers]
        self.alt_start = sizes["alt_start"] if sizes["alt_start"] >= 0 else depth
        self.side = sizes["table_side"]
        self.half_pairs = dim // num_heads // 4
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim).normal_(std=0.02))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.side**2, dim).normal_(std=0.02))
        if self.alt_start < depth:
            self.camera_token = nn.Parameter(torch.empty(1, 2, dim).normal_(std=0.02))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, PATCH, PATCH)})
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, i >= self.alt_start) for i in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self._file_shapes = shapes_of(self.state_dict())
        self.blocks = self.blocks[: max(self.layers) + 1]
        for name, value in (("mean", [0.485, 0.456, 0.406]), ("std", [0.229, 0.224, 0.225])):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def load_weights(self) -> Path:
        """Reads `weights`, all tensors of the backbone, and returns the file.

        Tensors are named `model.backbone.pretrained.*`, as in the published files, or have no
        prefix; heads are ignored. Raises UserError that lists what differs.
        """
        licence = LICENCES.get(self.weights, LICENCES.get(self.published, UNKNOWN))
        source = f"weights: {self.weights}, {licence}"
        file = locate(self.weights, licence)
        tensors = without_heads(read_tensors(file))
        held = describe(shapes_of(tensors))
        title = f"{file} ({source}): not the weights of this da3; the file has {held}"
        require(self._file_shapes, tensors, title)
        self.load_state_dict({name: tensors[name] for name in self.state_dict()})
        if licence == NON_COMMERCIAL:
            print(f"notice: {source}")
        return file

    def train(self, mode: bool = True) -> "DepthAnything3":
        return super().train(False)

    def grid(self, h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
        """For h x w patches: positions (1, 1 + h w, C); cos and sin of rope.

        cos and sin are (2, 1 + h w, 2, C / heads / 4): those of even blocks, then of odd ones.
        """
        side = self.side
        device = self.pos_embed.device
        table = self.pos_embed.float()
        if (h, w) != (side, side):
            square = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
            # Factors, as in DINOv2: resizing to (h, w) would sample at other places.
            scale = ((h + 0.1) / side, (w + 0.1) / side)
            patches = F.interpolate(square, scale_factor=scale, mode="bicubic")
            table = torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], 1)
        rows = torch.arange(1.0, h + 1, device=device)
        columns = torch.arange(1.0, w + 1, device=device)
        places = torch.cartesian_prod(rows, columns)
        places = F.pad(places, (0, 0, 1, 0))  # the class token is at (0, 0)
        frequencies = 100 ** -(torch.arange(self.half_pairs, device=device) / self.half_pairs)
        # Rows and columns in even blocks; in odd ones 1 for every patch.
        places = torch.stack([places, places.clamp(max=1)])
        angles = places[..., None] * frequencies
        return table.to(self.pos_embed.dtype), angles.cos(), angles.sin()

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        grid = [max(1, (side + PATCH // 2) // PATCH) for side in image.shape[2:]]
        x = self.resized(image, grid, PATCH)
        if self.normalize:
            x = (x - self.mean) / self.std
        x = self.patch_embed["proj"](x.to(self.pos_embed.dtype)).flatten(2).transpose(1, 2)
        positions, cos, sin = self.grid(*grid)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + positions
        features = {}
        for i, layer in enumerate(self.blocks[: max(self.layers) + 1]):
            if i == self.alt_start:
                x = torch.cat([self.camera_token[:, :1].expand(len(x), -1, -1), x[:, 1:]], 1)
            x = layer(x, cos[i % 2], sin[i % 2])
            if i in self.layers:
                features[i] = self.norm(x[:, 1:]).unflatten(1, grid)
        return torch.stack([features[i] for i in self.layers], 1)


def without_heads(tensors: dict) -> dict:
    """The backbone's entries of a file, by their names without prefix."""
    return {
        name.removeprefix(PREFIX): value
        for name, value in tensors.items()
        if not name.startswith(HEADS)
    }


def sizes_of(shapes: dict[str, tuple]) -> dict | None:
    """Arguments of DepthAnything3 for a backbone with these shapes; None for other files."""
    table = shapes.get("pos_embed", ())
    names = [name.split(".") for name in shapes if re.match(r"blocks\.\d+\.", name)]
    if len(table) != 3 or not names:
        return None
    return {
        "embed_dim": table[2],
        "depth": 1 + max(int(name[1]) for name in names),
        "alt_start": min((int(name[1]) for name in names if "q_norm" in name), default=-1),
        "table_side": math.isqrt(table[1] - 1),
    }


def presets(sizes: dict) -> list[str]:
    """Names of the published models with these sizes."""
    return [name for name, (_, preset) in PRESETS.items() if preset.items() <= sizes.items()]


def describe(shapes: dict[str, tuple]) -> str:
    """The sizes of the backbone that a file with these shapes holds, for a message."""
    sizes = sizes_of(shapes)
    if sizes is None:
        return "none"
    text = ", ".join(f"{name} {value}" for name, value in sizes.items())
    names = " or ".join(presets(sizes))
    return f"{text} (model: {names})" if names else text
