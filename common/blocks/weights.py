"""Published weights: finds the file that `weights:` of a YAML names, and checks its tensors."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from common import hub
from common.config import UserError

FILE = "model.safetensors"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".pkl", ".npz")
SHOWN = 8  # lines of each kind in an error


def locate(weights: str, licence: str) -> Path:
    """The safetensors file that `weights` names, as an absolute path.

    `weights` is the file, its folder, or a Hub id `org/name`, which huggingface_hub fetches and
    caches. Raises UserError, with the licence of the weights and how to get the file.
    """
    path = Path(weights).expanduser().absolute()
    if path.suffix in PICKLES:
        raise UserError(
            f"weights: {weights}: pickles are not read, give the {FILE} beside it ({licence})"
        )
    if path.is_dir():
        path = path / FILE
        if not path.is_file():
            raise UserError(
                f"weights: the folder {path.parent} holds no {FILE};"
                f" licence of the weights: {licence}"
            )
    if path.is_file():
        return path
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", weights)
    if not is_hub_id or path.suffix == ".safetensors":
        raise UserError(
            f"weights: no such file {path}, and '{weights}' is no Hub id like 'org/name';"
            f" licence of the weights: {licence}"
        )
    try:
        return hub.file(weights, FILE).absolute()
    except hub.HubError as error:
        raise UserError(
            f"weights: {weights} is no file or folder here,"
            f" and the Hub gave no {FILE} of it ({licence})."
            f"\n    Once, where there is a network: `hf download {weights} {FILE}`, or fetch"
            f" https://huggingface.co/{weights}/resolve/main/{FILE} by hand"
            f" and write its path under `weights`."
            f"\n    ({error})"
        ) from error


def read_tensors(file: Path | str, read: Callable = load_file) -> dict:
    """All tensors of a safetensors file. Raises UserError for any other file, which is not read."""
    file = Path(file)
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    if file.suffix != ".safetensors":
        raise UserError(
            f"{file}: expected a .safetensors file; pickles (.pt, .pth, .bin) are not read"
        )
    try:
        return read(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error})") from error


def read_shapes(file: Path) -> dict[str, tuple]:
    """{name: shape} of a safetensors file, from its header."""
    with safe_open(file, "pt") as tensors:
        names = tensors.keys()
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}


def read_sizes(
    weights: str,
    licence: str,
    sizes_of: Callable[[dict[str, tuple]], dict | None],
    otherwise: str,
) -> dict:
    """Arguments of a model, which sizes_of finds from {name: shape} of the file at `weights`.

    otherwise: the arguments that replace the file, for the UserError raised where there is none.
    """
    try:
        file = locate(weights, licence)
        sizes = sizes_of(read_tensors(file, read_shapes))
        if not sizes:
            raise UserError(
                f"{file}: neither blocks nor a table of positions by the names of this model"
            )
    except UserError as error:
        raise UserError(
            f"{error}\n    The sizes come from that file; to do without it, give {otherwise}"
        ) from error
    return sizes


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def require(expected: dict[str, tuple], tensors: dict[str, Tensor], title: str) -> None:
    """Raises UserError, a list under `title`, unless names and shapes are exactly as expected."""
    shapes = shapes_of(tensors)
    wrong = [
        f"{name} is {shapes[name]}, expected {shape}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    missing = [f"missing {text}" for text in by_block(expected.keys() - shapes.keys())]
    unexpected = [f"unexpected {text}" for text in by_block(shapes.keys() - expected.keys())]
    lines = []
    for kind in (wrong, missing, unexpected):
        lines += kind[:SHOWN]
        if len(kind) > SHOWN:
            lines.append(f"and {len(kind) - SHOWN} more")
    if lines:
        raise UserError("\n    ".join([f"{title}:", *lines]))


def by_block(names: Iterable[str]) -> list[str]:
    """Sorted names; equal blocks in a row become one: `blocks.12 to blocks.23 (288 tensors)`."""
    lines = []
    blocks = {}  # (text before the number, number) -> names inside the block
    for name in sorted(names):
        match = re.fullmatch(r"(.*\bblocks\.)(\d+)\.(.+)", name)
        if match:
            blocks.setdefault((match[1], int(match[2])), []).append(match[3])
        else:
            lines.append(name)
    runs = []  # [text before the number, names inside the block, first number, last number]
    for (before, number), inner in sorted(blocks.items()):
        if runs and runs[-1][:2] == [before, inner] and runs[-1][3] == number - 1:
            runs[-1][3] = number
        else:
            runs.append([before, inner, number, number])
    for before, inner, first, last in runs:
        span = f"{before}{first}"
        separator = "."
        if first < last:
            span = f"{span} to {before}{last}"
            separator = ": "
        if len(inner) > 2:
            lines.append(f"{span} ({(last - first + 1) * len(inner)} tensors)")
        else:
            lines += [f"{span}{separator}{name}" for name in inner]
    return lines
