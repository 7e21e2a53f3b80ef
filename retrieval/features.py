"""Embeddings of pictures that need not fit into memory together.

Shapes: N pictures, E embedding width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from data.images import ImageStore
from models.loading import Blip

CHUNK = 256  # pictures held decoded at once


def encode(blip: Blip, store: ImageStore, names: Sequence[str]) -> Tensor:
    """Embeddings (N, E) of the store's pictures with these names."""
    chunks = (names[start : start + CHUNK] for start in range(0, len(names), CHUNK))
    return torch.cat([blip.image_features([store.load(name) for name in chunk]) for chunk in chunks])
