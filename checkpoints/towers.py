"""Encoders that are not BLIP's: weights of a ViT or a BERT under official names, for training to start from.

BLIP itself started from an ImageNet ViT and from BERT (Li et al., ICML 2022, section 4.1). Names of tensors: timm's
VisionTransformer; transformers' ViT, DINOv2, CLIP and BERT.

What cannot be said exactly in this program's encoders is refused with the reason: a tower that computes something else
would load and be worse, and nobody would know why.

Shapes: V image width, p patch side, g side of the grid, D text width, W vocabulary.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from checkpoints.download import local_path
from checkpoints.files import few, read_tensors
from checkpoints.huggingface import CONFIG, TENSOR_FILES
from configs.sizes import VIT_SIZES, MedConfig

log = logging.getLogger(__name__)

TIMM = "timm:"
PREPROCESSOR = "preprocessor_config.json"
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass
class ImageTower:
    """A ViT under official names (without `visual_encoder.`), and what its file says about it."""

    name: str
    state: dict[str, Tensor]
    ignored: list[str] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)
    vits: list[str] = field(default_factory=list)  # entries of VIT_SIZES that it may be
    mean: list[float] | None = None  # None: not stated
    std: list[float] | None = None

    @property
    def patch_size(self) -> int:
        return self.state["patch_embed.proj.weight"].shape[-1]


@dataclass
class TextTower:
    """A BERT under official names (without `text_encoder.`), its sizes, and the folder that its tokenizer lies in."""

    name: str
    state: dict[str, Tensor]
    config: MedConfig
    folder: Path
    ignored: list[str] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)


# ---- image ----------------------------------------------------------------------------------------------------------

# Another library's beginnings of names, as patterns, and timm's. Query, key and value are three matrices there.
CLIP_NAMES = (
    (r"embeddings\.class_embedding", "cls_token"),
    (r"embeddings\.position_embedding\.weight", "pos_embed"),
    (r"embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"pre_layrnorm\.", "norm_pre."),
    (r"encoder\.layers\.(\d+)\.layer_norm([12])\.", r"blocks.\1.norm\2."),
    (r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.", r"blocks.\1.attn.\2."),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layers\.(\d+)\.mlp\.", r"blocks.\1.mlp."),
    (r"post_layernorm\.", "norm."),
)
VIT_NAMES = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"encoder\.layer\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
    (r"encoder\.layer\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
    (r"encoder\.layer\.(\d+)\.norm([12])\.", r"blocks.\1.norm\2."),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.([qkv])(?:uery|ey|alue)\.", r"blocks.\1.attn.\2."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.", r"blocks.\1.mlp.fc1."),
    (r"encoder\.layer\.(\d+)\.output\.dense\.", r"blocks.\1.mlp.fc2."),
    (r"encoder\.layer\.(\d+)\.mlp\.", r"blocks.\1.mlp."),
    (r"layernorm\.", "norm."),
)
# Tensors of these beginnings compute something that this program's encoder cannot.
REFUSED = {
    "reg_token": "register tokens",
    "embeddings.register_tokens": "register tokens",
    "dist_token": "a distillation token",
    "embeddings.distillation_token": "a distillation token",
    "attn_pool.": "no [CLS] token (it pools by attention, as SigLIP does); matching and contrast here read [CLS]",
    "rel_pos_bias": "relative positions",
    "rope": "rotary positions",
}
OUTSIDE = r"(head|head_dist|fc_norm|pre_logits|pooler|decoder\w*|mask_token|embeddings\.mask_token|\w*position_ids)\b"

BLOCK = r"blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\."
KNOWN = rf"cls_token|pos_embed|patch_embed\.proj\.|norm\.|norm_pre\.|{BLOCK}"


def read_image_tower(source: str, cache_dir: str = "") -> ImageTower:
    """Weights of a ViT: a file, a Hugging Face folder, a BLIP file's image half, or `timm:NAME`.

    ValueError for weights that are no ViT, or one that this program's image encoder cannot compute exactly.
    """
    if source.startswith(TIMM):
        return _from_timm(source)
    path = _path_of("image_tower", source, cache_dir, "a ViT's file or folder, or timm:NAME")
    state, config = _read_source(path)
    named = {}
    if (path / PREPROCESSOR).exists():
        named = json.loads((path / PREPROCESSOR).read_text(encoding="utf-8"))
    tower = ImageTower(str(path), *_image_names(state, str(path)))
    _fold_layer_scale(tower)
    _check_image(tower)
    tower.vits = _vits_of(tower, config.get("vision_config", config))
    tower.mean, tower.std = named.get("image_mean"), named.get("image_std")
    if any("visual_encoder." in key for key in state) and tower.mean is None:
        tower.mean, tower.std = (list(values) for values in CLIP)  # BLIP's
    return tower


def _from_timm(source: str) -> ImageTower:
    """timm's own loading: it asks a hub for weights that are not on this machine."""
    name = source.removeprefix(TIMM)
    try:
        model: Any = timm.create_model(name, pretrained=True)
    except Exception as error:  # timm and huggingface_hub have many kinds
        raise ValueError(f"image_tower {source}: timm cannot give it ({' '.join(str(error).split())[:300]})") from None
    tower = ImageTower(source, *_image_names(dict(model.state_dict()), source))
    _fold_layer_scale(tower)
    _check_image(tower)
    act = type(model.blocks[0].mlp.act).__name__.lower().replace("quickgelu", "quick_gelu")
    tower.vits = _vits_of(tower, {"hidden_act": act, "num_attention_heads": model.blocks[0].attn.num_heads})
    tower.mean, tower.std = (list(model.pretrained_cfg[key]) for key in ("mean", "std"))
    return tower


