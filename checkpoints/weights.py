"""What a file of BLIP weights holds: a safe reader of `.pth`, official key names, sizes read from shapes, resampling.

Sources: the published checkpoints (https://github.com/salesforce/BLIP) and BLIP's `models/vit.py` for how position
embeddings are resampled. Nothing in a file is ever executed: `torch.load(weights_only=True)`, always.

Shapes: N = 1 + g^2 image tokens ([CLS] first) of a g x g grid, V image width, E embedding width.
"""

import hashlib
import math
import pickle
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.sizes import VIT_SIZES

# Parts of the pre-training model, and a pooler that BLIP never trains: retrieval has no use for them.
IGNORED_PARTS = ("text_decoder.", "text_decoder_m.", "text_encoder.pooler.", "text_encoder_m.pooler.")
# `arange` in the published files; this code counts positions itself.
IGNORED_BUFFERS = ("position_ids",)
# They hold features and ids of another run's images: only `resume` restores them. `queue_ptr`: pre-training's.
QUEUES = ("image_queue", "text_queue", "idx_queue", "ptr_queue", "queue_ptr")
# May be absent together: then they start at the online weights.
TWINS = ("visual_encoder_m.", "vision_proj_m.", "text_encoder_m.", "text_proj_m.")
POS_EMBEDS = ("visual_encoder.pos_embed", "visual_encoder_m.pos_embed")
WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile


class DamagedFile(ValueError):
    """The file is not, or no longer, a checkpoint."""


@dataclass
class WeightFile:
    """Weights under official names, and what else the file says (`config`, `epoch`, `text_config`, `run`, ...)."""

    name: str
    state: dict[str, Tensor]
    ignored: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What this is, in words."""
        if "run" in self.extra:
            return "run of this program, to resume"
        if "hugging_face" in self.extra:
            return "Hugging Face BlipForImageTextRetrieval"
        if any(key.startswith("text_decoder.") for key in [*self.state, *self.ignored]):
            return "pre-trained BLIP"
        return "BLIP already fine-tuned for retrieval" if "idx_queue" in self.state else "weights of a retrieval model"


# ---- reading --------------------------------------------------------------------------------------------------------


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
        return ValueError(
            f"{path}: holds {foreign[1]} besides tensors and plain values. Loading that could run any code, so it is "
            "refused. If you trust where the file comes from, write its weights alone to another one: torch.save("
            f"{{'model': torch.load({path.name!r}, weights_only=False)['model']}}, 'weights.pth')."
        )
    reason = f" ({error.strerror})" if isinstance(error, OSError) else ""  # torch's own words speak of its internals
    return DamagedFile(f"{path}: not a PyTorch checkpoint, or cut short{reason}. Copy or download it again.")


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


def read_weights(path: Path) -> WeightFile:
    """The weights of a `.pth`: under `model` as BLIP saves them, or the whole file is a dictionary of tensors."""
    data = read_pth(path)
    state = data.get("model", data)
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{path}: holds no weights: neither a dictionary of tensors nor one under 'model'. Its keys: {few(data)}."
        )
    extra = {key: value for key, value in data.items() if key != "model"} if "model" in data else {}
    return WeightFile(str(path), *official_names(state), extra)


def official_names(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(state, ignored keys): without wrappers' prefixes and without what retrieval ignores. Queues stay."""
    for prefix in WRAPPERS:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    ignored = [key for key in state if key.startswith(IGNORED_PARTS) or key.split(".")[-1] in IGNORED_BUFFERS]
    return {key: value for key, value in state.items() if key not in set(ignored)}, ignored


# ---- sizes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """A model's sizes; `text` has MedConfig's words. Numbers of heads leave no trace in shapes."""

    width: int
    depth: int
    patch_size: int
    image_size: int
    embed_dim: int
    text: dict[str, int]

    @property
    def vit(self) -> str:
        """Name in VIT_SIZES, '' if there is none."""
        return next((vit for vit, size in VIT_SIZES.items() if size[:2] == (self.width, self.depth)), "")

    @property
    def vit_words(self) -> str:
        return f"ViT-{self.vit or 'unknown'} ({self.width} wide, {self.depth} deep)"


