"""Four arrangements of the tokens of many texts. The layers of `models/med.py` run on any of them.

A layer's linear parts take tokens in any layout; only attention must know which tokens belong together. That is what an
arrangement knows, and all it knows:

    PlainTexts      a rectangle (P, L) with a mask: the published way, what the others are tested against
    TrainingTexts   no padding in the linear layers; attention works on rectangles that tokens are scattered into,
                    which is cheap in both directions and needs few kernels: training
    ScoringTexts    no padding anywhere; one attention call for each length and each image: re-ranking, no gradient
    HeatmapTexts    as PlainTexts, with the attention of one layer to the image as a tensor to differentiate by

Shapes: P texts (one for each image-text pair when matching) of T tokens in all, L tokens of the longest, m images,
n image tokens, D hidden width, H heads, d = D / H.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.attention import training_attention

POPULAR = 4  # times the mean number of tokens, above which an image is left out of the rectangle of all images


class Arrangement(Protocol):
    """What a layer asks of it. `x` are hidden states in the arrangement's own layout."""

    def first(self, x: Tensor) -> Tensor:
        """The first token of every text: queries of a last layer that computes [CLS] or [ENC] alone."""

    def attend_text(self, q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float) -> Tensor:
        """Self-attention within each text, of all its tokens or, where `q` has only those, of its first token."""

    def attend_image(self, q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float) -> Tensor:
        """Cross-attention of each text to its image; k and v (m, n, D) hold every image once."""


class WholeArrangement(Arrangement, Protocol):
    """What the whole encoder asks: the way in from token embeddings, and out to the states it returns."""

    def pack(self, x: Tensor) -> Tensor:
        """(P, >= L, D) -> the arrangement's layout."""

    def unpack(self, x: Tensor) -> Tensor:
        """The arrangement's layout -> (P, L, D), or (P, 1, D) of first tokens."""


def on_device(device: torch.device, numbers: np.ndarray) -> Tensor:
    """Numbers of the host on the device, without making the host wait for what the GPU still has to do."""
    host = torch.from_numpy(numbers)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


# ---- plain ----------------------------------------------------------------------------------------------------------


class PlainTexts:
    """A (P, L) rectangle; text p looks at image p. Without a mask (P, L) all texts must be equally long."""

    def __init__(self, attention_mask: Tensor | None):
        self.mask = None if attention_mask is None else attention_mask.bool()[:, None, None]  # (P, 1, 1, L)

    def pack(self, x: Tensor) -> Tensor:
        return x

    def unpack(self, x: Tensor) -> Tensor:
        return x

    def first(self, x: Tensor) -> Tensor:
        return x[:, :1]  # (P, 1, D)

    def attend_text(self, q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float) -> Tensor:
        return _attend(q, k, v, heads, dropout, self.mask)

    def attend_image(self, q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float) -> Tensor:
        return _attend(q, k, v, heads, dropout, None)


class HeatmapTexts(PlainTexts):
    """Keeps the probabilities of one layer's cross-attention, from which the graph of the layers above starts."""

    attention: Tensor  # (P, H, L, n), after the layer has run

    def __init__(self, attention_mask: Tensor | None, layer: int):
        super().__init__(attention_mask)
        self.layers_left = layer

    def attend_image(self, q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float) -> Tensor:
        self.layers_left -= 1
        if self.layers_left != -1:
            return super().attend_image(q, k, v, heads, dropout)
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (P, H, L, d), (P, H, n, d)
        scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
        self.attention = scores.softmax(-1).detach().requires_grad_()  # before dropout
        return (F.dropout(self.attention, dropout) @ v).transpose(1, 2).flatten(2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float, mask: Tensor | None, training: bool = False
) -> Tensor:
    """q (B, Lq, D), k and v (B, Lk, D) -> (B, Lq, D)."""
    kernel = training_attention if training else F.scaled_dot_product_attention
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, L, d)
    context = kernel(q, k, v, mask, dropout)
    return context.transpose(1, 2).flatten(2)


# ---- training -------------------------------------------------------------------------------------------------------


