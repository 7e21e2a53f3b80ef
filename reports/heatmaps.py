"""Drawings of heatmaps: each word of a caption over the pixels that the model saw, all on one scale.

`python -m reports.heatmaps RUN OUT_FOLDER [SEED]` draws one of a run.
"""

import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from configs.schema import load_config
from data.annotations import load_annotations
from data.images import open_store
from models import load
from models.gradcam import Heatmap
from reports.pictures import INK, PALE, draw_captions, font

SIDE, GAP, LABEL, COLUMNS = 180, 14, 26, 6  # pixels of a tile, between tiles, under a tile; tiles in a row
HEAD = 40
# What lies over the picture where a map is at 0, 1/2 and 1 of the scale: (red, green, blue, opacity).
RAMP = np.array([(255, 220, 0, 0.0), (255, 140, 0, 0.45), (220, 0, 20, 0.85)])


def overlay(image: Image.Image, values: Tensor, scale: float) -> Image.Image:
    """A map (g, g), stretched smoothly over the picture; `scale` is the value of the strongest colour."""
    if scale <= 0:
        return image.copy()
    grid = Image.fromarray((values / scale).float().numpy())  # mode F
    level = np.asarray(grid.resize(image.size, Image.Resampling.BILINEAR)).clip(0, 1)  # (h, w)
    colour = np.stack([np.interp(level, (0, 0.5, 1), RAMP[:, i]) for i in range(4)], axis=-1)
    opacity = colour[..., 3:]
    mixed = np.asarray(image, float) * (1 - opacity) + colour[..., :3] * opacity
    return Image.fromarray(mixed.round().astype(np.uint8))


def seen_by_model(image: Image.Image, size: int, shown: int = SIDE) -> Image.Image:
    """The square that evaluation makes of a picture, enlarged or shrunk to `shown` pixels."""
    return image.resize((size, size), Image.Resampling.BICUBIC).resize((shown, shown), Image.Resampling.BICUBIC)


def draw_heatmap(image: Image.Image, found: Heatmap) -> Image.Image:
    """The picture, the sentence's map and one for each word; the words share a scale, so that they can be compared."""
    square = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    scale = float(found.maps.max())
    tiles = [
        (square, "picture"),
        (overlay(square, found.sentence, float(found.sentence.max())), "all words, own scale"),
    ]
    tiles += [(overlay(square, values, scale), word) for word, values in zip(found.words, found.maps, strict=True)]
    rows = -(-len(tiles) // COLUMNS)
    columns = min(COLUMNS, len(tiles))
    sheet = Image.new("RGB", (GAP + columns * (SIDE + GAP), HEAD + rows * (SIDE + LABEL + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    nothing = "" if scale > 0 else "; nothing spoke for a match"
    pen.text((GAP, 11), f"P(match) {found.match:.3f}, layer {found.layer}{nothing}", PALE, font(15))
    for number, (tile, word) in enumerate(tiles):
        x, y = GAP + number % COLUMNS * (SIDE + GAP), HEAD + number // COLUMNS * (SIDE + LABEL + GAP)
        sheet.paste(tile, (x, y))
        label = without_accents(word)
        label = label if len(label) < 24 else f"{label[:22]}…"
        pen.text((x + SIDE // 2, y + SIDE + 13), label, INK, font(15), anchor="mm")
    return sheet


def without_accents(word: str) -> str:
    """A word as the tokenizer reads it, and as the font can write it."""
    return "".join(c for c in unicodedata.normalize("NFD", word) if not unicodedata.combining(c))


def word_tiles(image: Image.Image, found: Heatmap, shown: int) -> Sequence[tuple[str, Image.Image]]:
    """Each word with its map over a small picture, for a page."""
    square, scale = image.resize((shown, shown), Image.Resampling.BICUBIC), float(found.maps.max())
    return [(word, overlay(square, values, scale)) for word, values in zip(found.words, found.maps, strict=True)]


def heatmap_of_run(run: Path, out: Path, seed: int = 0) -> Path:
    """Draw a test caption of a run, drawn by chance, over its picture."""
    cfg = load_config(run / "config.yaml")
    store, blip = open_store(cfg), load(run)
    table = load_annotations(cfg, "test", blip.model.tokenizer)
    (caption,) = draw_captions(table, 1, seed)
    picture = store.load(table.images[table.caption_image[caption]])
    found = blip.heatmap(picture, table.captions[caption])
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{run.resolve().name}_heatmap.png"
    draw_heatmap(seen_by_model(picture, cfg.image_size), found).save(path, optimize=True)
    return path


if __name__ == "__main__":
    print(heatmap_of_run(Path(sys.argv[1]), Path(sys.argv[2]), int((sys.argv[3:] or ["0"])[0])))