def read_sizes(state: dict[str, Tensor], name: str) -> Sizes:
    """Sizes from the shapes of official tensors; ValueError when `state` is no BLIP retrieval model."""
    try:
        patch = state["visual_encoder.patch_embed.proj.weight"].shape  # (V, 3, p, p)
        tokens = state["visual_encoder.pos_embed"].shape[1]  # (1, N, V)
        layer = "text_encoder.encoder.layer.0."
        text = {
            "hidden_size": state["text_encoder.embeddings.word_embeddings.weight"].shape[1],
            "num_hidden_layers": _count(state, r"text_encoder\.encoder\.layer\.(\d+)\."),
            "intermediate_size": state[layer + "intermediate.dense.weight"].shape[0],
            "vocab_size": state["text_encoder.embeddings.word_embeddings.weight"].shape[0],
            "max_position_embeddings": state["text_encoder.embeddings.position_embeddings.weight"].shape[0],
            "encoder_width": state[layer + "crossattention.self.key.weight"].shape[1],
        }
        embed_dim = state["vision_proj.weight"].shape[0]
    except KeyError as error:
        raise ValueError(
            f"{name}: no BLIP model for image-text retrieval: it has no tensor {error}. It holds {few(state)}."
        ) from None
    except IndexError:
        raise ValueError(f"{name}: a tensor that gives the model's sizes has too few dimensions.") from None
    depth = _count(state, r"visual_encoder\.blocks\.(\d+)\.")
    return Sizes(patch[0], depth, patch[-1], _grid(tokens, name) * patch[-1], embed_dim, text)


def require_equal_sizes(file: Sizes, wanted: Sizes, name: str) -> None:
    """ValueError naming the config key to change if the file's model has other sizes; image sizes may differ."""
    if (file.width, file.depth) != (wanted.width, wanted.depth):
        what = f"set `vit: {file.vit}`" if file.vit else f"known are {', '.join(VIT_SIZES)}"
        raise ValueError(f"{name}: the file holds {file.vit_words}, the config asks for {wanted.vit_words}: {what}.")
    for key in ("patch_size", "embed_dim"):
        if getattr(file, key) != getattr(wanted, key):
            raise ValueError(
                f"{name}: the file's {key} is {getattr(file, key)}, the config's {getattr(wanted, key)}: "
                f"set `{key}: {getattr(file, key)}`."
            )
    different = [key for key in file.text if file.text[key] != wanted.text[key]]
    if different:
        listed = ", ".join(f"{key} {file.text[key]} (config: {wanted.text[key]})" for key in different)
        raise ValueError(f"{name}: the file's text encoder has {listed}: set `med_config` to a JSON with its sizes.")


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names, shapes and float32 values of the online weights: equal for every format of one model.

    Momentum twins and queues are left out: evaluation does not use them, and not every format has them.
    """
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if not name.startswith(TWINS) and name not in QUEUES:
            digest.update(f"{name} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _count(state: Iterable[str], pattern: str) -> int:
    """1 + the largest layer number that matches."""
    return 1 + max((int(found[1]) for found in (re.match(pattern, key) for key in state) if found), default=-1)


def _grid(tokens: int, name: str) -> int:
    """Side g of the square grid behind 1 + g^2 position embeddings."""
    side = math.isqrt(max(tokens - 1, 0))
    if side < 1 or side * side != tokens - 1:
        raise ValueError(
            f"{name}: {tokens - 1} patch positions do not form a square grid; only square images are supported."
        )
    return side


def few(keys: Iterable[object], limit: int = 10) -> str:
    """The first keys, and how many more there are."""
    words = [str(key) for key in keys]
    return ", ".join(words[:limit]) + (f" and {len(words) - limit} more" if len(words) > limit else "")


# ---- position embeddings --------------------------------------------------------------------------------------------


def resample_pos_embed(pos_embed: Tensor, tokens: int, name: str = "pos_embed") -> Tensor:
    """(1, N, V) -> (1, tokens, V): [CLS] kept, the grid resampled bicubically as BLIP does, without antialiasing."""
    old, new = _grid(pos_embed.shape[1], name), _grid(tokens, name)
    if old == new:
        return pos_embed
    grid = pos_embed[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, V, g, g)
    grid = F.interpolate(grid.float(), size=(new, new), mode="bicubic", align_corners=False)
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)  # (1, tokens - 1, V)
    return torch.cat([pos_embed[:, :1], grid], dim=1)
