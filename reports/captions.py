"""Retrieved texts as captions: the best text of every image, measured as captions are.

From the test gallery, a right answer is one of the image's own references, so hits and misses are told apart. From the
training captions it is nearest-neighbour captioning, comparable with captioning papers.

Shapes: N images, T different training captions, E embedding width, k shortlist.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoints.weights import weights_sha256
from configs.schema import load_config
from data.annotations import load_annotations
from data.images import open_store
from models import load
from retrieval.captions import MEASURES, caption_scores, require_java
from retrieval.rankings import Rankings, load_rankings, rankings_file
from utils import Progress, record

GALLERIES = ("train", "test")
RECORD = "captions.txt"  # of a run folder: one JSON line a measurement


class Retrieved(NamedTuple):
    """One caption an image, its references, whether the caption is one of them, and whose choice it is."""

    candidates: list[str]
    references: list[list[str]]
    hit: np.ndarray  # (N,) bool
    sha256: str  # of the weights that chose; '' where kept rankings do not say


def from_test(rankings: Rankings) -> Retrieved:
    """The caption that stands first in the kept ranking, for each image that has captions of its own."""
    asked = np.flatnonzero(rankings.txt.asked)
    first = rankings.txt.itm.best[asked, 0]
    references = [[rankings.captions[i] for i in rankings.right("txt", int(image))] for image in asked]
    hit, sha256 = rankings.txt.itm.place[asked] == 0, rankings.row.get("checkpoint_sha256", "")
    return Retrieved([rankings.captions[i] for i in first], references, hit, sha256)


def from_train(run: Path, rankings: Rankings, device: str) -> Retrieved:
    """The best training caption of each test image: contrast picks k_test of them, matching the best of these."""
    cfg = load_config(run / "config.yaml")
    store, blip = open_store(cfg), load(run, device)
    texts = list(dict.fromkeys(load_annotations(cfg, "train", blip.model.tokenizer).captions))
    asked = np.flatnonzero(rankings.txt.asked)
    feat = blip.text_features(texts)  # (T, E)
    candidates, progress = [], Progress("captions of the training set", len(asked), "images")
    for image in asked:
        picture = store.load(rankings.images[image])
        cosine = (blip.image_features(picture) @ feat.T)[0]  # (T,)
        best = cosine.topk(min(cfg.k_test, len(texts))).indices.tolist()
        score = blip.score(picture, [texts[i] for i in best])[0]  # (k,)
        candidates.append(texts[best[int(score.argmax())]])
        progress.add(1)
    references = [[rankings.captions[i] for i in rankings.right("txt", int(image))] for image in asked]
    hit = np.array([text in own for text, own in zip(candidates, references, strict=True)])
    return Retrieved(candidates, references, hit, weights_sha256(blip.model))


def caption_table(run: Path, gallery: str, spice: bool = False, device: str = "cpu") -> list[str]:
    """Lines of a table of all measures; a line of JSON goes to the run folder."""
    require_java(spice)
    rankings = load_rankings(rankings_file(run, "test"))
    found = from_test(rankings) if gallery == "test" else from_train(run, rankings, device)
    rows: dict[str, tuple[int, dict[str, float]]] = {}
    for title, mask in (("all", np.ones_like(found.hit)), ("hits", found.hit), ("misses", ~found.hit)):
        chosen = np.flatnonzero(mask)
        if len(chosen) and (title == "all" or gallery == "test"):
            texts = [found.candidates[i] for i in chosen], [found.references[i] for i in chosen]
            rows[title] = len(chosen), caption_scores(*texts, spice=spice)
    names = [*MEASURES, *(["SPICE"] if spice else [])]
    lines = [f"{f'texts of {gallery}':16}{'images':>8}" + "".join(f"{name:>9}" for name in names)]
    for title, (count, scores) in rows.items():
        lines.append(f"{title:16}{count:8}" + "".join(f"{scores[name]:9.2f}" for name in names))
    row: dict[str, Any] = {"gallery": gallery, "split": rankings.split, "images": len(found.candidates)}
    row |= {f"{title}_{name}": round(value, 4) for title, (_, scores) in rows.items() for name, value in scores.items()}
    record(run / RECORD, row | {"checkpoint_sha256": found.sha256})
    return lines