def _image_names(state: dict[str, Tensor], name: str) -> tuple[dict[str, Tensor], list[str]]:
    """(timm's names, ignored): of any of the known layouts, without what stands around the encoder."""
    for prefix in ("visual_encoder.", "vision_model.", "vit.", "deit.", "dinov2.", "backbone.", "visual.trunk."):
        inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if inside:
            break
    outside = [key for key in state if inside and not key.startswith(prefix)]
    inside = inside or state
    refused = {REFUSED[word] for key in inside for word in REFUSED if key.startswith(word) or f".{word}" in key}
    if refused:
        raise ValueError(f"image_tower {name}: has {' and '.join(sorted(refused))}, which this image encoder has not.")
    if any(key.startswith("embeddings.") for key in inside):
        table = CLIP_NAMES if "embeddings.class_embedding" in inside else VIT_NAMES
        inside = {_renamed(key, table): value for key, value in inside.items()}
        inside = _joined_qkv(inside)
    ignored = outside + [key for key in inside if re.match(OUTSIDE, key)]
    kept = {key: value.float() for key, value in inside.items() if not re.match(OUTSIDE, key)}
    for key, dims in (("cls_token", 3), ("pos_embed", 3)):
        if key in kept and kept[key].dim() < dims:
            kept[key] = kept[key].reshape(1, -1, kept[key].shape[-1])
    return kept, ignored


def _renamed(key: str, table: tuple[tuple[str, str], ...]) -> str:
    for old, new in table:
        if re.match(old, key):
            return re.sub(f"^{old}", new, key)
    return key


def _joined_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value of a block as timm's one matrix."""
    joined: dict[str, Tensor] = {}
    for key, value in state.items():
        if found := re.match(r"(blocks\.\d+\.attn\.)q\.(\w+)$", key):
            parts = [state.get(f"{found[1]}{x}.{found[2]}") for x in "qkv"]
            joined[f"{found[1]}qkv.{found[2]}"] = torch.cat([x for x in parts if x is not None])
        elif not re.match(r"blocks\.\d+\.attn\.[kv]\.", key):
            joined[key] = value
    return joined


def _fold_layer_scale(tower: ImageTower) -> None:
    """gamma * (W x + b) = (gamma W) x + gamma b: exact up to rounding."""
    for key in [key for key in tower.state if re.match(r"blocks\.\d+\.ls[12]\.gamma$", key)]:
        block, which = key[: key.index(".ls")], key[-7]
        gamma = tower.state.pop(key)  # (V,)
        layer = f"{block}.{'attn.proj' if which == '1' else 'mlp.fc2'}"
        tower.state[f"{layer}.weight"] = gamma[:, None] * tower.state[f"{layer}.weight"]
        tower.state[f"{layer}.bias"] = gamma * tower.state[f"{layer}.bias"]
        tower.folded.append(key)
    if "patch_embed.proj.bias" not in tower.state and "patch_embed.proj.weight" in tower.state:
        width = len(tower.state["patch_embed.proj.weight"])
        tower.state["patch_embed.proj.bias"] = torch.zeros(width)  # CLIP's has none


def _check_image(tower: ImageTower) -> None:
    """ValueError unless the tensors are those of a plain ViT with a [CLS] token."""
    state, where = tower.state, f"image_tower {tower.name}"
    lacking = [key for key in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight",
                               "blocks.0.attn.qkv.bias", "blocks.0.mlp.fc1.weight") if key not in state]  # fmt: skip
    if lacking:
        raise ValueError(
            f"{where}: is not a ViT that this program knows, it has no {', '.join(lacking)}. It holds {few(state)}. "
            "Known are timm's names, Hugging Face's ViT, DeiT, DINOv2 and CLIP, and BLIP's image half."
        )
    odd = [key for key in state if not re.match(KNOWN, key)]
    if odd:
        raise ValueError(f"{where}: has tensors that this image encoder has no place for: {few(odd)}.")
    width, mlp = state["cls_token"].shape[-1], len(state["blocks.0.mlp.fc1.weight"])
    if mlp != 4 * width:
        raise ValueError(f"{where}: its MLP is {mlp} wide; only 4 x {width} is supported.")


