"""Matching scores of many (image, text) pairs without padding and without computing anything twice.

`models/med.py` runs the layers on `ScoringTexts` (`models/arrangements.py`).

Shapes: N images, U distinct texts, b images of a block, n image tokens, V image width, D text width, E embedding width;
of one pass: P pairs, T text tokens, m images.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from models.arrangements import ScoringTexts, on_device, ranges
from models.blip_retrieval import BLIP_Retrieval
from utils import Progress, all_reduce_sum, never_stop

CPU_TOKENS = 4096  # of a pass on a CPU: beyond its cache, activations cost 8 percent more (ViT-B, one core)


@dataclass(frozen=True)
class EncodedTexts:
    """Distinct texts: features (U, E), and every token's state after layer 0's text part, text after text."""

    feat: Tensor
    distinct: np.ndarray  # (M,) which of the U texts each caption is
    lengths: np.ndarray  # (U,)
    start: np.ndarray  # (U,) index of a text's first token in `states`
    states: Tensor  # (sum of lengths, D)


@dataclass(frozen=True)
class EncodedImages:
    """Features of all images (N, E), tokens (b, n, V) of this process's blocks."""

    feat: Tensor
    blocks: list[range]
    tokens: list[Tensor]


def score_pairs(
    model: BLIP_Retrieval,
    images: EncodedImages,
    texts: EncodedTexts,
    image: np.ndarray,
    text: np.ndarray,
    tokens_per_pass: int,
    poll: Callable[[], None] = never_stop,
) -> np.ndarray:
    """Matching logits (P,) of pairs (image, distinct text) in image order; each process scores its own images."""
    device = model.temp.device
    scores = torch.zeros(len(image), dtype=model.temp.dtype, device=device)
    spans = [np.searchsorted(image, [block.start, block.stop]) for block in images.blocks]
    most = min(tokens_per_pass, CPU_TOKENS) if device.type == "cpu" else tokens_per_pass
    progress = Progress("re-rank", int(sum(end - begin for begin, end in spans)), "pairs")
    with model.autocast():  # around all passes: the weights are cast once
        for block, tokens, (begin, end) in zip(images.blocks, images.tokens, spans, strict=True):
            tokens = tokens.to(device, non_blocking=True)
            tokens = tokens.to(model.autocast_dtype or tokens.dtype)  # once, not in every product
            for part in _passes(texts.lengths[text[begin:end]], most):
                poll()
                part = slice(begin + part.start, begin + part.stop)
                scores[part] = _score(model, tokens, image[part] - block.start, texts, text[part])
                progress.add(part.stop - part.start)
    return all_reduce_sum(scores).cpu().numpy()


def _passes(lengths: np.ndarray, tokens_per_pass: int) -> Iterator[slice]:
    """Cut pairs into runs of about `tokens_per_pass` tokens."""
    ends = np.flatnonzero(np.diff(np.cumsum(lengths) // tokens_per_pass)) + 1
    for begin, end in pairwise([0, *ends.tolist(), len(lengths)]):
        if begin < end:
            yield slice(begin, end)


def _score(model: BLIP_Retrieval, tokens: Tensor, image: np.ndarray, texts: EncodedTexts, text: np.ndarray) -> Tensor:
    """One pass: pairs (index into tokens (b, n, V), text) in image order -> matching logits (P,) on the device."""
    device = model.temp.device
    image_tokens = tokens[image[0] : image[-1] + 1]  # (m, n, V)
    order = np.argsort(texts.lengths[text], kind="stable")
    image, text = image[order] - image[0], text[order]
    lengths = texts.lengths[text]
    arrangement = ScoringTexts(image, lengths, device)
    x = texts.states[on_device(device, ranges(texts.start[text], lengths))]  # (T, D)
    layers = model.text_encoder.encoder.layer
    for i, layer in enumerate(layers):
        last = i == len(layers) - 1
        if i > 0:
            x = layer.text_part(x, arrangement, cls_only=last)
        elif last:
            x = arrangement.first(x)
        x = layer.image_part(x, arrangement, image_tokens)
    with torch.autocast(device.type, enabled=False):
        logits = model.itm_head(x.to(model.itm_head.weight.dtype))[:, 1]
    return torch.empty_like(logits).index_copy_(0, on_device(device, order), logits)
