"""Hugging Face folders of `BlipForImageTextRetrieval` (config.json, tensors, processor), read and written.

Source of the names: transformers' `models/blip/modeling_blip.py`, which the tests run on an exported folder. TABLE is
used in both directions. The image encoder's q, k and v are one matrix on both sides, so every tensor is only renamed.

What has no place in that class:
- `temp`, the temperature of the contrast, is the key `temp` of config.json, which transformers keeps when it saves the
  config again. `logit_scale_init_value` gets ln(1 / temp), its meaning in CLIP and BlipModel; only `temp` is exact.
- How many words and tokens of a caption are read, and the rules for alpha and grey pictures, are the keys max_words,
  max_tokens, flatten_alpha and grey_bits of config.json. BlipProcessor does not heed them.
- Momentum twins and queues are training's: not written; twins start at the online weights when a folder is loaded.
- [ENC] as first token: that class takes the ids it is given, so its caller must put id 30523 there to match.
"""

import json
import logging
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.files import few, new_folder
from checkpoints.model_card import CARD, model_card
from checkpoints.weights import QUEUES, TWINS, Sizes, WeightFile, read_sizes, read_weights, tokenizer_in
from configs.schema import TEMP_RANGE
from configs.sizes import VIT_SIZES, MedConfig
from transform.image import MEAN, STD
from transform.rgb import PixelRule
from transform.text import (
    CaptionTokenizer,
    blip_tokenizer,
    has_tokenizer,
    read_json,
    read_tokenizer,
)

log = logging.getLogger(__name__)

ARCHITECTURE = "BlipForImageTextRetrieval"
CONFIG, TENSORS = "config.json", "model.safetensors"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
TENSOR_FILES = (TENSORS, "pytorch_model.bin")
LENGTHS = ("max_words", "max_tokens")
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


def write_folder(
    folder: Path,
    state: dict[str, Tensor],
    med: MedConfig,
    name: str,
    extra: dict[str, Any] | None = None,
    sha256: str = "",
) -> None:
    """Write a folder that `BlipForImageTextRetrieval.from_pretrained` and `BlipProcessor.from_pretrained` load.

    The tensors are official ones of the file `name`, `extra` what else it says, `sha256` that of the weights.
    ValueError if there is something of the folder's name.
    """
    if read_sizes(state, name).norm_pre:
        raise ValueError(f"{name}: its image encoder is CLIP's, with a norm that {ARCHITECTURE} does not have.")
    extra = extra or {}
    trained = extra.get("config", {})
    colours = trained.get("image_mean") or MEAN, trained.get("image_std") or STD
    tokenizer = tokenizer_in(extra) or blip_tokenizer()
    online = {
        key: value.contiguous()
        for key, value in state.items()
        if key != "temp" and key not in QUEUES and not key.startswith(TWINS)
    }
    dtype = online["itm_head.weight"].dtype
    inputs = {key: trained[key] for key in PixelRule._fields if trained.get(key)}
    inputs |= {key: getattr(tokenizer, key) for key in LENGTHS}
    config = _to_hf_config(read_sizes(state, name), med, tokenizer, state["temp"].item(), dtype, inputs)
    tensors = rename(online, to_official=False, name=name)
    source = WeightFile(name, state, extra=extra)
    card = model_card(source, read_sizes(state, name, trained.get("vit", "")), sha256)
    with new_folder(folder) as made:
        save_file(tensors, made / TENSORS, metadata={"format": "pt"})
        (made / CONFIG).write_text(config, encoding="utf-8")
        (made / CARD).write_text(card, encoding="utf-8")
        _processor(read_sizes(state, name).image_size, tokenizer, colours).save_pretrained(made)
        shutil.copymode(made / CONFIG, made / TENSORS)  # safetensors makes it readable for its owner only


def _processor(image_size: int, tokenizer: CaptionTokenizer, colours: tuple[Sequence[float], Sequence[float]]) -> Any:
    """transformers' counterpart of this program's transforms: pixels differ by one grey level at most.

    It neither cleans captions nor puts [ENC] first.
    """
    from transformers import BlipImageProcessor, BlipProcessor

    pictures = BlipImageProcessor(
        size={"height": image_size, "width": image_size}, resample=Image.Resampling.BICUBIC,
        image_mean=list(colours[0]), image_std=list(colours[1]), do_convert_rgb=True,
    )  # fmt: skip
    return BlipProcessor(pictures, tokenizer.bert)


