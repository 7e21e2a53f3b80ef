"""Which model a config describes, and how training starts from separate encoders.

Sizes, text encoder, tokenizer and normalisation belong to weights. A config names them, or leaves them to the weights
that are loaded (`vit: auto`, `med_config: auto`, no `image_mean`): to the checkpoint, else to the towers.

Shapes: V image width, p patch side, D text width, W vocabulary.
"""

import logging
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_patch_embed
from torch import Tensor

from checkpoints.files import few
from checkpoints.load import LoadReport, open_weights
from checkpoints.towers import CLIP, IMAGENET, ImageTower, TextTower, read_image_tower, read_text_tower
from checkpoints.weights import (
    QUEUES,
    TWINS,
    WeightFile,
    merge_lora,
    read_sizes,
    require_equal_tokenizers,
    resample_pos_embed,
    unmerge_lora,
)
from configs.schema import AUTO, RetrievalConfig
from configs.sizes import MedConfig, load_med_config
from models.blip_retrieval import BLIP_Retrieval
from transform.image import MEAN, STD
from transform.text import CaptionTokenizer, blip_tokenizer, has_tokenizer, read_tokenizer
from utils import find_path

log = logging.getLogger("blip")

SPECIAL = 2  # [DEC] and [ENC], behind the vocabulary
PADDED = 128  # rows of word embeddings that a tower may have beyond its vocabulary, to a round number


@dataclass(frozen=True)
class Plan:
    """A model that can be built: the config with nothing left open, its text encoder, and the towers it starts from."""

    cfg: RetrievalConfig
    med: MedConfig
    tokenizer: CaptionTokenizer = field(default_factory=blip_tokenizer)
    image: ImageTower | None = None
    text: TextTower | None = None


def plan_model(cfg: RetrievalConfig, source: str = "") -> Plan:
    """Fill in what the config leaves to weights: those of the checkpoint `source`, else of the towers.

    ValueError where the config names other sizes than the towers have, or nothing says what is left open.
    """
    file = open_weights(source, cfg.cache_dir) if source else None
    if file is not None:
        return _plan_of_checkpoint(cfg, file)
    for key, tower in (("vit", "image_tower"), ("med_config", "text_tower")):
        if getattr(cfg, key) == AUTO and not getattr(cfg, tower):
            raise ValueError(
                f"{key}: auto takes the sizes from {tower} or a checkpoint (pretrained, or what --evaluate loads): set "
                f"one of them, or {key} to {'a size such as base' if key == 'vit' else 'configs/med_config.json'}."
            )
    image = read_image_tower(cfg.image_tower, cfg.cache_dir) if cfg.image_tower else None
    text = read_text_tower(cfg.text_tower, cfg.cache_dir) if cfg.text_tower else None
    if image:
        cfg = _with_image_tower(cfg, image)
    tokenizer = _named_tokenizer(cfg, text)
    if text:
        med = _with_text_tower(cfg, text, tokenizer)
    else:
        med = replace(load_med_config(find_path(cfg.med_config)), vocab_size=tokenizer.vocab_size)
    if cfg.image_mean is None:
        cfg = replace(cfg, image_mean=list(MEAN), image_std=list(STD))
    return Plan(cfg, med, tokenizer, image, text)


def _named_tokenizer(cfg: RetrievalConfig, tower: TextTower | None) -> CaptionTokenizer:
    """The one that the config names, or that of the text tower; else BLIP's."""
    lengths = cfg.max_words, cfg.max_tokens
    named = _read_tokenizer("tokenizer", find_path(cfg.tokenizer), *lengths) if cfg.tokenizer else None
    if tower is None:
        return named or blip_tokenizer(*lengths)
    if named is None:
        return _read_tokenizer("text_tower", tower.folder, *lengths)
    if has_tokenizer(tower.folder) and (its := read_tokenizer(tower.folder)).words != named.words:
        raise ValueError(
            f"tokenizer {named} is another vocabulary than that of the text_tower, {its}: each embedding would stand "
            "for another word. Remove tokenizer."
        )
    return named


