"""One training step: the losses of one or more ranks of the published recipe, in micro-batches, exactly.

What couples samples in BLIP is small: 256-d features, image ids and token ids. An image-text pair touches exactly one
image, so the step is ordered by image and needs no gradient cache:

    1. clamp the temperature, move the momentum twins, momentum features of all samples (no graph)
    2. text micro-batches: t2i contrast, backward at once
    3. image features of all samples that may be drawn as negatives; graphs of the last micro-batches are kept, as many
       as memory allows (`models/machine.py`)
    4. draw hard negatives
    5. image micro-batches: i2t contrast, all pairs that touch these images, backward at once
    6. write the queues in rank order

`ranks` emulated ranks on each of W processes give the average gradient of ranks * W GPUs. Processes exchange features
and token ids, never image tokens. Dropout and drop-path are drawn as on one GPU with this order of work: the same
distribution as on R GPUs, not the same numbers. The host reads from the device once for each pool of negatives.

Shapes: n samples on this process (rank after rank), b = n / ranks, m rows of a micro-batch, P pairs, E embedding width,
R = ranks * W.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models import itc, itm
from models.ragged import RaggedTexts, on_device
from transform.text import MAX_TOKENS, TokenizedText
from utils import all_gather, get_rank, get_world_size

if TYPE_CHECKING:
    from models.blip_retrieval import BLIP_Retrieval

TEXTS_PER_IMAGE = 4  # micro-batches of texts alone are this much larger: a text's graph is a small part of an image's


class RetrievalStep:
    """The constants of one step on this process, and the losses of any rows of it.

    A "pool" is what a sample may draw its negatives from: all samples of all processes (`negative_all_rank`, COCO) or
    the samples of its own rank (Flickr30k). Pool indices count over all processes in the first case.
    """

    def __init__(
        self,
        model: "BLIP_Retrieval",
        image: Tensor,
        text: TokenizedText,
        idx: Tensor,
        alpha: float,
        ranks: int = 1,
        micro_batch: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
        snapshot_queues: bool = False,
    ):
        self.model, self.image, self.idx, self.alpha = model, image, idx, alpha
        self.ranks, self.batch = ranks, len(image) // ranks
        self.generators = generators or [None] * ranks
        # forward() backpropagates after the queues are written, train_step() before.
        self.image_queue = model.image_queue.clone() if snapshot_queues else model.image_queue
        self.text_queue = model.text_queue.clone() if snapshot_queues else model.text_queue

        self.gather = all_gather if model.negative_all_rank else lambda x: x
        self.offset = get_rank() * len(image) if model.negative_all_rank else 0  # this process's place in the pool
        self.pool_idx = self.gather(idx)
        self.pool_text, self.lengths = _pool_text(text, model.negative_all_rank, image.device)
        self.negative_image, self.negative_text = ([-1] * len(self.pool_idx) for _ in range(2))  # drawn, by sample
        self.sums = torch.zeros(ranks * get_world_size(), 3, device=image.device)  # by rank: see StepReport
        self.starved = torch.zeros((), dtype=torch.bool, device=image.device)  # some sample had no negative to draw

        model.clamp_temp()
        model.update_momentum()
        features = [
            model.momentum_features(image[rows], *self._own_texts(rows))
            for rows in slices(0, len(image), micro_batch or len(image))
        ]
        self.image_feat_m, self.text_feat_m = (torch.cat(column) for column in zip(*features, strict=True))  # (n, E)
        # Online features without graph, filled as the encoders run.
        self.image_feat, self.text_feat = torch.empty_like(self.image_feat_m), torch.empty_like(self.text_feat_m)

    def text_loss(self, rows: slice) -> Tensor:
        """Half the t2i contrast of these texts, weighted so that all rows of the process sum to its mean."""
        feat = self.model.text_feature(self.model.encode_text(*self._own_texts(rows)))
        self.text_feat[rows] = feat.detach()
        return self._contrast(feat, rows, self.text_feat_m, self.image_feat_m, self.image_queue)

    def encode_image(self, rows: slice, cls_only: bool = False) -> Tensor:
        """Image tokens (m, N, V) of these rows, their features noted for the drawing of negatives."""
        image_tokens = self.model.encode_image(self.image[rows], cls_only)
        self.image_feat[rows] = self.model.image_feature(image_tokens).detach()
        return image_tokens

    def image_loss(self, rows: slice, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Half the i2t contrast of these images, and the matching loss of every pair that touches one of them."""
        feat = self.model.image_feature(image_tokens)
        loss_i2t = self._contrast(feat, rows, self.image_feat_m, self.text_feat_m, self.text_queue)
        return loss_i2t, self._matching(rows, image_tokens)

    def pools(self) -> list[slice]:
        """Rows of this process whose features must be known together before negatives can be drawn."""
        everything = slice(0, len(self.image))
        return [everything] if self.model.negative_all_rank else slices(0, len(self.image), self.batch)

    def draw_negatives(self, pool: slice) -> None:
        """A hard negative image for each text of the pool, then a hard negative text for each image."""
        image_pool, text_pool = self.gather(self.image_feat[pool]), self.gather(self.text_feat[pool])
        pool_idx = self.pool_idx if self.model.negative_all_rank else self.idx[pool]
        draws = []
        for own in slices(pool.start, pool.stop, self.batch):
            rank = own.start // self.batch
            for feat, candidates in ((self.text_feat, image_pool), (self.image_feat, text_pool)):
                drawn, found = itm.sample_negatives(
                    feat[own], candidates, self.idx[own], pool_idx, self.model.temp, self.generators[rank]
                )
                self.starved |= ~found.all()
                draws.append(drawn)
        drawn = torch.stack(draws).unflatten(0, (-1, 2)).transpose(1, 2).flatten(0, 1)  # (rows, 2)
        if self.model.negative_all_rank:
            self.negative_image, self.negative_text = all_gather(drawn).T.tolist()
        else:
            self.negative_image[pool], self.negative_text[pool] = (drawn.T + pool.start).tolist()

    def write_queues(self) -> None:
        """All ranks' momentum features, in rank order."""
        self.model.enqueue(all_gather(self.image_feat_m), all_gather(self.text_feat_m), all_gather(self.idx))

    def _contrast(self, feat: Tensor, rows: slice, feat_m: Tensor, other_m: Tensor, queue: Tensor) -> Tensor:
        """Soft cross-entropy of rows (m, E) against their own rank's momentum features and the queue, summed / 2n."""
        rank = torch.arange(rows.start, rows.stop, device=feat.device) // self.batch
        own_m = other_m.unflatten(0, (self.ranks, -1))[rank]  # (m, b, E)
        with torch.no_grad():
            own_idx = self.idx.unflatten(0, (self.ranks, -1))[rank]  # (m, b)
            positive = itc.positives(self.idx[rows], own_idx, self.model.idx_queue)
            sim_m = itc.similarities(feat_m[rows], own_m, queue)
            targets = itc.soft_targets(sim_m, positive, self.model.temp, self.alpha)
        loss = itc.soft_cross_entropy(itc.similarities(feat, own_m, queue) / self.model.temp, targets)  # (m,)
        self._note(rank + get_rank() * self.ranks, 0, loss / (2 * self.batch))
        return loss.sum() / (2 * len(self.image))

    def _matching(self, rows: slice, image_tokens: Tensor) -> Tensor:
        """Cross-entropy of all pairs that touch these images, summed and divided by the process's number of pairs."""
        first, last = self.offset + rows.start, self.offset + rows.stop
        pairs = itm.pairs_by_image(first, last, self.negative_image, self.negative_text)
        device = image_tokens.device
        index, label, owner = on_device(device, np.array([pairs.text, pairs.label, pairs.owner]))  # (P,) each
        text = TokenizedText(*(x[index] for x in self.pool_text))
        texts = RaggedTexts([self.lengths[i] for i in pairs.text], device, pairs.image, len(image_tokens))
        logits = self.model.match(text, image_tokens, texts)  # (P, 2)
        loss = F.cross_entropy(logits, label, reduction="none")  # (P,)
        per_rank = itm.PAIRS_PER_SAMPLE * self.batch
        first_rank = 0 if self.model.negative_all_rank else get_rank() * self.ranks
        rank = owner // self.batch + first_rank
        self._note(rank, 1, loss / per_rank)
        self._note(rank, 2, (logits.argmax(1) == label) / per_rank)
        return loss.sum() / (per_rank * self.ranks)

    def _note(self, rank: Tensor, column: int, values: Tensor) -> None:
        self.sums[:, column].index_add_(0, rank, values.detach().to(self.sums.dtype))

    def _own_texts(self, rows: slice) -> tuple[TokenizedText, RaggedTexts]:
        """The texts of these samples and where their tokens lie."""
        own = slice(self.offset + rows.start, self.offset + rows.stop)
        return TokenizedText(*(x[own] for x in self.pool_text)), RaggedTexts(self.lengths[own], self.image.device)


