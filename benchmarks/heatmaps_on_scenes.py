"""Do heatmaps show the object that a word speaks of? On `scenes`, where every object has a cell of its own.

    python -m benchmarks.heatmaps_on_scenes output/retrieval_scenes [--captions 500]

For test captions of two objects of different colours, with the picture that they describe: which share of a word's map
lies in the cell of its object, and how often the map is highest there. By chance a ninth.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from configs.schema import load_config
from data.annotations import load_annotations
from data.images import open_store
from data.scenes import COLOURS
from models import load
from models.loading import Blip
from utils import Progress

KINDS = ("size", "colour", "shape")
CELLS, CELL = 3, 20  # cells a side, pixels of one
NEAR, LEAST = 60, 10  # distance of a pixel from a colour, pixels of that colour in an object's cell


def objects(caption: str, pixels: np.ndarray) -> Iterator[tuple[tuple[str, ...], int]]:
    """(size, colour, shape) of each object that the caption names, and the cell (0 to 8) that it lies in."""
    things = re.findall(r"(small|large) (\w+) (\w+)", caption)
    if len({colour for _, colour, _ in things}) < len(things):
        return
    for thing in things:
        near = np.abs(pixels.astype(int) - COLOURS[thing[1]]).sum(2) < NEAR  # (60, 60)
        by_cell = near.reshape(CELLS, CELL, CELLS, CELL).sum((1, 3)).ravel()
        if by_cell.max() >= LEAST:
            yield thing, int(by_cell.argmax())


def measure(blip: Blip, run: Path, captions: int, layer: int) -> dict[str, np.ndarray]:
    """Of each kind of word (n, 2): the share of its map in its object's cell, and whether it is highest there."""
    cfg = load_config(run / "config.yaml")
    table, store = load_annotations(cfg, "test"), open_store(cfg)
    chosen = np.linspace(0, len(table.captions) - 1, min(captions, len(table.captions))).astype(int)
    found: dict[str, list[tuple[float, bool]]] = {kind: [] for kind in KINDS}
    progress = Progress(f"layer {layer}", len(chosen), "captions")
    for index in chosen:
        picture = store.load(table.images[table.caption_image[index]])
        heatmap = blip.heatmap(picture, table.captions[index], layer)
        for thing, cell in objects(table.captions[index], np.asarray(picture)):
            for kind, word in zip(KINDS, thing, strict=True):
                if heatmap.words.count(word) == 1:
                    values = heatmap.maps[heatmap.words.index(word)].flatten().numpy()
                    if values.sum() > 0:
                        found[kind].append((values[cell] / values.sum(), values.argmax() == cell))
        progress.add(1)
    return {kind: np.array(rows, float).reshape(-1, 2) for kind, rows in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.heatmaps_on_scenes")
    parser.add_argument("run", type=Path, help="a run on scenes with patches of 20 pixels")
    parser.add_argument("--captions", type=int, default=500)
    args = parser.parse_args()
    blip = load(args.run)
    print("| layer | word | words | share of its map in its cell, % | highest there, % |\n|---|---|---|---|---|")
    for layer in range(len(blip.model.text_encoder.encoder.layer) - 1):
        for kind, rows in measure(blip, args.run, args.captions, layer).items():
            share, highest = 100 * rows.mean(0)
            print(f"| {layer} | {kind} | {len(rows)} | {share:.1f} | {highest:.1f} |")
    print("\nBy chance 11.1 %.")


if __name__ == "__main__":
    main()
