"""Hugging Face folders of `BlipForImageTextRetrieval` (config.json, model.safetensors), read and written.

Source of the names: transformers' `models/blip/modeling_blip.py`, which the tests run on an exported folder. TABLE is
used in both directions. The image encoder's q, k and v are one matrix on both sides, so every tensor is only renamed.

Three things have no place in that class:
- `temp`, the temperature of the contrast, is the key `temp` of config.json, which transformers keeps when it saves the
  config again. `logit_scale_init_value` gets ln(1 / temp), its meaning in CLIP and BlipModel; only `temp` is exact.
- Momentum twins and queues are training's: not written; twins start at the online weights when a folder is loaded.
- [ENC] as first token: that class takes the ids it is given, so its caller must put id 30523 there to match.
"""

import json
import logging
import math
import os
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.weights import QUEUES, TWINS, DamagedFile, Sizes, WeightFile, few, official_names, read_sizes
from configs.schema import TEMP_RANGE
from configs.sizes import VIT_SIZES, MedConfig

log = logging.getLogger(__name__)

ARCHITECTURE = "BlipForImageTextRetrieval"
CONFIG, TENSORS = "config.json", "model.safetensors"
INITIAL_TEMP = 0.07  # BLIP's, for folders that were converted without it
VIT_NORM_EPS = 1e-6  # transformers' default is 1e-5

# Beginnings of official names and of transformers'; {n} is a layer's number.
TABLE = (
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
    ("visual_encoder.blocks.{n}.norm1.", "vision_model.encoder.layers.{n}.layer_norm1."),
    ("visual_encoder.blocks.{n}.attn.qkv.", "vision_model.encoder.layers.{n}.self_attn.qkv."),
    ("visual_encoder.blocks.{n}.attn.proj.", "vision_model.encoder.layers.{n}.self_attn.projection."),
    ("visual_encoder.blocks.{n}.norm2.", "vision_model.encoder.layers.{n}.layer_norm2."),
    ("visual_encoder.blocks.{n}.mlp.", "vision_model.encoder.layers.{n}.mlp."),
    ("visual_encoder.norm.", "vision_model.post_layernorm."),
    ("text_encoder.", "text_encoder."),
    ("vision_proj.", "vision_proj."),
    ("text_proj.", "text_proj."),
    ("itm_head.", "itm_head."),
)


def rename(state: dict[str, Tensor], to_official: bool, name: str) -> dict[str, Tensor]:
    """`state` under the other side's names; ValueError naming keys that TABLE does not know."""
    renamed, unknown = {}, []
    for key, value in state.items():
        new = _rename_key(key, to_official)
        if new is None:
            unknown.append(key)
        else:
            renamed[new] = value
    if unknown:
        raise ValueError(f"{name}: {len(unknown)} tensors are not {ARCHITECTURE}'s: {few(unknown)}.")
    return renamed


def _rename_key(key: str, to_official: bool) -> str | None:
    for pair in TABLE:
        new, old = pair if to_official else pair[::-1]
        found = re.match(re.escape(old).replace(r"\{n\}", r"(\d+)"), key)
        if found:
            return new.replace("{n}", (*found.groups(), "")[0]) + key[found.end() :]
    return None


# ---- writing --------------------------------------------------------------------------------------------------------


