"""Sizes of the two encoders: one table of image encoders, and the text encoder's JSON (BLIP's `med_config.json`).

Sources: Dosovitskiy et al. 2021 (arXiv 2010.11929) for ViT-B, L and H; Touvron et al. 2021 (DeiT, arXiv 2012.12877)
for tiny and small; Radford et al. 2021 (CLIP, arXiv 2103.00020); BLIP's `models/vit.py` for drop-path rates.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class VitSize(NamedTuple):
    """An image encoder."""

    width: int
    depth: int
    heads: int
    drop_path: float  # stochastic depth of the last block; the blocks before it have proportionally less
    activation: str = "gelu"  # or quick_gelu, x * sigmoid(1.702 x)
    norm_pre: bool = False  # a LayerNorm before the first block, as CLIP has
    norm_eps: float = 1e-6

    @property
    def shapes(self) -> tuple[int, int, bool]:
        """What can be told from weights."""
        return self.width, self.depth, self.norm_pre


# base and large are BLIP's. huge and CLIP's are for towers to start from, the others also for small machines and tests.
# CLIP's activation leaves no trace in weights: OpenAI's models have quick_gelu, OpenCLIP's newer ones gelu.
VIT_SIZES = {
    "base": VitSize(768, 12, 12, 0.0),
    "large": VitSize(1024, 24, 16, 0.1),
    "huge": VitSize(1280, 32, 16, 0.1),
    "small": VitSize(384, 12, 6, 0.0),
    "tiny": VitSize(192, 12, 3, 0.0),
    "nano": VitSize(96, 6, 3, 0.0),
    "clip_base": VitSize(768, 12, 12, 0.0, "quick_gelu", True, 1e-5),
    "clip_large": VitSize(1024, 24, 16, 0.1, "quick_gelu", True, 1e-5),
    "openclip_base": VitSize(768, 12, 12, 0.0, "gelu", True, 1e-5),
    "openclip_large": VitSize(1024, 24, 16, 0.1, "gelu", True, 1e-5),
}


@dataclass(frozen=True)
class MedConfig:
    """The text encoder's sizes, as in BLIP's `med_config.json`."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 30524
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    encoder_width: int = 768  # of the image tokens; the model sets it to its ViT's width


# What a BERT config may also say, without meaning for this encoder.
_IGNORED = {
    "architectures", "model_type", "type_vocab_size", "pad_token_id", "add_cross_attention", "hidden_act",
}  # fmt: skip


def load_med_config(path: str | Path) -> MedConfig:
    """Read a text encoder's JSON; a key that this encoder cannot honour is a ValueError naming it."""
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"med_config: there is no file {path}.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"med_config: {path} is not valid JSON ({error}).") from None
    unknown = set(values) - set(MedConfig.__dataclass_fields__) - _IGNORED
    if unknown:
        raise ValueError(
            f"{path}: unknown text-encoder key(s) {sorted(unknown)}; known: {sorted(MedConfig.__dataclass_fields__)}."
        )
    if values.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"{path}: hidden_act is {values['hidden_act']!r}; this encoder computes 'gelu' only.")
    for key, knob in MedConfig.__dataclass_fields__.items():
        value, wanted = values.get(key, knob.default), "a whole number" if knob.type is int else "a number"
        if isinstance(value, bool) or not isinstance(value, int if knob.type is int else int | float):
            raise ValueError(f"{path}: {key} must be {wanted}, got {value!r}.")
    config = MedConfig(**{key: value for key, value in values.items() if key not in _IGNORED})
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"{path}: hidden_size {config.hidden_size} is not a multiple of "
            f"num_attention_heads {config.num_attention_heads}."
        )
    return config
