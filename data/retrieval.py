"""Samples: a training pair of picture and caption, an evaluation picture, and the batch they are collated to.

b samples in a batch, S image side.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data.annotations import Annotations
from data.images import ImageStore
from data.tars import ShardError
from transform.text import CaptionTokenizer, TokenizedText

logger = logging.getLogger(__name__)


class TrainBatch(NamedTuple):
    """What a training step takes."""

    image: Tensor  # (b, 3, S, S) float32
    text: TokenizedText  # (b, L)
    idx: Tensor  # (b,) int64, equal for samples that are right answers to each other
    names: list[str]  # image paths, to name the culprits when a loss is not finite
    skipped: int = 0  # samples that stand in for one with an unreadable image (`on_bad_sample: skip`)


class TrainSample(NamedTuple):
    """One element of a `TrainBatch`."""

    image: Tensor  # (3, S, S)
    caption: str
    idx: int
    name: str
    skipped: bool = False


class RetrievalTrain(Dataset):
    """Pairs (image, caption), one for each caption, addressed by (epoch, index).

    The transform's randomness is a pure function of (seed, epoch, index): it does not matter which worker, process or
    resumed run asks for a sample. With `skip_bad_images`, the next sample replaces one whose image cannot be read; a
    shard that cannot be read stays an error.
    """

    def __init__(
        self,
        annotations: Annotations,
        store: ImageStore,
        transform: Callable[[Image.Image], Tensor],
        seed: int,
        skip_bad_images: bool = False,
    ) -> None:
        self.annotations, self.store, self.transform = annotations, store, transform
        self.seed, self.skip_bad_images = seed, skip_bad_images
        self.caption_ids = annotations.caption_ids
        self.told: set[str] = set()  # unreadable images that this process has named in the log

    def __len__(self) -> int:
        return len(self.annotations.captions)

    def __getitem__(self, key: tuple[int, int]) -> TrainSample:
        epoch, index = key
        for taken in range(index, index + len(self)):
            taken %= len(self)
            name = self.annotations.images[self.annotations.caption_image[taken]]
            try:
                picture = self.store.load(name)
            except ShardError:  # not one image but a whole shard
                raise
            except ValueError as error:
                if not self.skip_bad_images:
                    raise
                if name not in self.told:
                    self.told.add(name)
                    logger.warning("skipped: %s", error)
                continue
            image = transform_seeded(self.transform, picture, (self.seed, epoch, index))
            caption, idx = self.annotations.captions[taken], int(self.caption_ids[taken])
            return TrainSample(image, caption, idx, name, skipped=taken != index)
        raise ValueError(f"none of the images of {self.annotations.name} can be read: see the warnings above")


def transform_seeded(transform: Callable[[Image.Image], Tensor], picture: Image.Image, key: tuple[int, ...]) -> Tensor:
    """`transform(picture)` with torch's CPU generator seeded from `key` and restored afterwards."""
    state = torch.get_rng_state()
    try:
        # Not torch.manual_seed: with num_workers 0 that would also reset the GPU's generator, and dropout with it.
        torch.default_generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
        return transform(picture)
    finally:
        torch.set_rng_state(state)


def collate_train(samples: list[TrainSample], tokenizer: CaptionTokenizer) -> TrainBatch:
    """Stack pictures, tokenise captions to the longest of the batch."""
    images, captions, ids, names, skipped = zip(*samples, strict=True)
    return TrainBatch(torch.stack(images), tokenizer.tokenize(captions), torch.tensor(ids), list(names), sum(skipped))


class EvalImages(Dataset):
    """The pictures of an evaluation gallery, each (3, S, S), in the order of `annotations.images`."""

    def __init__(self, annotations: Annotations, store: ImageStore, transform: Callable[[Image.Image], Tensor]) -> None:
        self.annotations, self.store, self.transform = annotations, store, transform

    def __len__(self) -> int:
        return len(self.annotations.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.store.load(self.annotations.images[index]))
