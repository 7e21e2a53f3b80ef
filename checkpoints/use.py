"""An exported BLIP without torch: `python use.py CAPTION PICTURE...` (onnxruntime, Pillow, tokenizers, numpy)."""

import json
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from rgb import PixelRule, to_rgb
from tokenizers import Tokenizer


def open_graph(path: Path):
    if path.suffix == ".pt2":  # of torch.export: this one does need torch
        import torch

        program = torch.export.load(path).module()
        return lambda *arrays: [x.numpy() for x in program(*map(torch.from_numpy, arrays))]
    from onnxruntime import InferenceSession

    session = InferenceSession(path)
    return lambda *arrays: session.run(None, {x.name: y for x, y in zip(session.get_inputs(), arrays, strict=True)})


class Exported:
    def __init__(self, folder: Path = Path(__file__).parent):
        self.rules = json.loads((folder / "preprocess.json").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))  # cuts and pads
        graphs = (next(folder.glob(f"{name}.*")) for name in ("image", "text", "match"))
        self.image_graph, self.text_graph, self.match_graph = map(open_graph, graphs)

    def pixels(self, picture) -> np.ndarray:  # a path -> (3, S, S)
        size, rule, mean, std = (self.rules["image"][key] for key in ("size", "rgb", "mean", "std"))
        with Image.open(picture) as image:
            square = to_rgb(image, PixelRule(**rule)).resize((size, size), Image.Resampling.BICUBIC)
        colours = np.asarray(square, np.float32) / 255  # (S, S, 3)
        return ((colours - np.array(mean, np.float32)) / np.array(std, np.float32)).transpose(2, 0, 1)

    def ids(self, captions) -> tuple[np.ndarray, np.ndarray]:  # ids and mask (M, L)
        captions = [text.lower() if self.rules["text"]["lower"] else text for text in captions]
        for old, new in self.rules["text"]["replace"]:
            captions = [re.sub(old, new, text) for text in captions]
        captions = [" ".join(text.split(" ")[: self.rules["text"]["max_words"]]) for text in captions]
        found = self.tokenizer.encode_batch(captions)
        return np.array([x.ids for x in found]), np.array([x.attention_mask for x in found])

    def images(self, pictures) -> list[np.ndarray]:  # tokens (N, n, V), unit-length features (N, E)
        return self.image_graph(np.stack([self.pixels(picture) for picture in pictures]))

    def texts(self, captions) -> np.ndarray:  # unit-length features (M, E)
        return self.text_graph(*self.ids(captions))[0]

    def match(self, captions, tokens) -> np.ndarray:  # logits (P, 2) of caption p with picture p
        return self.match_graph(*self.ids(captions), tokens)[0]


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    blip, caption, pictures = Exported(), sys.argv[1], sys.argv[2:]
    tokens, feature = blip.images(pictures)
    logits = blip.match([caption] * len(pictures), tokens)
    score, match = logits[:, 1] + feature @ blip.texts([caption])[0], 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
    for i in np.argsort(-score):
        print(f"{score[i]:8.3f}  P(match) {match[i]:.3f}  {pictures[i]}")
