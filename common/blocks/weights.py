"""Published weights: where `weights:` of a YAML points to, and what a file must hold."""

import re
from pathlib import Path

from torch import Tensor

from common.config import UserError

FILE = "model.safetensors"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".pkl", ".npz")


def locate(weights: str, licence: str) -> Path:
    """The safetensors file of `weights`: that file, one in that folder, or the one of a Hub id `org/name`.

    The Hub's cache is looked at first. licence: of the published weights, for the error, a UserError that says how to
    get the file.
    """
    path = Path(weights).expanduser()
    if path.suffix in PICKLES:
        raise UserError(f"weights: {weights}: pickles are not read, give the {FILE} beside it ({licence})")
    if path.is_dir():
        path = path / FILE
    if path.is_file():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(weights)) or path.suffix == ".safetensors":
        raise UserError(
            f"weights: no such file {path} (looked from {Path.cwd()}), and '{weights}' is no Hub id like 'org/name'; "
            f"licence of the weights: {licence}"
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(str(weights), FILE))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"weights: {weights} is no file or folder here, and the Hub gave no {FILE} of it ({licence})."
            f"\n    Once, where there is a network: `hf download {weights} {FILE}`, or fetch"
            f" https://huggingface.co/{weights}/resolve/main/{FILE} by hand and write its path under `weights`."
            f"\n    ({type(error).__name__}: {error})"
        ) from error


def require(expected: dict[str, tuple], tensors: dict[str, Tensor], what: str):
    """Raises UserError that lists what differs, unless tensors have just the expected names and shapes."""
    wrong = [f"missing {name}" for name in expected if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in expected]
    wrong += [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != tuple(shape)
    ]
    if wrong:
        shown = "\n    ".join(wrong[:12] + ([f"and {len(wrong) - 12} more"] if len(wrong) > 12 else []))
        raise UserError(f"{what}:\n    {shown}")
