"""The model: encoders, losses, the published step, and `load`, which opens a checkpoint. Tensors in, tensors out."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`from models import load`, imported when asked for: other users of this package need not wait for it."""
    if name == "load":
        from models.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
