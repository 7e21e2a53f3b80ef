"""Training less than the whole model: frozen towers or their lowest layers, and slower ones further from the heads.

A frozen layer computes what it always did, dropout included; its weights take no gradient. Its momentum twin would
stay equal for ever, so it is the same tensors. Cross-attention never counts as part of a tower: a BERT has none.

Source of the layer-wise rates: Clark et al. 2020 (ELECTRA, arXiv 2003.10555, appendix A); Bao et al. 2022 (BEiT,
arXiv 2106.08254) for image encoders.
"""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from checkpoints.weights import TWINS
from configs.schema import RetrievalConfig
from models.blip_retrieval import BLIP_Retrieval
from models.lora import LowRank, add_lora


def train_less(model: BLIP_Retrieval, cfg: RetrievalConfig) -> None:
    """The config's `lora` and `freeze`; call it once, on a new model, before weights are loaded."""
    if cfg.lora:
        add_lora(model, cfg.lora)
    freeze(model, cfg.freeze or [])


def freeze(model: BLIP_Retrieval, parts: Sequence[str]) -> None:
    """Freeze `image`, `text`, or `image:N`, `text:N`: embeddings and the N lowest layers, but for their A and B.

    ValueError for more layers than there are.
    """
    for part in parts:
        side, _, count = part.partition(":")
        if side == "image":
            _freeze_image(model, _depth(part, count, len(model.visual_encoder.blocks)), whole=not count)
        else:
            _freeze_text(model, _depth(part, count, len(model.text_encoder.encoder.layer)))


def _depth(part: str, count: str, layers: int) -> int:
    depth = int(count) if count else layers
    if depth > layers:
        raise ValueError(f"freeze: {part}, but that encoder has {layers} layers: lower the number")
    return depth


def _freeze_image(model: BLIP_Retrieval, depth: int, whole: bool) -> None:
    online, twin = model.visual_encoder, model.visual_encoder_m
    names = ["cls_token", "pos_embed", "patch_embed", "norm_pre", *(["norm"] if whole else [])]
    for name in names:
        _share(online, twin, name)
    for i in range(depth):
        _share(online.blocks, twin.blocks, str(i))
    still = [not any(p.requires_grad for p in block.parameters()) for block in online.blocks]
    for encoder in (online, twin):
        encoder.stem_depth = (still + [False]).index(False)
        encoder.stem_frozen = not any(block.stochastic for block in encoder.blocks[: encoder.stem_depth])


def _freeze_text(model: BLIP_Retrieval, depth: int) -> None:
    online, twin = model.text_encoder, model.text_encoder_m
    _share(online, twin, "embeddings")
    for i in range(depth):
        for name in ("attention", "intermediate", "output"):
            _share(online.encoder.layer[i], twin.encoder.layer[i], name)


def _share(online: Any, twin: Any, name: str) -> None:
    """Freeze a module or a parameter, and make it the twin's too, unless low-rank updates in it go on training."""
    part = getattr(online, name)
    if isinstance(part, nn.Parameter):
        part.requires_grad_(False)
    else:
        updates = [module for module in part.modules() if isinstance(module, LowRank)]
        part.requires_grad_(False)
        for update in updates:
            update.requires_grad_(True)
        if updates:
            return
    setattr(twin, name, part)


def depths_below_heads(model: BLIP_Retrieval) -> dict[str, int]:
    """How many layers lie above each parameter that trains, by name, its own included: heads and cross-attention 0."""
    image, text = len(model.visual_encoder.blocks), len(model.text_encoder.encoder.layer)
    depths = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = re.match(r"(visual_encoder\.blocks|text_encoder\.encoder\.layer)\.(\d+)\.(?!crossattention)", name)
        top = image if name.startswith("visual_encoder.") else text
        if layer:
            depths[name] = top - int(layer[2])
        elif re.match(r"visual_encoder\.(cls_token|pos_embed|patch_embed|norm_pre)|text_encoder\.embeddings", name):
            depths[name] = top + 1
        else:
            depths[name] = 0
    return depths


def training_table(model: BLIP_Retrieval, layer_decay: float) -> list[str]:
    """A line for each part of the model: parameters that train, frozen ones, and the factors on their rate."""
    depths = depths_below_heads(model)
    parts = {
        "image embeddings": r"visual_encoder\.(cls_token|pos_embed|patch_embed|norm_pre)",
        "image block {}": r"visual_encoder\.blocks\.(\d+)\.",
        "text embeddings": r"text_encoder\.embeddings",
        "text layer {}": r"text_encoder\.encoder\.layer\.(\d+)\.(?!crossattention)",
        "cross-attention": r"text_encoder\.encoder\.layer\.\d+\.crossattention",
        "heads": r"visual_encoder\.norm\.|vision_proj|text_proj|itm_head|temp",
    }
    rows: dict[str, list[float]] = {}
    named = [(name, p) for name, p in model.named_parameters() if not name.startswith(TWINS)]
    for words, pattern in parts.items():
        for name, parameter in named:
            if found := re.match(pattern, name):
                row = rows.setdefault(words.format(*found.groups()), [0, 0, 0.0])
                row[not parameter.requires_grad] += parameter.numel()
                row[2] = max(row[2], layer_decay ** depths[name] if name in depths else 0.0)
    return [
        f"  {words:<18} {trained / 1e6:8.2f} M train {frozen / 1e6:8.2f} M frozen   rate x {scale:.3g}"
        for words, (trained, frozen, scale) in rows.items()
    ]