def write_folder(folder: Path, state: dict[str, Tensor], med: MedConfig, name: str) -> None:
    """Write a folder that `BlipForImageTextRetrieval.from_pretrained` loads, from official tensors of the file `name`.

    Each of its two files replaces a former one in one step, the tensors first.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; name the folder to write to.")
    online = {
        key: value.contiguous()
        for key, value in state.items()
        if key != "temp" and key not in QUEUES and not key.startswith(TWINS)
    }
    config = _to_hf_config(read_sizes(state, name), med, state["temp"].item(), online["itm_head.weight"].dtype)
    tensors = rename(online, to_official=False, name=name)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / (TENSORS + ".part")
    try:
        save_file(tensors, part, metadata={"format": "pt"})
        os.replace(part, folder / TENSORS)
        part = folder / (CONFIG + ".part")
        part.write_text(config, encoding="utf-8")
        os.replace(part, folder / CONFIG)
        shutil.copymode(folder / CONFIG, folder / TENSORS)  # safetensors makes it readable for its owner only
    finally:
        part.unlink(missing_ok=True)


def _to_hf_config(sizes: Sizes, med: MedConfig, temp: float, dtype: torch.dtype) -> str:
    """The folder's config.json; MedConfig's words but encoder_width are BlipTextConfig's too."""
    from transformers import BlipConfig  # seconds to import

    text = {field.name: getattr(med, field.name) for field in fields(MedConfig) if field.name != "encoder_width"}
    config = BlipConfig(  # type: ignore[call-arg]  # `temp`: it keeps keys that it does not know
        text_config=text | {"encoder_hidden_size": sizes.width, "is_decoder": True},  # True: with cross-attention
        vision_config={
            "hidden_size": sizes.width,
            "intermediate_size": 4 * sizes.width,
            "num_hidden_layers": sizes.depth,
            "num_attention_heads": VIT_SIZES[sizes.vit][2],
            "image_size": sizes.image_size,
            "patch_size": sizes.patch_size,
            "layer_norm_eps": VIT_NORM_EPS,
        },
        image_text_hidden_size=sizes.embed_dim,
        logit_scale_init_value=-math.log(max(temp, TEMP_RANGE[0])),
        architectures=[ARCHITECTURE],
        dtype=str(dtype).removeprefix("torch."),
        temp=temp,
    )
    return config.to_json_string()


# ---- reading --------------------------------------------------------------------------------------------------------


def read_folder(folder: Path) -> WeightFile:
    """The weights of a Hugging Face folder under official names; `extra` has its text encoder's MedConfig."""
    config = _read_config(folder)
    med, temp = _from_hf_config(config, folder)
    state, ignored = official_names(_read_tensors(folder))
    state = rename(state, to_official=True, name=str(folder))
    sizes = read_sizes(state, str(folder))
    heads = config["vision_config"]["num_attention_heads"]
    if sizes.vit and heads != VIT_SIZES[sizes.vit][2]:
        raise ValueError(f"{folder}: {sizes.vit_words} with {heads} heads, but BLIP's has {VIT_SIZES[sizes.vit][2]}.")
    if temp is None:
        log.warning("%s: gives no temperature (`temp` in its config.json): using %s", folder, INITIAL_TEMP)
        temp = INITIAL_TEMP
    state["temp"] = torch.tensor(temp)
    text_config = {field.name: getattr(med, field.name) for field in fields(MedConfig)}
    return WeightFile(str(folder), state, ignored, {"hugging_face": True, "text_config": text_config})


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json with transformers' defaults filled in: it leaves out what equals them."""
    from transformers import BlipConfig

    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder}: not a Hugging Face folder, it has no {CONFIG}.") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}).") from None
    named = values.get("architectures") or [] if isinstance(values, dict) else []
    if not isinstance(values, dict) or values.get("model_type") != "blip" or (named and ARCHITECTURE not in named):
        raise ValueError(f"{path}: describes {', '.join(named) or 'no BLIP model'}; only {ARCHITECTURE} can be loaded.")
    try:
        return BlipConfig.from_dict(values).to_dict()
    except Exception as error:  # transformers validates with exception classes of its own
        raise ValueError(f"{path}: transformers refuses it: {' '.join(str(error).split())}") from None


def _from_hf_config(config: dict[str, Any], folder: Path) -> tuple[MedConfig, float | None]:
    text, vision = config["text_config"], config["vision_config"]
    for activation in (text["hidden_act"], vision["hidden_act"]):
        if activation != "gelu":
            raise ValueError(f"{folder / CONFIG}: hidden_act is {activation!r}; this program computes 'gelu' only.")
    if vision["layer_norm_eps"] != VIT_NORM_EPS:
        log.info(
            "%s: says layer_norm_eps %g for the image encoder; computed with BLIP's %g",
            folder, vision["layer_norm_eps"], VIT_NORM_EPS,
        )  # fmt: skip
    values = {field.name: text[field.name] for field in fields(MedConfig) if field.name in text}
    temp = config.get("temp")
    return MedConfig(**values | {"encoder_width": vision["hidden_size"]}), temp if isinstance(temp, float) else None


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSORS
    if not path.exists():
        other = [name for name in ("pytorch_model.bin", TENSORS + ".index.json") if (folder / name).exists()]
        hint = f" but {other[0]}: save it again with transformers' save_pretrained(folder, max_shard_size='50GB')"
        raise ValueError(f"{folder}: has no {TENSORS}{hint if other else ''}.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DamagedFile(
            f"{path}: not a safetensors file, or cut short ({error}). Copy or download it again."
        ) from None
