"""Matching scores of many (image, text) pairs without padding and without computing anything twice.

`models/med.py` runs the layers; `PackedTexts` tells it how the queries of a pass meet their keys.

Shapes: N images, U distinct texts, b images of a block, n image tokens, V image width, D text width, E embedding width,
H heads, d = D / H; of one pass: P pairs, T text tokens, m images.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.blip_retrieval import BLIP_Retrieval
from models.ragged import on_device
from utils import Progress, all_reduce_sum

# All but cuDNN's attention: it plans each new shape for tens of milliseconds, and here every pass has new shapes.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class EncodedTexts:
    """Distinct texts: features (U, E), and every token's state after layer 0's text part, text after text."""

    feat: Tensor
    distinct: np.ndarray  # (M,) which of the U texts each caption is
    lengths: np.ndarray  # (U,)
    start: np.ndarray  # (U,) row of a text's first token in `states`
    states: Tensor  # (sum of lengths, D)


@dataclass(frozen=True)
class EncodedImages:
    """Features of all images (N, E), tokens (b, n, V) of this process's blocks."""

    feat: Tensor
    blocks: list[range]
    tokens: list[Tensor]


class PackedTexts:
    """Pairs of one pass without padding: tokens lie by text length, then by image (`models/med.py` runs the layers).

    Texts of one length form a rectangle for self-attention. Cross-attention has no mask per text, so all tokens that
    look at one image are a single query sequence against it.
    """

    def __init__(self, image: np.ndarray, lengths: np.ndarray, device: torch.device):
        """`image` (P,) in [0, m) and `lengths` (P,), in length order."""
        self.num_pairs = len(lengths)
        self.groups = [(int(n), int(length)) for length, n in zip(*np.unique(lengths, return_counts=True), strict=True)]
        first = np.cumsum(lengths) - lengths
        pairs = np.argsort(image, kind="stable")
        self.first_token = on_device(device, first)
        self.pairs_by_image = _Order(pairs, np.bincount(image), device)
        tokens = ranges(first[pairs], lengths[pairs])
        self.tokens_by_image = _Order(tokens, np.bincount(image, lengths).astype(int), device)

    def first(self, x: Tensor) -> Tensor:
        return x[self.first_token]  # (T, D) -> (P, D)

    def attend_text(self, q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float) -> Tensor:
        """q (T, D), or (P, D) for first tokens alone; k and v (T, D) -> like q."""
        sizes = [n * length for n, length in self.groups]
        q_sizes = [n for n, _ in self.groups] if len(q) == self.num_pairs else sizes
        q, k, v = (x.unflatten(1, (heads, -1)) for x in (q, k, v))  # (T, H, d)
        parts = []
        for (n, _), *qkv in zip(self.groups, q.split(q_sizes), k.split(sizes), v.split(sizes), strict=True):
            rectangles = (x.view(n, -1, *x.shape[1:]).transpose(1, 2) for x in qkv)  # (n, H, length or 1, d)
            parts.append(F.scaled_dot_product_attention(*rectangles).transpose(1, 2).flatten(0, 1))
        return torch.cat(parts).flatten(1)

    def attend_image(self, q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float) -> Tensor:
        """q (T, D) or (P, D), k and v (m, n, D) -> like q."""
        order = self.pairs_by_image if len(q) == self.num_pairs else self.tokens_by_image
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(-2, -3) for x in (order.sort(q), k, v))  # (H, T, d), ...
        parts = [
            F.scaled_dot_product_attention(queries[None], k[i : i + 1], v[i : i + 1])[0].transpose(0, 1)
            for i, queries in enumerate(q.split(order.counts, dim=1))
            if queries.shape[1]
        ]
        return order.unsort(torch.cat(parts).flatten(1))


class _Order:
    """Rows sorted by image and back."""

    def __init__(self, order: np.ndarray, counts: np.ndarray, device: torch.device):
        self.counts = counts.tolist()
        self.trivial = bool((np.diff(order) > 0).all())
        if not self.trivial:
            inverse = np.empty_like(order)
            inverse[order] = np.arange(len(order))
            self.index, self.inverse = on_device(device, order), on_device(device, inverse)

    def sort(self, x: Tensor) -> Tensor:
        return x if self.trivial else x[self.index]

    def unsort(self, x: Tensor) -> Tensor:
        return x if self.trivial else x[self.inverse]


def ranges(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """start[0], start[0] + 1, ... (length[0] of them), start[1], ..."""
    return np.repeat(start - (np.cumsum(length) - length), length) + np.arange(length.sum())


def score_pairs(
    model: BLIP_Retrieval,
    images: EncodedImages,
    texts: EncodedTexts,
    image: np.ndarray,
    text: np.ndarray,
    tokens_per_pass: int,
) -> np.ndarray:
    """Matching logits (P,) of pairs (image, distinct text) in image order; each process scores its own images."""
    device = model.temp.device
    scores = torch.zeros(len(image), dtype=model.temp.dtype, device=device)
    spans = [np.searchsorted(image, [block.start, block.stop]) for block in images.blocks]
    progress = Progress("re-rank", int(sum(end - begin for begin, end in spans)), "pairs")
    with model.autocast(), sdpa_kernel(KERNELS):  # around all passes: the weights are cast once
        for block, tokens, (begin, end) in zip(images.blocks, images.tokens, spans, strict=True):
            tokens = tokens.to(device, non_blocking=True)
            for part in _passes(texts.lengths[text[begin:end]], tokens_per_pass):
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
    """One pass: pairs (row of tokens (b, n, V), text) in image order -> matching logits (P,) on the device."""
    device = model.temp.device
    image_tokens = tokens[image[0] : image[-1] + 1]  # (m, n, V)
    order = np.argsort(texts.lengths[text], kind="stable")
    image, text = image[order] - image[0], text[order]
    lengths = texts.lengths[text]
    packed = PackedTexts(image, lengths, device)
    x = texts.states[on_device(device, ranges(texts.start[text], lengths))]  # (T, D)
    layers = model.text_encoder.encoder.layer
    for i, layer in enumerate(layers):
        last = i == len(layers) - 1
        if i > 0:
            x = layer.text_part(x, packed, cls_only=last)
        elif last:
            x = packed.first(x)
        x = layer.image_part(x, packed, image_tokens)
    with torch.autocast(device.type, enabled=False):
        logits = model.itm_head(x.to(model.itm_head.weight.dtype))[:, 1]
    return torch.empty_like(logits).index_copy_(0, on_device(device, order), logits)