def _vits_of(tower: ImageTower, said: Mapping[str, Any]) -> list[str]:
    """Entries of VIT_SIZES with these shapes and with the activation and heads that are stated, where they are."""
    depth = 1 + max(int(key.split(".")[1]) for key in tower.state if key.startswith("blocks."))
    shapes = (tower.state["cls_token"].shape[-1], depth, "norm_pre.weight" in tower.state)
    found = [vit for vit, size in VIT_SIZES.items() if size.shapes == shapes]
    act, heads = said.get("hidden_act"), said.get("num_attention_heads")
    fitting = [
        vit for vit in found
        if act in (None, VIT_SIZES[vit].activation) and heads in (None, VIT_SIZES[vit].heads)
    ]  # fmt: skip
    if not fitting:
        stated = f", {heads or 'any'} heads, activation {act or 'any'}" if said else ""
        raise ValueError(
            f"image_tower {tower.name}: a ViT {shapes[0]} wide and {shapes[1]} deep{' with norm_pre' * shapes[2]}"
            f"{stated} is not in the table of configs/sizes.py ({', '.join(VIT_SIZES)}): add a line there."
        )
    return fitting


# ---- text -----------------------------------------------------------------------------------------------------------


def read_text_tower(source: str, cache_dir: str = "") -> TextTower:
    """A BERT: a Hugging Face folder, or a file of its tensors with config.json and vocabulary beside it.

    Token types have no place in BLIP's BERT: that of a single sentence, 0, is added to every position, which is exact.
    ValueError for other families, with the reason.
    """
    path = _path_of("text_tower", source, cache_dir, "a BERT's Hugging Face folder, or a file in it")
    state, said = _read_source(path)
    folder, where = path if path.is_dir() else path.parent, f"text_tower {path}"
    if not said:
        raise ValueError(f"{where}: there is no {CONFIG} beside it, which says how many attention heads it has.")
    config = _bert_config(said, where)
    for prefix in ("bert.", "text_encoder."):
        if any(key.startswith(prefix) for key in state):
            outside = [key for key in state if not key.startswith(prefix)]
            state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            break
    else:
        outside = []
    state = {re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", key): value for key, value in state.items()}
    state = {re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key): value.float() for key, value in state.items()}
    ignored = [key for key in state if re.match(r"pooler\.|cls\.|.*position_ids$|.*token_type_ids$", key)]
    tower = TextTower(str(path), {k: v for k, v in state.items() if k not in ignored}, config, folder)
    tower.ignored = outside + ignored
    _fold_token_types(tower)
    lacking = [key for key in ("embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight",
                               "encoder.layer.0.attention.self.query.weight") if key not in tower.state]  # fmt: skip
    if lacking:
        raise ValueError(f"{where}: is not a BERT, it has no {', '.join(lacking)}. It holds {few(state)}.")
    return tower


def _bert_config(said: Mapping[str, Any], where: str) -> MedConfig:
    """The sizes that config.json states; ValueError for what this encoder does not compute."""
    family = said.get("model_type", "bert")
    reasons = {
        "roberta": "its positions start at 2 and its vocabulary is a byte-level BPE",
        "xlm-roberta": "its positions start at 2 and its vocabulary is SentencePiece",
        "camembert": "its positions start at 2 and its vocabulary is SentencePiece",
        "distilbert": "its layers have other names and it has no token types",
        "albert": "its layers share their weights",
        "electra": "its embeddings are projected",
        "deberta-v2": "its attention has relative positions",
    }
    if family != "bert":
        reason = reasons.get(family, "only BERT's architecture is known here")
        raise ValueError(f"{where}: is a {family}, not a BERT: {reason}. Take a BERT of that language.")
    if said.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"{where}: hidden_act is {said['hidden_act']!r}; this encoder computes 'gelu' only.")
    if said.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(
            f"{where}: its position_embedding_type is {said['position_embedding_type']!r}; only 'absolute' is known."
        )
    names = [name for name in MedConfig.__dataclass_fields__ if name in said and name != "encoder_width"]
    return MedConfig(**{name: said[name] for name in names})


def _fold_token_types(tower: TextTower) -> None:
    types = tower.state.pop("embeddings.token_type_embeddings.weight", None)  # (types, D)
    if types is not None:
        key = "embeddings.position_embeddings.weight"
        tower.state[key] = tower.state[key] + types[:1]
        tower.folded.append("embeddings.token_type_embeddings.weight")


# ---- files ----------------------------------------------------------------------------------------------------------


def _path_of(key: str, source: str, cache_dir: str, what: str) -> Path:
    if "://" not in source and not Path(source).expanduser().exists():
        raise ValueError(f"{key} {source}: there is no such file or folder. Give {what}.")
    return local_path(source, cache_dir)


def _read_source(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config.json ({} where there is none) of a folder, or of a file and its folder."""
    folder, file = (path, None) if path.is_dir() else (path.parent, path)
    if file is None:
        found = [folder / name for name in TENSOR_FILES if (folder / name).exists()]
        if not found:
            raise ValueError(f"{folder}: has neither {' nor '.join(TENSOR_FILES)}.")
        file = found[0]
    config: dict[str, Any] = {}
    if (folder / CONFIG).exists():
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG}: not valid JSON ({error}).") from None
    state, _ = read_tensors(file)
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}, config