class StepReport(NamedTuple):
    """What a step leaves behind, on the device: read it only when printing."""

    sums: Tensor  # (R, 3) loss_ita, loss_itm, accuracy of matching of each rank; sum over processes before use
    starved: Tensor  # () bool: a sample had no negative to draw (all images of its pool were one)


def train_step(
    model: "BLIP_Retrieval",
    image: Tensor,
    text: TokenizedText,
    idx: Tensor,
    alpha: float,
    ranks: int = 1,
    micro_batch: int | None = None,
    keep_graphs: int = 0,
    generators: Sequence[torch.Generator] | None = None,
) -> StepReport:
    """Accumulate the gradients of one step into `.grad`, and write the queues.

    image (n, 3, S, S), text (n, L), idx (n,), rank after rank; `micro_batch` images at a time (all when None). Leave
    the text on the host, where its lengths are read. `keep_graphs`: image graphs kept between drawing and matching, in
    whole micro-batches and at least one; other images are encoded twice.
    """
    step = RetrievalStep(model, image, text, idx, alpha, ranks, micro_batch, generators)
    size = micro_batch or len(image)
    for rows in slices(0, len(image), TEXTS_PER_IMAGE * size):
        step.text_loss(rows).backward()
    for pool in step.pools():
        chunks = slices(pool.start, pool.stop, size)
        kept = max(1, keep_graphs // size)
        encoded = [_encode(step, rows, keep=i >= len(chunks) - kept) for i, rows in enumerate(chunks)]
        step.draw_negatives(pool)
        while encoded:  # the kept graphs first: they are freed before others are built
            rows, image_tokens, rng_state = encoded.pop()
            if image_tokens is None:
                with _replay(rng_state, image.device):
                    image_tokens = step.encode_image(rows)
            loss_i2t, loss_itm = step.image_loss(rows, image_tokens)
            (loss_i2t + loss_itm).backward()
            del image_tokens, loss_i2t, loss_itm
    step.write_queues()
    return StepReport(step.sums, step.starved)


def slices(start: int, stop: int, size: int) -> list[slice]:
    """start..stop in pieces of `size`, the last one shorter."""
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def _encode(step: RetrievalStep, rows: slice, keep: bool) -> tuple[slice, Tensor | None, object]:
    """Rows with their tokens and graph, or features only and the random state to encode them again with."""
    if keep:
        return rows, step.encode_image(rows), None
    state = _rng_state(step.image.device) if step.model.visual_encoder.stochastic else None
    with torch.no_grad():
        step.encode_image(rows, cls_only=True)
    return rows, None, state


def _rng_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def _replay(state: Tensor | None, device: torch.device) -> Iterator[None]:
    """Draw the same drop-path again (ViT-L), and go on afterwards as if nothing was drawn."""
    if state is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)
        yield


def _pool_text(text: TokenizedText, all_rank: bool, device: torch.device) -> tuple[TokenizedText, list[int]]:
    """The texts of the pool on the device, and their numbers of tokens on the host.

    Lengths are read where the loader left the texts, so nothing waits for the GPU; those of other processes arrive on
    the device. Processes then agree on MAX_TOKENS columns, as their longest captions differ.
    """
    if get_world_size() == 1 or not all_rank:
        return text.to(device, non_blocking=True), text.attention_mask.sum(1).tolist()
    missing = MAX_TOKENS - text.input_ids.shape[1]
    padded = (F.pad(x, (0, missing)) for x in text.to(device, non_blocking=True))  # ids with PAD = 0, masks with 0
    pool = TokenizedText(*map(all_gather, padded))
    return pool, pool.attention_mask.sum(1).tolist()
