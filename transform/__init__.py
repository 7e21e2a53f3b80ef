"""Pixels and captions to tensors: `image.py` (with `randaugment.py`) and `text.py`."""