def _to_hf_config(
    sizes: Sizes,
    med: MedConfig,
    tokenizer: CaptionTokenizer,
    temp: float,
    dtype: torch.dtype,
    inputs: dict[str, Any],
) -> str:
    """The folder's config.json; MedConfig's words but encoder_width are BlipTextConfig's too.

    `inputs`: this program's own keys, how captions and pixels were read.
    """
    from transformers import BlipConfig  # seconds to import

    text = {field.name: getattr(med, field.name) for field in fields(MedConfig) if field.name != "encoder_width"}
    if not tokenizer.reads_as(blip_tokenizer()):  # else transformers' defaults
        text |= {"bos_token_id": tokenizer.enc - 1, "sep_token_id": tokenizer.sep, "eos_token_id": tokenizer.sep}
    config = BlipConfig(  # type: ignore[call-arg]  # it keeps keys that it does not know
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
        **inputs,
    )
    return config.to_json_string()


# ---- reading --------------------------------------------------------------------------------------------------------


def read_folder(folder: Path) -> WeightFile:
    """The weights of a Hugging Face folder under official names; `extra` has its text encoder's MedConfig."""
    _read_config(folder)
    for name in TENSOR_FILES:
        if (folder / name).exists():
            return adopt(read_weights(folder / name), folder)
    shards = [f"{name}.index.json" for name in TENSOR_FILES if (folder / f"{name}.index.json").exists()]
    hint = f" but {shards[0]}: save it again with transformers' save_pretrained(folder, max_shard_size='50GB')"
    raise ValueError(f"{folder}: has neither {' nor '.join(TENSOR_FILES)}{hint if shards else ''}.")


def is_foreign(file: WeightFile) -> bool:
    """Whether the tensors have transformers' names."""
    return any(key.startswith("vision_model.") for key in file.state)


def adopt(file: WeightFile, folder: Path) -> WeightFile:
    """The same under official names, with what the folder's config.json says, if there is one."""
    state, name, extra = (
        rename(file.state, to_official=True, name=file.name),
        file.name,
        dict[str, Any](hugging_face=True),
    )
    temp: float | None = None
    if (folder / CONFIG).exists():
        config, name = _read_config(folder), str(folder)
        med, temp = _from_hf_config(config, folder)
        sizes = read_sizes(state, name)
        heads = config["vision_config"]["num_attention_heads"]
        if sizes.vit and heads != VIT_SIZES[sizes.vit][2]:
            raise ValueError(f"{name}: {sizes.vit_words} with {heads} heads, but BLIP's has {VIT_SIZES[sizes.vit][2]}.")
        extra["text_config"] = {field.name: getattr(med, field.name) for field in fields(MedConfig)}
        extra |= _read_processor(folder, config)
    if temp is None:
        log.warning("%s: gives no temperature (`temp` in its config.json): using %s", name, INITIAL_TEMP)
        temp = INITIAL_TEMP
    return WeightFile(name, state | {"temp": torch.tensor(temp)}, file.ignored, extra)


def _read_processor(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """How inputs are read, as a checkpoint of this program says it: tokenizer, lengths, colours and rules for pixels.

    {} where a folder has none of them.
    """
    extra: dict[str, Any] = {}
    if has_tokenizer(folder):
        lengths = {key: config[key] for key in LENGTHS if isinstance(config.get(key), int)}
        extra["tokenizer"] = read_tokenizer(folder, **lengths).to_plain()
    for name in PROCESSORS:
        said = read_json(folder / name)
        said = said.get("image_processor", said)
        if "image_mean" in said and "image_std" in said:
            extra["config"] = {key: [float(x) for x in said[key]] for key in ("image_mean", "image_std")}
            break
    rule = {key: config[key] for key in PixelRule._fields if key in config}
    return extra | ({"config": extra.get("config", {}) | rule} if rule else {})


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
