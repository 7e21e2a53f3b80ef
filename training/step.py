"""`BLIP_Retrieval.forward` in micro-batches: exactly one step of the published recipe, for one or more of its ranks.

All that samples share in BLIP is small: 256-d features, image ids and token ids. An image-text pair has exactly one
image, so the step goes through the images and needs no gradient cache:

    1. clamp the temperature, move the momentum twins, momentum features of all samples (no graph)
    2. text micro-batches: t2i contrast, backward at once
    3. image features of all samples that may be drawn as negatives; graphs of the last micro-batches are kept, as many
       as memory allows (`memory.py`)
    4. draw negatives, hard ones unless `random_negative_steps` says otherwise
    5. image micro-batches: i2t contrast, all pairs that touch these images, backward at once
    6. write the queues in rank order

`ranks` emulated ranks on each of W processes give the average gradient of ranks * W GPUs. Processes exchange features
and token ids, never image tokens. Dropout and drop-path are drawn as on one GPU with this order of work: the same
distribution as on R GPUs, not the same numbers. The host reads from the device once for each pool of negatives.

Shapes: n samples on this process (rank after rank), b = n / ranks, m samples of a micro-batch, P pairs, E embedding
width, c samples of a pool, R = ranks * W.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models import itc, itm
from models.arrangements import TrainingTexts, on_device
from models.blip_retrieval import BLIP_Retrieval
from transform.text import TokenizedText
from utils import all_gather, get_rank, get_world_size, never_stop

TEXTS_PER_IMAGE = 4  # micro-batches of texts alone are this much larger: a text's graph is a small part of an image's


class Term(NamedTuple):
    """One loss, or one measurement, for each of some samples or pairs."""

    values: Tensor  # (k,)
    rank: Tensor  # (k,) the rank whose mean each value enters, counted over all processes
    per_rank: float  # what the sum of a rank's values is divided by


class Negatives(NamedTuple):
    """Indices that the samples of a pool drew, on the host; -1 for samples of other pools."""

    image: list[int]  # for each text
    text: list[int]  # for each image


class StepReport(NamedTuple):
    """What a step leaves behind, on the device: read it only when printing."""

    by_rank: dict[str, Tensor]  # (R,) mean of each term by rank; sum over processes before use
    starved: Tensor  # () bool: a sample had no negative to draw (its whole pool had one image id)


class RetrievalStep:
    """The constants of one step on this process, and the losses of any of its samples.

    Each stage takes what the stage before it returned. A "pool" is what a sample draws its negatives from: all
    samples of all processes (`negative_all_rank`, COCO) or those of the sample's own rank (Flickr30k). Pool indices
    count over all processes in the first case. `samples` are slices of this process's batch.
    """

    def __init__(
        self,
        model: BLIP_Retrieval,
        image: Tensor,
        text: TokenizedText,
        idx: Tensor,
        alpha: float,
        ranks: int = 1,
        micro_batch: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
        poll: Callable[[], None] = never_stop,
        momentum_moved: bool = False,
        hard_negatives: bool = True,
    ):
        self.model, self.image, self.idx, self.alpha = model, image, idx, alpha
        self.ranks, self.batch = ranks, len(image) // ranks
        self.generators: Sequence[torch.Generator | None] = generators or [None] * ranks
        self.gather = all_gather if model.negative_all_rank else lambda x: x
        self.negative_temp = model.temp if hard_negatives else torch.inf  # all candidates equally likely
        self.offset = get_rank() * len(image) if model.negative_all_rank else 0  # this process's place in the pool
        self.pool_idx = self.gather(idx)
        self.pool_text, self.lengths = _pool_text(
            text, model.negative_all_rank, image.device, model.tokenizer.max_tokens
        )
        self.by_rank: dict[str, Tensor] = {}
        self.starved = torch.zeros((), dtype=torch.bool, device=image.device)

        if not momentum_moved:
            model.clamp_temp()
            model.update_momentum()
        parts = slices(0, len(image), micro_batch or len(image))
        if model.visual_encoder.stem_frozen:  # once for both encoders, and for images that are encoded twice
            self.image = torch.cat([model.image_stem(image[samples]) for samples in parts])
        features = []
        for samples in parts:
            poll()
            features.append(model.momentum_features(self.image[samples], *self._own_texts(samples)))
        self.image_feat_m, self.text_feat_m = (torch.cat(column) for column in zip(*features, strict=True))  # (n, E)

    def encode_text(self, samples: slice) -> Tensor:
        """Text features (m, E)."""
        return self.model.text_feature(self.model.encode_text(*self._own_texts(samples)))

    def encode_image(self, samples: slice, cls_only: bool = False) -> tuple[Tensor, Tensor]:
        """Image tokens (m, N, V), or (m, 1, V) with cls_only, and features (m, E)."""
        image_tokens = self.model.encode_image(self.image[samples], cls_only)
        return image_tokens, self.model.image_feature(image_tokens)

    def pools(self) -> list[slice]:
        """Slices of this process's samples: negatives can be drawn once all features of a slice are known."""
        everything = slice(0, len(self.image))
        return [everything] if self.model.negative_all_rank else slices(0, len(self.image), self.batch)

    def draw_negatives(self, pool: slice, image_feat: Tensor, text_feat: Tensor) -> Negatives:
        """A negative image for each text of the pool, then a negative text for each image.

        image_feat and text_feat (m, E) belong to the pool's samples on this process.
        """
        image_pool, text_pool = self.gather(image_feat), self.gather(text_feat)  # (c, E)
        idx = self.idx[pool]
        pool_idx = self.pool_idx if self.model.negative_all_rank else idx  # (c,)
        draws = []
        for own in slices(0, len(idx), self.batch):  # rank after rank
            generator = self.generators[(pool.start + own.start) // self.batch]
            for feat, candidates in ((text_feat, image_pool), (image_feat, text_pool)):
                drawn, found = itm.sample_negatives(
                    feat[own], candidates, idx[own], pool_idx, self.negative_temp, generator
                )
                self.starved |= ~found.all()
                draws.append(drawn)
        by_rank = torch.stack(draws).unflatten(0, (-1, 2))  # (ranks, image and text, b)
        drawn = by_rank.transpose(1, 2).flatten(0, 1)  # (m, image and text)
        if self.model.negative_all_rank:
            return Negatives(*all_gather(drawn).T.tolist())
        image, text = ([-1] * len(self.image) for _ in range(2))
        image[pool], text[pool] = (drawn.T + pool.start).tolist()
        return Negatives(image, text)

    def text_terms(self, samples: slice, text_feat: Tensor) -> dict[str, Term]:
        """Terms of texts alone, from their features (m, E); those named `loss_...` are minimised."""
        return {
            "loss_ita": self._contrast(samples, text_feat, self.text_feat_m, self.image_feat_m, self.model.image_queue),
        }

    def image_terms(
        self, samples: slice, image_tokens: Tensor, image_feat: Tensor, negatives: Negatives
    ) -> dict[str, Term]:
        """Terms of images (m, N, V), of their features (m, E), and of every pair with one of these images."""
        logits, label, rank = self._match(samples, image_tokens, negatives)  # (P, 2), (P,), (P,)
        pairs = itm.PAIRS_PER_SAMPLE * self.batch
        return {
            "loss_ita": self._contrast(samples, image_feat, self.image_feat_m, self.text_feat_m, self.model.text_queue),
            "loss_itm": Term(itm.matching_loss(logits, label), rank, pairs),
            "itm_acc": Term(logits.argmax(1) == label, rank, pairs),
        }

    def add_up(self, terms: dict[str, Term]) -> Tensor:
        """Add each term to its rank's mean; the losses' sum, scaled so that a step's sums add up to their mean."""
        total: Tensor | None = None
        for name, (values, rank, per_rank) in terms.items():
            if name not in self.by_rank:
                self.by_rank[name] = torch.zeros(self.ranks * get_world_size(), device=self.image.device)
            share = (values.detach() / per_rank).to(torch.float32)
            self.by_rank[name].index_add_(0, rank, share)
            if name.startswith("loss_"):
                loss = values.sum() / (per_rank * self.ranks)
                total = loss if total is None else total + loss
        assert total is not None, "no loss among the terms"
        return total

    def write_queues(self) -> None:
        """Enqueue all ranks' momentum features, in rank order."""
        self.model.enqueue(all_gather(self.image_feat_m), all_gather(self.text_feat_m), all_gather(self.idx))

    def _contrast(self, samples: slice, feat: Tensor, feat_m: Tensor, other_m: Tensor, queue: Tensor) -> Term:
        """One direction of the contrast: features (m, E) with momentum features of their own ranks and the queue."""
        rank = torch.arange(samples.start, samples.stop, device=feat.device) // self.batch  # (m,) of this process
        own_m = other_m.unflatten(0, (self.ranks, -1))[rank]  # (m, b, E)
        with torch.no_grad():
            own_idx = self.idx.unflatten(0, (self.ranks, -1))[rank]  # (m, b)
            positive = itc.positives(self.idx[samples], own_idx, self.model.idx_queue)  # (m, b + Q)
            sim_m = itc.similarities(feat_m[samples], own_m, queue)  # (m, b + Q)
        sim = itc.similarities(feat, own_m, queue)  # (m, b + Q)
        loss = itc.contrastive_loss(sim, sim_m, positive, self.model.temp, self.alpha)  # (m,)
        return Term(loss, rank + get_rank() * self.ranks, 2 * self.batch)  # half a mean: there are two directions

    def _match(self, samples: slice, image_tokens: Tensor, negatives: Negatives) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (P, 2), labels (P,) and ranks (P,) of all pairs with one of these images (m, N, V)."""
        first, last = self.offset + samples.start, self.offset + samples.stop
        pairs = itm.pairs_by_image(first, last, *negatives)
        device = image_tokens.device
        index, label, owner = on_device(device, np.array([pairs.text, pairs.label, pairs.owner]))  # (P,) each
        text = TokenizedText(*(x[index] for x in self.pool_text))  # (P, L)
        lengths = [self.lengths[i] for i in pairs.text]
        arrangement = TrainingTexts(lengths, device, pairs.image, len(image_tokens))
        logits = self.model.match(text, image_tokens, arrangement)  # (P, 2)
        first_rank = 0 if self.model.negative_all_rank else get_rank() * self.ranks
        return logits, label, owner // self.batch + first_rank

    def _own_texts(self, samples: slice) -> tuple[TokenizedText, TrainingTexts]:
        """The texts of these samples and where their tokens lie."""
        own = slice(self.offset + samples.start, self.offset + samples.stop)
        return TokenizedText(*(x[own] for x in self.pool_text)), TrainingTexts(self.lengths[own], self.image.device)


def train_step(
    model: BLIP_Retrieval,
    image: Tensor,
    text: TokenizedText,
    idx: Tensor,
    alpha: float,
    ranks: int = 1,
    micro_batch: int | None = None,
    keep_graphs: int = 0,
    generators: Sequence[torch.Generator] | None = None,
    poll: Callable[[], None] = never_stop,
    momentum_moved: bool = False,
    hard_negatives: bool = True,
) -> StepReport:
    """Accumulate the gradients of one step into `.grad`, and write the queues.

    image (n, 3, S, S), text (n, L), idx (n,), rank after rank; `micro_batch` images at a time (all when None). Leave
    the text on the host, where its lengths are read. `keep_graphs`: how many images keep their graph until they are
    matched, rounded down to whole micro-batches but at least one of them; other images are encoded twice.

    `poll` is called before each micro-batch and may raise to leave the step. A step that was left has changed nothing
    but the momentum twins (and clamped the temperature): take it again with `momentum_moved`.
    `hard_negatives` False draws them at random.
    """
    step = RetrievalStep(
        model, image, text, idx, alpha, ranks, micro_batch, generators, poll, momentum_moved, hard_negatives
    )
    size = micro_batch or len(image)
    text_feat = torch.cat([_backward_texts(step, part, poll) for part in slices(0, len(image), TEXTS_PER_IMAGE * size)])
    for pool in step.pools():
        parts = slices(pool.start, pool.stop, size)
        kept = max(1, keep_graphs // size)
        encoded = [_encode(step, part, i >= len(parts) - kept, poll) for i, part in enumerate(parts)]
        image_feat = torch.cat([part.feat.detach() for part in encoded])
        negatives = step.draw_negatives(pool, image_feat, text_feat[pool])
        while encoded:  # the kept graphs first: they are freed before others are built
            _backward_images(step, encoded.pop(), negatives, poll)
    step.write_queues()
    return StepReport(step.by_rank, step.starved)


def slices(start: int, stop: int, size: int) -> list[slice]:
    """start..stop in pieces of `size`, the last one shorter."""
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def _backward_texts(step: RetrievalStep, samples: slice, poll: Callable[[], None]) -> Tensor:
    """Backward pass of the terms of texts alone; returns the features (m, E) without graph."""
    poll()
    feat = step.encode_text(samples)
    step.add_up(step.text_terms(samples, feat)).backward()
    return feat.detach()


class _EncodedPart(NamedTuple):
    """A micro-batch of images: with tokens and graph or, to encode it again, with the state of the random generator."""

    samples: slice
    feat: Tensor  # (m, E)
    tokens: Tensor | None  # (m, N, V)
    rng_state: Tensor | None


def _encode(step: RetrievalStep, samples: slice, keep: bool, poll: Callable[[], None]) -> _EncodedPart:
    poll()
    if keep:
        image_tokens, feat = step.encode_image(samples)
        return _EncodedPart(samples, feat, image_tokens, None)
    state = _rng_state(step.image.device) if step.model.visual_encoder.stochastic else None
    with torch.no_grad():
        return _EncodedPart(samples, step.encode_image(samples, cls_only=True)[1], None, state)


def _backward_images(step: RetrievalStep, part: _EncodedPart, negatives: Negatives, poll: Callable[[], None]) -> None:
    """Encode the images again if their graph was not kept; backward pass of the terms of images and their pairs."""
    poll()
    samples, feat, image_tokens, rng_state = part
    if image_tokens is None:
        with _replay(rng_state, step.image.device):
            image_tokens, feat = step.encode_image(samples)
    step.add_up(step.image_terms(samples, image_tokens, feat, negatives)).backward()


def _rng_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def _replay(state: Tensor | None, device: torch.device) -> Iterator[None]:
    """Draw the same drop-path again (ViT-L); afterwards the generator is as if nothing had been drawn."""
    if state is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)
        yield


def _pool_text(
    text: TokenizedText, all_rank: bool, device: torch.device, columns: int
) -> tuple[TokenizedText, list[int]]:
    """The texts of the pool on the device, and their numbers of tokens on the host.

    Lengths are read where the loader left the texts, so nothing waits for the GPU; those of other processes arrive on
    the device. Processes then agree on `columns`, as their longest captions differ.
    """
    if get_world_size() == 1 or not all_rank:
        return text.to(device, non_blocking=True), text.attention_mask.sum(1).tolist()
    pool = TokenizedText(*map(all_gather, text.to(device, non_blocking=True).padded(columns)))
    return pool, pool.attention_mask.sum(1).tolist()