class TrainingTexts:
    """Tokens (T, D) text after text; attention scatters them into rectangles, a row for each text or for each image.

    Cross-attention has no mask, so all tokens that look at one image are one query sequence against it.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device,
        image_of_text: Sequence[int] | None = None,
        num_images: int = 0,
    ):
        """`lengths` (P,) on the host; `image_of_text` (P,), the image of each, ascending in [0, num_images)."""
        length_of_text = np.asarray(lengths)
        self.num_texts, self.length = len(length_of_text), int(length_of_text.max())
        first_token = np.cumsum(length_of_text) - length_of_text  # (P,) index of each text's first token
        text_of_token = np.repeat(np.arange(self.num_texts), length_of_text)  # (T,)
        place_in_text = np.arange(len(text_of_token)) - first_token[text_of_token]  # (T,) 0, 1, ... within its text
        index = [length_of_text, first_token, text_of_token * self.length + place_in_text]
        if image_of_text is not None:
            image = np.asarray(image_of_text)
            assert (np.diff(image) >= 0).all(), "texts must lie in the order of their images"
            tokens, texts = (_Crowd(group, num_images) for group in (image[text_of_token], image))
            self.crowds = tokens, texts
            index += [tokens.slots, texts.slots]
        parts = on_device(device, np.concatenate(index)).split([len(part) for part in index])  # one copy for all
        lengths_there, self.first_token, self.slot_in_text, *self.slots_in_image = parts
        padded = len(text_of_token) < self.num_texts * self.length
        place = torch.arange(self.length, device=device)
        self.mask = (place < lengths_there[:, None])[:, None, None] if padded else None  # (P, 1, 1, L)

    def pack(self, x: Tensor) -> Tensor:
        return x[:, : self.length].flatten(0, 1).index_select(0, self.slot_in_text)  # (P, >= L, D) -> (T, D)

    def unpack(self, x: Tensor) -> Tensor:
        assert len(x) == self.num_texts, "TrainingTexts gives [CLS] states: cls_only=True"
        return x[:, None]  # (P, D) -> (P, 1, D)

    def first(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.first_token)  # (T, D) -> (P, D)

    def attend_text(self, q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float) -> Tensor:
        """q (T, D), or (P, D) for first tokens alone; k and v (T, D) -> like q."""
        firsts_alone, shape = len(q) == self.num_texts, (self.num_texts, self.length)
        k, v = (_rectangle(x, self.slot_in_text, shape) for x in (k, v))  # (P, L, D)
        q = q[:, None] if firsts_alone else _rectangle(q, self.slot_in_text, shape)  # (P, 1 or L, D)
        context = _attend(q, k, v, heads, dropout, self.mask, training=True).flatten(0, 1)
        return context if firsts_alone else context.index_select(0, self.slot_in_text)

    def attend_image(self, q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float) -> Tensor:
        """q (T, D), or (P, D) for first tokens alone; k and v (m, n, D) -> like q."""
        firsts_alone = len(q) == self.num_texts
        slots, crowd = self.slots_in_image[firsts_alone], self.crowds[firsts_alone]
        rows = q.new_zeros(crowd.size, q.shape[1]).index_copy(0, slots, q)  # (rectangle and popular images, D)
        rectangle, *popular = rows.split([crowd.size - sum(crowd.popular.values()), *crowd.popular.values()])
        how = heads, dropout, None, True
        parts = [_attend(rectangle.unflatten(0, (len(k), -1)), k, v, *how).flatten(0, 1)]
        for i, queries in zip(crowd.popular, popular, strict=True):
            parts.append(_attend(queries[None], k[i : i + 1], v[i : i + 1], *how)[0])
        return (torch.cat(parts) if popular else parts[0]).index_select(0, slots)


class _Crowd:
    """Where each of R rows goes: into a rectangle with a line for each group or, of popular groups, behind it.

    A line is as long as the longest, so a group of more than POPULAR times the mean has a call of its own.
    """

    def __init__(self, group: np.ndarray, num_groups: int):
        """`group` (R,) is ascending."""
        count = np.bincount(group, minlength=num_groups)  # (num_groups,)
        first = np.cumsum(count) - count  # (num_groups,) row at which each group starts
        place_in_group = np.arange(len(group)) - first[group]  # (R,)
        popular = np.flatnonzero(count > POPULAR * -(-len(group) // num_groups))
        self.popular = {int(i): int(count[i]) for i in popular}  # group: rows
        length = max(1, int(np.delete(count, popular).max()))
        start = np.arange(num_groups) * length
        start[popular] = num_groups * length + np.cumsum(count[popular]) - count[popular]
        self.slots = start[group] + place_in_group  # (R,)
        self.size = num_groups * length + int(count[popular].sum())


def _rectangle(x: Tensor, slots: Tensor, shape: tuple[int, int]) -> Tensor:
    """Vectors (k, D) at their slots (k,) of a rectangle (*shape, D), zeros elsewhere."""
    return x.new_zeros(shape[0] * shape[1], x.shape[1]).index_copy(0, slots, x).unflatten(0, shape)


# ---- scoring --------------------------------------------------------------------------------------------------------


class ScoringTexts:
    """Tokens (T, D), shortest texts first. Texts of one length make a rectangle, tokens of one image a sequence."""

    def __init__(self, image: np.ndarray, lengths: np.ndarray, device: torch.device):
        """`image` (P,) in [0, m) and `lengths` (P,) of the texts, in length order."""
        self.num_texts = len(lengths)
        self.groups = [(int(n), int(length)) for length, n in zip(*np.unique(lengths, return_counts=True), strict=True)]
        first_token = np.cumsum(lengths) - lengths  # (P,) index of each text's first token
        texts = np.argsort(image, kind="stable")  # (P,) by image
        tokens = ranges(first_token[texts], lengths[texts])  # (T,) indices of their tokens, by image
        self.first_token = on_device(device, first_token)
        self.texts_by_image = _Order(texts, np.bincount(image), device)
        self.tokens_by_image = _Order(tokens, np.bincount(image, lengths).astype(int), device)

    def first(self, x: Tensor) -> Tensor:
        return x[self.first_token]  # (T, D) -> (P, D)

    def attend_text(self, q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float) -> Tensor:
        """q (T, D), or (P, D) for first tokens alone; k and v (T, D) -> like q."""
        sizes = [n * length for n, length in self.groups]
        q_sizes = [n for n, _ in self.groups] if len(q) == self.num_texts else sizes
        q, k, v = (x.unflatten(1, (heads, -1)) for x in (q, k, v))  # (T, H, d)
        parts = []
        for (n, _), *qkv in zip(self.groups, q.split(q_sizes), k.split(sizes), v.split(sizes), strict=True):
            rectangles = (x.view(n, -1, *x.shape[1:]).transpose(1, 2) for x in qkv)  # (n, H, length or 1, d)
            parts.append(F.scaled_dot_product_attention(*rectangles).transpose(1, 2).flatten(0, 1))
        return torch.cat(parts).flatten(1)

    def attend_image(self, q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float) -> Tensor:
        """q (T, D) or (P, D), k and v (m, n, D) -> like q."""
        order = self.texts_by_image if len(q) == self.num_texts else self.tokens_by_image
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(-2, -3) for x in (order.sort(q), k, v))  # (H, T, d), ...
        parts = [
            F.scaled_dot_product_attention(queries[None], k[i : i + 1], v[i : i + 1])[0].transpose(0, 1)
            for i, queries in enumerate(q.split(order.counts, dim=1))
            if queries.shape[1]
        ]
        return order.unsort(torch.cat(parts).flatten(1))


class _Order:
    """Sorts the rows of (T, D) or (P, D) by image, and puts them back."""

    def __init__(self, order: np.ndarray, counts: np.ndarray, device: torch.device):
        """`order` (T,) or (P,): which row comes at each place; `counts` (m,): how many belong to each image."""
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
    place = np.arange(length.sum())  # 0, 1, ... over all ranges
    first = np.cumsum(length) - length  # place at which each range begins
    return place + np.repeat(start - first, length)
