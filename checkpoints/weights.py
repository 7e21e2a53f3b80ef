"""BLIP weights under official names: what retrieval ignores, sizes read from shapes, resampled position embeddings.

Sources: the published checkpoints (https://github.com/salesforce/BLIP) and BLIP's `models/vit.py` for how position
embeddings are resampled.

Shapes: N = 1 + g^2 image tokens ([CLS] first) of a g x g grid, V image width, E embedding width.
"""

import hashlib
import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from checkpoints.files import few, read_tensors
from configs.sizes import VIT_SIZES
from transform.text import CaptionTokenizer, blip_tokenizer

log = logging.getLogger(__name__)

# Parts of the pre-training model, and a pooler that BLIP never trains: retrieval has no use for them.
IGNORED_PARTS = ("text_decoder.", "text_decoder_m.", "text_encoder.pooler.", "text_encoder_m.pooler.")
# `arange` in the published files; this code counts positions itself.
IGNORED_BUFFERS = ("position_ids",)
# They hold features and ids of another run's images: only `resume` restores them. `queue_ptr`: pre-training's.
QUEUES = ("image_queue", "text_queue", "idx_queue", "ptr_queue", "queue_ptr")
# May be absent together: then they start at the online weights.
TWINS = ("visual_encoder_m.", "vision_proj_m.", "text_encoder_m.", "text_proj_m.")
POS_EMBEDS = ("visual_encoder.pos_embed", "visual_encoder_m.pos_embed")
LORA, LORA_ORIGINAL = ".parametrizations.", ".parametrizations.weight.original"  # torch.nn.utils.parametrize's
COMPILED = "_orig_mod."  # torch.compile's, anywhere in a name
# One tensor of every BLIP, by its official and its Hugging Face name: what stands before it is a wrapper's prefix.
ANCHORS = ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding")


@dataclass
class WeightFile:
    """Weights under official names, and what else the file says (`config`, `epoch`, `text_config`, `run`, ...)."""

    name: str
    state: dict[str, Tensor]
    ignored: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def tokenizer(self) -> CaptionTokenizer:
        """Its own; BLIP's where none is stated, as in released files."""
        return tokenizer_in(self.extra) or blip_tokenizer()

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


def read_weights(path: Path) -> WeightFile:
    """The weights of a `.pth`, `.bin` or `.safetensors`, under official names."""
    state, extra = read_tensors(path)
    return WeightFile(str(path), *official_names(state), extra)


def official_names(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(state, ignored keys): without wrappers' prefixes and without what retrieval ignores. Queues stay."""
    state = merge_lora({key.replace(COMPILED, ""): value for key, value in state.items()})
    for anchor in ANCHORS:
        prefix = next((key.removesuffix(anchor) for key in state if key.endswith(f".{anchor}")), "")
        if prefix and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    ignored = [key for key in state if key.startswith(IGNORED_PARTS) or key.split(".")[-1] in IGNORED_BUFFERS]
    return {key: value for key, value in state.items() if key not in set(ignored)}, ignored


def online_name(key: str) -> str:
    """The name of the weight that a momentum twin's follows."""
    return key.replace("_m.", ".", 1)


# ---- low-rank updates -----------------------------------------------------------------------------------------------


def merge_lora(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights with low-rank updates, W, A and B, as the sum W + scale * B A under their plain names, in their order."""
    merged = {}
    for key, value in state.items():
        original = key if key.endswith(LORA_ORIGINAL) else key.removesuffix(".bias") + LORA_ORIGINAL
        plain = original.replace(LORA_ORIGINAL, ".weight")
        if original in state and plain not in merged:  # a layer's weight stands before its bias
            a, b, scale = (state[original.removesuffix("original") + part] for part in ("0.A", "0.B", "0.scale"))
            merged[plain] = state[original] + scale * (b @ a)
        if LORA not in key:
            merged[key] = value
    return merged


def unmerge_lora(state: dict[str, Tensor], target: dict[str, Tensor]) -> dict[str, Tensor]:
    """Plain weights for a model with the names of `target`, which may have low-rank updates: they start at zero."""
    unmerged = dict(state)
    for key in target:
        plain, b = key.replace(LORA_ORIGINAL, ".weight"), key.removesuffix("original") + "0.B"
        if key.endswith(LORA_ORIGINAL) and plain in state:
            unmerged[key] = unmerged.pop(plain)
            unmerged[b] = torch.zeros_like(target[b])
    return unmerged


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
    norm_pre: bool = False
    named: str = ""  # the config's `vit` that the weights were made with, where it is known

    @property
    def vit(self) -> str:
        """Name in VIT_SIZES, '' if there is none."""
        shapes = (self.width, self.depth, self.norm_pre)
        fitting = [vit for vit, size in VIT_SIZES.items() if size.shapes == shapes]
        return self.named if self.named in fitting else next(iter(fitting), "")

    @property
    def vit_words(self) -> str:
        return f"ViT-{self.vit or 'unknown'} ({self.width} wide, {self.depth} deep)"


def read_sizes(state: dict[str, Tensor], name: str, vit: str = "") -> Sizes:
    """Sizes from the shapes of official tensors; ValueError when `state` is no BLIP retrieval model.

    `vit`: what is known of the image encoder's name, for those that differ in more than shapes.
    """
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
            f"{name}: no BLIP model for image-text retrieval: it has no tensor {error}. It holds {few(state)}. "
            "A ViT or a BERT by itself is for the keys image_tower and text_tower."
        ) from None
    except IndexError:
        raise ValueError(f"{name}: a tensor that gives the model's sizes has too few dimensions.") from None
    depth = _count(state, r"visual_encoder\.blocks\.(\d+)\.")
    norm_pre = "visual_encoder.norm_pre.weight" in state
    return Sizes(patch[0], depth, patch[-1], _grid(tokens, name) * patch[-1], embed_dim, text, norm_pre, vit)


def require_equal_sizes(file: Sizes, wanted: Sizes, name: str) -> None:
    """ValueError naming the config key to change if the file's model has other sizes; image sizes may differ."""
    unnamed = not (file.named and wanted.named)
    if (file.width, file.depth, file.norm_pre) != (wanted.width, wanted.depth, wanted.norm_pre) or not (
        unnamed or file.vit == wanted.vit
    ):
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


def tokenizer_in(extra: dict[str, Any]) -> CaptionTokenizer | None:
    """The tokenizer that a file states, if any."""
    return CaptionTokenizer.from_plain(extra["tokenizer"]) if "tokenizer" in extra else None


def require_equal_tokenizers(name: str, file: CaptionTokenizer, wanted: CaptionTokenizer) -> None:
    """ValueError unless both read captions alike: the rows of word embeddings mean one vocabulary and no other."""
    if not file.reads_as(wanted):
        raise ValueError(
            f"{name}: was trained with the tokenizer {file}, but the config's is {wanted}: remove `tokenizer` and "
            "`text_tower` from the config, and the checkpoint's own is used."
        )


def weights_sha256(model: nn.Module) -> str:
    """`state_sha256` of a model's weights."""
    return state_sha256(merge_lora(model.state_dict()))


def state_sha256(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and float32 values of the online weights: equal for every format of one model.

    Momentum twins and queues are left out: evaluation does not use them, and not every format has them. The order is
    the model's.
    """
    digest = hashlib.sha256()
    for name, value in state.items():
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
