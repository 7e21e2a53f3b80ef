"""Texts of different lengths in training: no padding where the arithmetic is, rectangles only inside attention.

`models/med.py` runs the layers; `RaggedTexts` tells it how queries meet keys. Dense layers see the tokens alone, text
after text; attention scatters them into rectangles, text by text for self-attention (masked), image by image for
cross-attention, where all tokens that look at an image are one query sequence. Both directions of a scatter are cheap
on a GPU, unlike one call for each length (`models/packed.py`, which evaluation uses).

Shapes: P texts of T tokens in all, L tokens of the longest, m images, n image tokens, D hidden width, H heads,
d = D / H.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def on_device(device: torch.device, index: np.ndarray) -> Tensor:
    """Host integers on the device, without making the host wait for what the GPU still has to do."""
    host = torch.from_numpy(index)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class RaggedTexts:
    """Where the tokens of P texts lie; with `image_of_text` (P,), ascending in [0, num_images), whom each looks at."""

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device,
        image_of_text: Sequence[int] | None = None,
        num_images: int = 0,
    ):
        size = np.asarray(lengths)
        self.num_texts, self.length = len(size), int(size.max())
        text, tokens = np.repeat(np.arange(len(size)), size), np.arange(size.sum())
        start = np.cumsum(size) - size
        index = [size, start, text * self.length + tokens - start[text]]
        if image_of_text is not None:
            image = np.asarray(image_of_text)
            assert (np.diff(image) >= 0).all(), "texts must lie in the order of their images"
            of_token, self.of_token_shape = _slots(image[text], num_images)
            of_first, self.of_first_shape = _slots(image, num_images)
            index += [of_token, of_first]
        parts = on_device(device, np.concatenate(index)).split([len(part) for part in index])  # one copy
        size, self.first_token, self.of_text, *self.of_image = parts
        padded = len(tokens) < len(start) * self.length
        self.mask = (torch.arange(self.length, device=device) < size[:, None])[:, None, None] if padded else None

    def pack(self, x: Tensor) -> Tensor:
        return x[:, : self.length].flatten(0, 1).index_select(0, self.of_text)  # (P, >= L, D) -> (T, D)

    def unpack(self, x: Tensor) -> Tensor:
        """States of first tokens (P, D) -> (P, 1, D)."""
        assert len(x) == self.num_texts, "RaggedTexts gives [CLS] states: cls_only=True"
        return x[:, None]

    def first(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.first_token)  # (T, D) -> (P, D)

    def attend_text(self, q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float) -> Tensor:
        """q (T, D), or (P, D) for first tokens alone; k and v (T, D) -> like q."""
        alone, shape = len(q) == self.num_texts, (self.num_texts, self.length)
        k, v = (_rectangle(x, self.of_text, shape) for x in (k, v))  # (P, L, D)
        context = _attend(q[:, None] if alone else _rectangle(q, self.of_text, shape), k, v, heads, dropout, self.mask)
        return context if alone else context.index_select(0, self.of_text)

    def attend_image(self, q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float) -> Tensor:
        """q (T, D), or (P, D) for first tokens alone; k and v (m, n, D) -> like q."""
        alone = len(q) == self.num_texts
        slots, shape = self.of_image[alone], self.of_first_shape if alone else self.of_token_shape
        return _attend(_rectangle(q, slots, shape), k, v, heads, dropout, None).index_select(0, slots)


def _slots(group: np.ndarray, num_groups: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Places of rows, in ascending order of their group, in a rectangle (num_groups, the most of a group)."""
    count = np.bincount(group, minlength=num_groups)
    start = np.cumsum(count) - count
    return group * count.max() + np.arange(len(group)) - start[group], (num_groups, int(count.max()))


def _rectangle(x: Tensor, slots: Tensor, shape: tuple[int, int]) -> Tensor:
    """Rows (R, D) at their slots of a rectangle (*shape, D), zeros elsewhere."""
    return x.new_zeros(shape[0] * shape[1], x.shape[1]).index_copy(0, slots, x).unflatten(0, shape)


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float, mask: Tensor | None) -> Tensor:
    """q (B, Lq, D), k and v (B, Lk, D) -> (B * Lq, D)."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, L, d)
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return context.transpose(1, 2).flatten(2).flatten(0, 1)