def _read_tokenizer(key: str, folder: Path, max_words: int, max_tokens: int) -> CaptionTokenizer:
    if not folder.is_dir():
        raise ValueError(f"{key} {folder}: there is no such folder; name that of a BERT's tokenizer.")
    try:
        return read_tokenizer(folder, max_words, max_tokens)
    except ValueError as error:
        raise ValueError(f"{key} {error}") from None


def start_from_towers(model: BLIP_Retrieval, plan: Plan) -> LoadReport:
    """Copy the towers into the model and its momentum twins; the rest stays random. The report names every tensor."""
    target = merge_lora(model.state_dict())
    kinds, state = [], {}
    report = LoadReport()
    for tower, prefix in ((plan.image, "visual_encoder."), (plan.text, "text_encoder.")):
        if tower is None:
            continue
        for key, value in tower.state.items():
            state[prefix + key] = value
        report.folded.extend(prefix + key for key in tower.folded)
        report.ignored.extend(tower.ignored)
        kinds.append(tower.name)
    report.resampled.extend(_resample(state, target))
    wrong = [key for key in state if key not in target or state[key].shape != target[key].shape]
    if wrong:
        shapes = ", ".join(f"{key} {tuple(state[key].shape)}" for key in wrong[:5])
        raise ValueError(f"{' and '.join(kinds)}: {len(wrong)} tensors do not fit the model: {shapes}.")
    report.loaded.extend(key for key in state if key not in report.resampled)
    online = [key for key in target if not key.startswith(TWINS) and key not in QUEUES]
    report.random.extend(key for key in online if key not in state)
    model.load_state_dict(unmerge_lora(state, model.state_dict()), strict=False)
    model.copy_params()
    report.seeded.extend(key for key in target if key.startswith(TWINS))
    report.missing.extend(key for key in target if key in QUEUES)
    report = replace(report, kind=f"towers {' and '.join(kinds)}")
    log.info("%s", report)
    for name in ("resampled", "folded", "random", "ignored"):
        if keys := getattr(report, name):
            log.info("  %s: %s", name, few(_grouped(keys), 12))
    return report


def _resample(state: dict[str, Tensor], target: dict[str, Tensor]) -> list[str]:
    """In place: image positions of another grid, patch kernels of another side. Returns their names."""
    resampled = []
    key = "visual_encoder.pos_embed"  # (1, 1 + g * g, V)
    if key in state and state[key].shape[1] != target[key].shape[1]:
        state[key] = resample_pos_embed(state[key], target[key].shape[1], key)
        resampled.append(key)
    key = "visual_encoder.patch_embed.proj.weight"  # (V, 3, p, p)
    if key in state and state[key].shape != target[key].shape:
        state[key] = resample_patch_embed(state[key], list(target[key].shape[2:]))
        resampled.append(key)
    return resampled


def _grouped(keys: list[str]) -> list[str]:
    """Names with layers' numbers as {n}, each once, with how many tensors it stands for."""
    groups: dict[str, int] = {}
    for key in keys:
        name = re.sub(r"\.\d+\.", ".{n}.", key)
        groups[name] = groups.get(name, 0) + 1
    return [name if count == 1 else f"{name} (x {count})" for name, count in groups.items()]


def _with_image_tower(cfg: RetrievalConfig, tower: ImageTower) -> RetrievalConfig:
    where = f"image_tower {tower.name}"
    if cfg.vit == AUTO and len(tower.vits) > 1:
        raise ValueError(
            f"{where}: may be {' or '.join(tower.vits)}, which differ in what weights do not show (the activation): "
            "set vit to the right one."
        )
    if cfg.vit != AUTO and cfg.vit not in tower.vits:
        raise ValueError(f"{where}: is vit {' or '.join(tower.vits)}, the config asks for {cfg.vit}: set vit: auto.")
    mean, std = cfg.image_mean or tower.mean, cfg.image_std or tower.std
    if not (mean and std):
        raise ValueError(
            f"{where}: does not say how its images were normalised. Set image_mean and image_std: ImageNet's "
            f"{[*IMAGENET[0]]} and {[*IMAGENET[1]]} (DINOv2, DeiT, MAE), CLIP's {[*CLIP[0]]} and {[*CLIP[1]]}, or "
            "[0.5, 0.5, 0.5] for both (Google's ViT)."
        )
    vit = tower.vits[0] if cfg.vit == AUTO else cfg.vit
    return replace(cfg, vit=vit, image_mean=[float(x) for x in mean], image_std=[float(x) for x in std])


