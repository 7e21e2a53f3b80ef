"""Pictures and captions for benchmarks that go through files: JPEG of COCO's size, captions of COCO's lengths."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from training.dry_run import CAPTION_LENGTHS
from transform.text import read_vocabulary

SIZE = (640, 480)  # of most pictures in COCO


def draw_pictures(folder: Path, count: int) -> list[str]:
    """Names of JPEG files: coloured areas with some noise, about 100 kB each, as photographs have."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, names = np.random.default_rng(0), [f"{i:06d}.jpg" for i in range(count)]
    for name in names:
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            SIZE, Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse).astype(np.int16) + rng.integers(-12, 13, (SIZE[1], SIZE[0], 3), dtype=np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / name, quality=85)
    return names


def write_captions(path: Path, images: list[str], count: int) -> None:
    """An annotation file: `count` captions of random words, dealt to the images in turn."""
    rng = np.random.default_rng(0)
    words = [word for word in read_vocabulary() if word.isascii() and word.isalpha() and len(word) > 2]
    share = np.array(CAPTION_LENGTHS) / sum(CAPTION_LENGTHS)
    lengths = rng.choice(np.arange(8, 8 + len(share)), count, p=share) - 2  # without [CLS] and [SEP]
    captions = [" ".join(words[i] for i in rng.integers(0, len(words), length)) for length in lengths]
    rows = [{"image": name, "caption": captions[i :: len(images)]} for i, name in enumerate(images)]
    path.write_text(json.dumps(rows), encoding="utf-8")
