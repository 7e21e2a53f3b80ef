"""Image-text matching: hard negatives drawn by similarity, and the pairs of a step ordered by image.

Sources: Li et al. 2021 (ALBEF, section 3.2), BLIP's `models/blip_retrieval.py`.

Shapes: r samples that draw, c candidates, E embedding width, P pairs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

PAIRS_PER_SAMPLE = 3  # one match, one negative image, one negative text
NO_NEGATIVE = (
    "a sample had no negative: everything it could draw belongs to the same image. Use a larger batch, or give "
    "different images different image_id."
)


def matching_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Loss of each pair, (P,), from logits (P, 2) and labels (P,), 1 = match."""
    return F.cross_entropy(logits, label, reduction="none")


def gumbel(shape: torch.Size, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Standard Gumbel noise: argmax(log w + noise) is a draw from weights w, as torch.multinomial's argmax(w / Exp)."""
    return -torch.empty(shape, device=device).exponential_(generator=generator).log()


@torch.no_grad()
def sample_negatives(
    feat: Tensor,
    candidates: Tensor,
    idx: Tensor,
    candidate_idx: Tensor,
    temp: Tensor | float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one candidate for each sample from softmax(similarity / temp), leaving out those of the same image id.

    An infinite temp draws all of them with equal probability.

    feat (r, E), candidates (c, E), idx (r,), candidate_idx (c,) -> drawn index (r,), whether there was any (r,).
    In log space, so that nothing underflows at low temperatures (BLIP's softmax then fails in torch.multinomial), and
    without a host sync: a sample with no candidate gets index 0 and False.
    """
    logits = feat @ candidates.T / temp  # (r, c)
    same = idx[:, None] == candidate_idx  # (r, c)
    drawn = logits + gumbel(logits.shape, logits.device, generator).to(logits.dtype)
    return drawn.masked_fill(same, -torch.inf).argmax(1), ~same.all(1)


@dataclass(frozen=True)
class Pairs:
    """The pairs of a micro-batch of images, as parallel lists on the host."""

    image: list[int]  # index into the images of the micro-batch
    text: list[int]  # index into the gathered texts of all ranks
    label: list[int]  # 1 = match
    owner: list[int]  # index of the sample whose loss the pair belongs to


def pairs_by_image(first: int, last: int, negative_image: list[int], negative_text: list[int]) -> Pairs:
    """All pairs that touch images first..last-1 (indices over all ranks).

    An image is paired with its own text, the text it drew, and every text that drew it. Over all images these are
    BLIP's three pairs a sample, in another order: as each pair has one image, no pair needs two micro-batches.
    """
    assert -1 not in negative_text[first:last], "these images have not drawn their negatives yet"
    drew: dict[int, list[int]] = {}
    for text, image in enumerate(negative_image):
        if first <= image < last:
            drew.setdefault(image, []).append(text)
    pairs = []
    for image in range(first, last):
        pairs.append((image - first, image, 1, image))
        pairs.append((image - first, negative_text[image], 0, image))
        pairs += [(image - first, text, 0, text) for text in drew.get(image, ())]
    return Pairs(*(list(column) for column in zip(*pairs, strict=True)))
