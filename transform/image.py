"""PIL images to normalised tensors: BLIP's training and evaluation transforms for retrieval.

Source: BLIP (Li et al., ICML 2022), `data/__init__.py`; mean and std are CLIP's (Radford et al., 2021).
Legend: S image_size.
"""

from collections.abc import Sequence

from torchvision.transforms import (
    Compose,
    InterpolationMode,
    Normalize,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Resize,
    ToTensor,
)

from transform.randaugment import RandomAugment

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def train_transform(image_size: int, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Compose:
    """PIL RGB -> (3, S, S) float32: crop of half to all of the area, flip, RandAugment(2, 5); torch's RNG only."""
    return Compose(
        [
            RandomResizedCrop(image_size, scale=(0.5, 1.0), interpolation=InterpolationMode.BICUBIC),
            RandomHorizontalFlip(),
            RandomAugment(n=2, m=5),
            ToTensor(),
            Normalize(mean, std),
        ]
    )


def eval_transform(image_size: int, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Compose:
    """PIL RGB -> (3, S, S) float32: the whole image squeezed to a square, so that no object is cut off."""
    return Compose(
        [
            Resize((image_size, image_size), interpolation=InterpolationMode.BICUBIC),
            ToTensor(),
            Normalize(mean, std),
        ]
    )
