"""Published weights: where `weights:` of a YAML points to, and what a safetensors file must hold."""

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from common.config import UserError

FILE = "model.safetensors"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".pkl", ".npz")
SHOWN = 8  # lines of each kind in an error


def locate(weights: str, licence: str) -> Path:
    """The safetensors file of `weights`, absolute: that file, one in that folder, or the one of a Hub id `org/name`.

    huggingface_hub fetches and keeps the Hub's, and takes what it has where there is no network. licence: of the
    weights, for the error, a UserError that says how to get the file.
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
                f"weights: the folder {path.parent} holds no {FILE}; licence of the weights: {licence}"
            )
    if path.is_file():
        return path
    if (
        not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(weights))
        or path.suffix == ".safetensors"
    ):
        raise UserError(
            f"weights: no such file {path}, and '{weights}' is no Hub id like 'org/name'; "
            f"licence of the weights: {licence}"
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(str(weights), FILE)).absolute()
    except Exception as error:  # of the network there are many kinds, of several packages
        raise UserError(
            f"weights: {weights} is no file or folder here, and the Hub gave no {FILE} of it ({licence})."
            f"\n    Once, where there is a network: `hf download {weights} {FILE}`, or fetch"
            f" https://huggingface.co/{weights}/resolve/main/{FILE} by hand and write its path under `weights`."
            f"\n    ({type(error).__name__}: {error})"
        ) from error


def read_tensors(file: Path, read=load_file) -> dict[str, Tensor]:
    """All tensors of a safetensors file; pickles are refused, nothing of them is read."""
    if not Path(file).is_file():
        raise UserError(f"{file}: no such file")
    if Path(file).suffix != ".safetensors":
        raise UserError(
            f"{file}: expected a .safetensors file; pickles (.pt, .pth, .bin) are not read"
        )
    try:
        return read(file)
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file}: not a readable safetensors file ({e})") from e


def read_sizes(weights: str, licence: str, sizes_of, otherwise: str) -> dict:
    """A model's arguments as sizes_of reads them from {name: shape}, of the header of what `weights` (locate) names.

    otherwise: the arguments that say the same, for the error where there is no such file.
    """

    def header(file):
        with safe_open(file, "pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118

    try:
        file = locate(weights, licence)
        if sizes := sizes_of(read_tensors(file, header)):
            return sizes
        raise UserError(
            f"{file}: neither blocks nor a table of positions by the names of this model"
        )
    except UserError as error:
        raise UserError(
            f"{error}\n    The sizes come from that file; to do without it, give {otherwise}"
        ) from error


def require(expected: dict[str, tuple], tensors: dict[str, Tensor], what: str):
    """Raises UserError that lists what differs, unless tensors have just the expected names and shapes."""
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    wrong = [
        f"{name} is {shapes[name]}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if shapes.get(name, tuple(shape)) != tuple(shape)
    ]
    missing = [f"missing {text}" for text in by_block(expected.keys() - shapes.keys())]
    unexpected = [f"unexpected {text}" for text in by_block(shapes.keys() - expected.keys())]
    shown = []
    for kind in (wrong, missing, unexpected):
        shown += kind[:SHOWN] + ([f"and {len(kind) - SHOWN} more"] if len(kind) > SHOWN else [])
    if shown:
        raise UserError(f"{what}:\n    " + "\n    ".join(shown))


def by_block(names) -> list[str]:
    """Names, those of a block, and of equal blocks in a row, as one: `blocks.12 to blocks.23 (288 tensors)`."""
    lines, blocks, runs = [], {}, []
    for name in sorted(names):
        of_block = re.fullmatch(r"(.*\bblocks\.)(\d+)\.(.+)", name)
        if of_block:
            blocks.setdefault((of_block[1], int(of_block[2])), []).append(of_block[3])
        else:
            lines.append(name)
    for (before, number), inner in sorted(blocks.items()):
        if runs and (runs[-1][0], runs[-1][2], runs[-1][3]) == (before, number - 1, inner):
            runs[-1][2] = number
        else:
            runs.append([before, number, number, inner])
    for before, first, last, inner in runs:
        span = f"{before}{first}" if first == last else f"{before}{first} to {before}{last}"
        if len(inner) > 2:
            lines.append(f"{span} ({(last - first + 1) * len(inner)} tensors)")
        else:
            lines += [f"{span}{'.' if first == last else ': '}{name}" for name in inner]
    return lines
