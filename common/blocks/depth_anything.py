"""Depth Anything 3's image backbone, features only (Lin et al. 2025, arXiv:2511.10647): our own code, public key names.

DINOv2's ViT (Oquab et al. 2023, arXiv:2304.07193) without registers. From the block `alt_start` on, a camera token
takes the class token's place, queries and keys get a norm per head, and rope turns them: by row and column in even
blocks; patches against class token only in odd ones (the paper's look at several views; a sample here is one view).
"""

import math
import re
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.blocks.weights import locate, read_sizes, read_tensors, require
from common.build import block

PATCH = 14
NON_COMMERCIAL, UNKNOWN = "CC BY-NC 4.0: no commercial use", "licence: see their source"
LICENCES = {
    "depth-anything/DA3-LARGE-1.1": NON_COMMERCIAL,
    "depth-anything/DA3-LARGE": NON_COMMERCIAL,
} | dict.fromkeys(
    [f"depth-anything/DA3{name}" for name in ("-SMALL", "-BASE", "METRIC-LARGE", "MONO-LARGE")],
    "Apache-2.0",
)
PRESETS = {  # name -> published weights, sizes (alt_start -1: no switch)
    "small": ("depth-anything/DA3-SMALL", {"embed_dim": 384, "depth": 12, "alt_start": 4}),
    "base": ("depth-anything/DA3-BASE", {"embed_dim": 768, "depth": 12, "alt_start": 4}),
    "large": ("depth-anything/DA3-LARGE-1.1", {"embed_dim": 1024, "depth": 24, "alt_start": 8}),
    "metric_large": (
        "depth-anything/DA3METRIC-LARGE",
        {"embed_dim": 1024, "depth": 24, "alt_start": -1},
    ),
    "mono_large": (
        "depth-anything/DA3MONO-LARGE",
        {"embed_dim": 1024, "depth": 24, "alt_start": -1},
    ),
}
PREFIX = "model.backbone.pretrained."
IGNORED = ("model.head.", "model.cam_enc.", "model.cam_dec.")  # depth and rays, poses in, poses out


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rope: x (..., N, d); cos, sin (N, 2, d / 4): each half of the channels, its channel i paired with i + d / 4."""
    a, b = x.unflatten(-1, (2, 2, -1)).unbind(-2)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -2).flatten(-3)


class Attention(nn.Module):
    def __init__(self, dim, heads, switched):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        if switched:
            self.q_norm, self.k_norm = (
                nn.LayerNorm(dim // heads, eps=1e-5),
                nn.LayerNorm(dim // heads, eps=1e-5),
            )

    def forward(self, x, angles):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if angles is not None:  # float32, like cos and sin, until both are turned
            query = turn(self.q_norm(query), *angles).to(value.dtype)
            key = turn(self.k_norm(key), *angles).to(value.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return self.gamma * x


class Block(nn.Module):
    def __init__(self, dim, heads, switched):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.ls1, self.ls2 = (
            Attention(dim, heads, switched),
            LayerScale(dim),
            LayerScale(dim),
        )
        layers = {"fc1": nn.Linear(dim, 4 * dim), "act": nn.GELU(), "fc2": nn.Linear(4 * dim, dim)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x, angles):
        x = x + self.ls1(self.attn(self.norm1(x), angles))
        return x + self.ls2(self.mlp(self.norm2(x)))


@block("da3")
class DepthAnything3(nn.Module):
    """image (B, 3, h, w), float in [0, 1] or uint8 -> features (B, len(layers), h', w', C) of one patch per 14 pixels.

    layers: the blocks (from 0; negatives count from the end) whose output, after the final norm and in this order, is
        returned. Those after the last one are dropped.
    model: small, base, large, metric_large or mono_large (C = 384, 768, 1024); or null, and sizes, where there are
        weights those of the file: embed_dim, depth, num_heads (null: one per 64 channels), alt_start (-1: no such
        switch) and table_side of the position table (37 where there are no weights).
    weights: a file, a folder or a Hub id. depth-anything/DA3-LARGE-1.1 and DA3-LARGE are CC BY-NC 4.0, not for
        commercial use; DA3-SMALL, DA3-BASE, DA3METRIC-LARGE and DA3MONO-LARGE are Apache-2.0. null: random.
    normalize: by ImageNet's mean and deviation, as the weights expect; false is for policies that were trained without.
    Sides are resized to the nearest multiple of 14, ties up. Frozen by design: no gradient, always in eval mode.
    """

    def __init__(
        self,
        layers,
        model=None,
        weights=None,
        normalize=True,
        embed_dim=None,
        depth=None,
        num_heads=None,
        alt_start=None,
        table_side=None,
    ):
        super().__init__()
        given = {
            "embed_dim": embed_dim,
            "depth": depth,
            "alt_start": alt_start,
            "table_side": table_side,
        }
        given = {key: value for key, value in given.items() if value is not None}
        known, enough = ", ".join(PRESETS), {"embed_dim", "depth"}
        if model is not None:
            if model not in PRESETS:
                raise ValueError(f"model: no '{model}'; known: {known}, or null and sizes")
            if given or num_heads:
                raise ValueError(f"sizes go with model: null; '{model}' has its own")
            given = PRESETS[model][1]
        self.sizes = {}  # arguments that the weights give
        if weights and not enough <= given.keys():
            licence, otherwise = (
                LICENCES.get(weights, UNKNOWN),
                f"model ({known}), or embed_dim and depth",
            )
            self.sizes = read_sizes(
                weights, licence, lambda shapes: sizes_of(backbone(shapes)), otherwise
            )
        sizes = {"alt_start": -1, "table_side": 37, **self.sizes, **given}
        if not enough <= sizes.keys():
            raise ValueError(f"give model ({known}), weights, or embed_dim and depth")
        embed_dim, depth, alt_start, table_side = map(
            sizes.get, ("embed_dim", "depth", "alt_start", "table_side")
        )
        alike = [model] if model else presets(sizes)
        self.published = PRESETS[alike[0]][0] if alike else None
        num_heads, alt_start = (
            num_heads or max(1, embed_dim // 64),
            alt_start if alt_start >= 0 else depth,
        )
        if embed_dim % (4 * num_heads):
            raise ValueError(
                f"embed_dim {embed_dim} is not {num_heads} heads of a multiple of 4 channels"
            )
        if not layers or not all(-depth <= layer < depth for layer in layers):
            raise ValueError(f"layers: expected some of {-depth} to {depth - 1}, found {layers}")
        self.layers = [layer % depth for layer in layers]
        self.weights, self.normalize, self.side = weights, normalize, table_side
        self.alt_start, self.half_pairs = alt_start, embed_dim // num_heads // 4
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim).normal_(std=0.02))
        self.pos_embed = nn.Parameter(
            torch.empty(1, 1 + table_side**2, embed_dim).normal_(std=0.02)
        )
        if alt_start < depth:
            self.camera_token = nn.Parameter(torch.empty(1, 2, embed_dim).normal_(std=0.02))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, embed_dim, PATCH, PATCH)})
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, i >= alt_start) for i in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-5)
        self._shapes = {
            key: tuple(value.shape) for key, value in self.state_dict().items()
        }  # of the whole file
        self.blocks = self.blocks[: max(self.layers) + 1]
        self.register_buffer(
            "mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False
        )
        self.register_buffer(
            "std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False
        )
        self._grids, self._told = (
            {},
            False,
        )  # what depends on the grid's size only; was resizing said?
        self.requires_grad_(False).eval()

    def load_weights(self) -> Path:
        """Reads `weights`, every tensor of the backbone as float32 or as built; the file. UserError lists what differs.

        Tensors are `model.backbone.pretrained.*` of the published files, or have no prefix; heads are ignored.
        """
        licence = LICENCES.get(self.weights, LICENCES.get(self.published, UNKNOWN))
        file = locate(self.weights, licence)
        tensors, source = backbone(read_tensors(file)), f"weights: {self.weights}, {licence}"
        held = described({key: value.shape for key, value in tensors.items()})
        require(
            self._shapes,
            tensors,
            f"{file} ({source}): not the weights of this da3; the file has {held}",
        )
        self.load_state_dict({key: tensors[key] for key in self.state_dict()})
        if licence == NON_COMMERCIAL:
            print(f"notice: {source}")
        return file

    def train(self, mode=True):
        return super().train(False)

    def _apply(self, fn, recurse=True):
        self._grids.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args):
        self._grids.clear()
        super()._load_from_state_dict(*args)

    def grid(self, h: int, w: int):
        """Of a grid of patches: positions (1, 1 + h w, C), and cos, sin of rope in local and in global blocks."""
        keep = not (torch.compiler.is_compiling() or self.pos_embed.is_inference())
        key = (h, w, self.pos_embed._version) if keep else None
        if key in self._grids:
            return self._grids[key]
        table, device = self.pos_embed.float(), self.pos_embed.device
        if (h, w) != (self.side, self.side):
            square = table[:, 1:].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
            # Factors, as DINOv2: resizing to (h, w) would sample at other places.
            scale = (h + 0.1) / self.side, (w + 0.1) / self.side
            patches = (
                F.interpolate(square, scale_factor=scale, mode="bicubic").flatten(2).transpose(1, 2)
            )
            table = torch.cat([table[:, :1], patches], 1)
        rows, columns = (
            torch.arange(1.0, h + 1, device=device),
            torch.arange(1.0, w + 1, device=device),
        )
        places = F.pad(
            torch.cartesian_prod(rows, columns), (0, 0, 1, 0)
        )  # the class token is at (0, 0)
        frequencies = 100 ** -(torch.arange(self.half_pairs, device=device) / self.half_pairs)
        angles = (p[..., None] * frequencies for p in (places, places.clamp(max=1)))
        made = table.to(self.pos_embed.dtype), *((a.cos(), a.sin()) for a in angles)
        if keep:
            self._grids = {
                key: made,
                **dict(list(self._grids.items())[:7]),
            }  # sizes are few, or not worth keeping
        return made

    def prepare(self, image: Tensor) -> Tensor:
        """The picture as the patch embedding takes it."""
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"da3: expected an image (B, 3, h, w), found {tuple(image.shape)}")
        if image.dtype == torch.uint8:
            image = image.float() / 255
        elif not image.is_floating_point():
            raise ValueError(
                f"da3: expected an image in float [0, 1] or uint8, found {image.dtype}"
            )
        old = tuple(image.shape[2:])
        new = tuple(max(1, (side + PATCH // 2) // PATCH) * PATCH for side in old)
        if new != old:
            if not self._told and not torch.compiler.is_compiling():
                self._told = True
                print(
                    f"notice: da3 resizes pictures to multiples of 14: {old[0]} x {old[1]} to {new[0]} x {new[1]}"
                )
            image = F.interpolate(image.float(), new, mode="bilinear", align_corners=False)
        image = (image.float() - self.mean) / self.std if self.normalize else image
        return image.to(self.pos_embed.dtype)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        x = self.patch_embed["proj"](self.prepare(image))
        h, w = x.shape[2:]
        positions, *angles = self.grid(h, w)
        x = (
            torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
            + positions
        )
        features = {}
        for i in range(max(self.layers) + 1):
            if i == self.alt_start:
                x = torch.cat([self.camera_token[:, :1].expand(len(x), -1, -1), x[:, 1:]], 1)
            x = self.blocks[i](x, angles[i % 2] if i >= self.alt_start else None)
            if i in self.layers:
                features[i] = self.norm(x[:, 1:]).unflatten(1, (h, w))
        return torch.stack([features[i] for i in self.layers], 1)


def backbone(tensors: dict) -> dict:
    """What of a file is the backbone's, without the prefix."""
    return {
        key.removeprefix(PREFIX): value
        for key, value in tensors.items()
        if not key.startswith(IGNORED)
    }


def sizes_of(shapes: dict[str, tuple]) -> dict | None:
    """DepthAnything3's arguments for the backbone that a file holds; None if it holds none."""
    table = shapes.get("pos_embed", ())
    blocks = [key.split(".") for key in shapes if re.match(r"blocks\.\d+\.", key)]
    if len(table) != 3 or not blocks:
        return None
    start = min((int(key[1]) for key in blocks if "q_norm" in key), default=-1)
    sizes = {
        "embed_dim": table[2],
        "depth": 1 + max(int(key[1]) for key in blocks),
        "alt_start": start,
    }
    return sizes | {"table_side": math.isqrt(table[1] - 1)}


def presets(sizes: dict) -> list[str]:
    """The published models of these sizes."""
    return [name for name, (_, preset) in PRESETS.items() if preset.items() <= sizes.items()]


def described(shapes: dict[str, tuple]) -> str:
    """The sizes of the backbone that a file holds, for a message."""
    if (sizes := sizes_of(shapes)) is None:
        return "none"
    names = f" (model: {' or '.join(presets(sizes))})" if presets(sizes) else ""
    return ", ".join(f"{key} {value}" for key, value in sizes.items()) + names
