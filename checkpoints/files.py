"""Safe readers of `.pth` and `.safetensors`, and new folders: what a file holds, or why it cannot be read.

Nothing in a file is ever executed: `torch.load(weights_only=True)`, always.
"""

import io
import logging
import os
import pickle
import pickletools
import re
import tempfile
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

log = logging.getLogger(__name__)

# Where files keep their weights: BLIP and torch's examples, Lightning, DeepSpeed, timm and other averages of weights.
HOLDERS = ("model", "state_dict", "module", "model_state_dict", "ema", "model_ema", "state_dict_ema", "ema_state_dict")


def require_new(path: Path) -> None:
    """ValueError if there is something of that name: what is written is never mixed with what was there."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: there is something already; name a new one.")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to; it becomes `folder` in the end, or nothing is left of it. ValueError as `require_new`.

    An empty one that is there stays and is filled: it may be a mount, or have owners and rights.
    """
    require_new(folder)
    if folder.exists():
        with tempfile.TemporaryDirectory(dir=folder, prefix=".part") as part:
            yield Path(part)
            if len(list(folder.iterdir())) > 1:
                raise ValueError(f"{folder}: something else has been written there meanwhile; name a new one.")
            for file in sorted(Path(part).iterdir()):
                os.replace(file, folder / file.name)
        return
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.part") as part:
        made = Path(part, folder.name)
        made.mkdir()
        yield made
        require_new(folder)
        os.replace(made, folder)


class DamagedFile(ValueError):
    """The file is not, or no longer, a checkpoint."""


def read_pth(path: Path, check_sums: bool = False) -> dict[str, Any]:
    """Everything in a `.pth`, tensors on the CPU and mapped from the file where its format allows.

    `check_sums` compares the CRC-32 of every record, which torch.load does not. DamagedFile if it is no checkpoint,
    ValueError if it holds objects other than tensors and plain values.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file.")
    try:
        with open(path, "rb") as file:
            head = file.read(512)
        _refuse_text(path, head)
        zipped = head.startswith(b"PK")  # the format since PyTorch 1.6
        broken = zipfile.ZipFile(path).testzip() if check_sums and zipped else None
        if broken:
            raise DamagedFile(f"{path}: damaged, the checksum of its record {broken} is wrong.")
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (DamagedFile, MemoryError):
        raise
    except Exception as error:  # torch and zipfile raise many kinds for cut or random bytes
        raise _explained(path, error) from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds a {type(data).__name__}, not a checkpoint's dictionary.")
    return data


def _explained(path: Path, error: Exception) -> ValueError:
    foreign = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if foreign:
        holder = _holder_in(path)
        weights = f"torch.load({path.name!r}, weights_only=False)" + (f"[{holder!r}]" if holder else ".state_dict()")
        return ValueError(
            f"{path}: holds {foreign[1]} besides tensors and plain values. Loading that could run any code, so it is "
            "refused. If you trust where the file comes from, write its weights alone to another one: torch.save("
            f"{{'model': {weights}}}, 'weights.pth')."
        )
    reason = f" ({error.strerror})" if isinstance(error, OSError) else ""  # torch's own words speak of its internals
    return DamagedFile(f"{path}: not a PyTorch checkpoint, or cut short{reason}. Copy or download it again.")


def _holder_in(path: Path) -> str:
    """Which of HOLDERS a pickled dictionary has first, without running it; '' when none, as in a model saved whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            stream: IO[bytes] = io.BytesIO(
                archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
            )
    except (zipfile.BadZipFile, StopIteration):
        stream = io.BytesIO(path.read_bytes()[: 1 << 20])
    try:
        steps = [(step.name, value) for step, value, _ in islice(pickletools.genops(stream), 2)]
        if steps[-1][0].startswith("LONG"):  # the format before PyTorch 1.6: a number and two more pickles come first
            stream.seek(0)
            for _ in range(3):
                deque(pickletools.genops(stream), 0)
            steps = [(step.name, value) for step, value, _ in islice(pickletools.genops(stream), 2)]
        if steps[-1][0] != "EMPTY_DICT":
            return ""
        texts = (value for step, value, _ in pickletools.genops(stream) if "UNICODE" in step.name)
        return next((text for text in texts if text in HOLDERS), "")
    except ValueError:  # cut, or no pickle
        return ""


def _refuse_text(path: Path, head: bytes) -> None:
    start = head.lstrip().lower()
    if not head:
        raise DamagedFile(f"{path}: the file is empty. Copy or download it again.")
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise DamagedFile(
            f"{path}: a web page, not a checkpoint: the address answered with a log-in or error page. Open it in a "
            "browser, download the file itself, and give its path."
        )
    if start.startswith(b"version https://git-lfs"):
        raise DamagedFile(f"{path}: a Git LFS pointer, not the file itself. Run `git lfs pull` where it was cloned.")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a file, all of its tensors or those under one of HOLDERS, and what else it says."""
    data = _read_safetensors(path) if _is_safetensors(path) else read_pth(path)
    held = {key: state for key in HOLDERS if (state := _weights_under(data.get(key)))}
    state = next(iter(held.values()), None) or (data if _are_weights(data) else None)
    if state is None:
        raise ValueError(
            f"{path}: holds no weights: neither a dictionary of tensors nor one under 'model' or another usual key "
            f"({', '.join(HOLDERS[1:])}). Its keys: {few(data)}."
        )
    if len(held) > 1:
        taken, *others = held
        log.info("%s: takes the weights under %r; those under %s are not used", path, taken, ", ".join(others))
    return state, {key: value for key, value in data.items() if key not in held} if held else {}


def _are_weights(state: Any) -> bool:
    return isinstance(state, dict) and bool(state) and all(isinstance(value, Tensor) for value in state.values())


def _weights_under(value: Any) -> dict[str, Tensor] | None:
    """The weights that a holder is, or that a holder in it is, as an average's {'module': ...}."""
    inner = [value, *(value.get(key) for key in HOLDERS)] if isinstance(value, dict) else []
    return next((state for state in inner if _are_weights(state)), None)


def _is_safetensors(path: Path) -> bool:
    """By its first bytes: the length of a JSON header, and the header."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(9)
    return path.suffix == ".safetensors" and not head.startswith((b"PK", b"<", b"version")) or head[8:] == b"{"


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise DamagedFile(
            f"{path}: not a safetensors file, or cut short ({error}). Copy or download it again."
        ) from None


def few(keys: Iterable[object], limit: int = 10) -> str:
    """The first keys, and how many more there are."""
    words = [str(key) for key in keys]
    return ", ".join(words[:limit]) + (f" and {len(words) - limit} more" if len(words) > limit else "")