def _with_text_tower(cfg: RetrievalConfig, tower: TextTower, tokenizer: CaptionTokenizer) -> MedConfig:
    """The tower's sizes, with [DEC] and [ENC] behind its vocabulary; they start where [CLS] is."""
    words = tower.state["embeddings.word_embeddings.weight"]  # (W or more, D): some are padded to a round number
    if not 0 <= len(words) - len(tokenizer.words) <= PADDED:
        raise ValueError(
            f"text_tower {tower.name}: has embeddings of {len(words)} word pieces, but the vocabulary of "
            f"{tokenizer.name} has {len(tokenizer.words)}: they do not belong together."
        )
    special = words[tokenizer.cls].expand(SPECIAL, -1)
    tower.state["embeddings.word_embeddings.weight"] = torch.cat([words[: len(tokenizer.words)], special])
    med = replace(tower.config, vocab_size=tokenizer.vocab_size)
    if cfg.med_config != AUTO:
        wanted = load_med_config(find_path(cfg.med_config))
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
        different = [f"{key} {getattr(med, key)} (config: {getattr(wanted, key)})" for key in sizes
                     if getattr(med, key) != getattr(wanted, key)]  # fmt: skip
        if different:
            raise ValueError(f"text_tower {tower.name}: has {', '.join(different)}: set med_config: auto.")
        med = _with_towers_own(wanted, med)
    return med


def _with_towers_own(wanted: MedConfig, tower: MedConfig) -> MedConfig:
    """`wanted`, with what a text tower decides whatever the config's JSON says."""
    return replace(wanted, layer_norm_eps=tower.layer_norm_eps, max_position_embeddings=tower.max_position_embeddings)


def _plan_of_checkpoint(cfg: RetrievalConfig, file: WeightFile) -> Plan:
    trained: dict[str, Any] = file.extra.get("config", {})
    if cfg.vit == AUTO:
        cfg = replace(cfg, vit=read_sizes(file.state, file.name, trained.get("vit", "")).vit or "base")
    if cfg.med_config == AUTO:
        if "text_config" not in file.extra:
            raise ValueError(f"{file.name}: does not state its text encoder's sizes: set med_config to their JSON.")
        med = MedConfig(**file.extra["text_config"])
    else:
        med = load_med_config(find_path(cfg.med_config))
        if cfg.text_tower and "text_config" in file.extra:
            med = _with_towers_own(med, MedConfig(**file.extra["text_config"]))
    mean, std = trained.get("image_mean") or list(MEAN), trained.get("image_std") or list(STD)
    if cfg.image_mean is not None and (cfg.image_mean, cfg.image_std) != (mean, std):
        raise ValueError(
            f"{file.name}: was trained with image_mean {mean} and image_std {std}, the config says {cfg.image_mean} "
            f"and {cfg.image_std}: remove the two keys."
        )
    tokenizer = _tokenizer_of_checkpoint(cfg, file)
    if "tokenizer" in file.extra:
        med = replace(med, vocab_size=tokenizer.vocab_size)
    return Plan(replace(cfg, image_mean=mean, image_std=std), med, tokenizer)


def _tokenizer_of_checkpoint(cfg: RetrievalConfig, file: WeightFile) -> CaptionTokenizer:
    """The file's own, with the config's lengths; what the config names, if that is still there, must be the same."""
    named = next((Path(folder) for folder in (cfg.tokenizer, cfg.text_tower) if folder), None)
    if named is not None and named.is_dir():
        require_equal_tokenizers(file.name, file.tokenizer, read_tokenizer(named))
    return replace(file.tokenizer, max_words=cfg.max_words, max_tokens=cfg.max_tokens)
