"""From which P(match) on a picture counts as found: calibrated on a validation split, kept beside the checkpoint.

A caption whose own picture is in the gallery should find something; the same caption with that picture (and all of its
id) taken out should find nothing. The threshold is the value that tells the two cases apart best: the highest mean of
the shares that are right (Youden 1950). Only pictures in the shortlist count, as in a search.

Shapes: M captions.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from checkpoints.weights import weights_sha256
from configs.schema import load_config
from data.annotations import NO_IMAGE, load_annotations
from data.images import open_store
from models.loading import Blip
from retrieval.features import encode
from retrieval.index import write_json
from utils import Progress

FILE = "threshold.json"  # beside a checkpoint
SHORTLIST = 32


class Calibration(NamedTuple):
    """A threshold and what it does on the split that chose it."""

    threshold: float
    found: float  # share of captions with their picture for which something matches
    nothing: float  # share of captions without their picture for which nothing does
    captions: int


def calibrate(blip: Blip, run: Path, most: int = 500) -> Calibration:
    """Calibrate on up to `most` captions of the run's validation split, evenly spread."""
    cfg = load_config(run / "config.yaml")
    table, store = load_annotations(cfg, "val", blip.model.tokenizer), open_store(cfg)
    asked = np.flatnonzero(table.caption_image != NO_IMAGE)
    asked = asked[np.linspace(0, len(asked) - 1, min(most, len(asked))).astype(int)]
    image_feat = encode(blip, store, table.images).numpy()
    text_feat = blip.text_features([table.captions[i] for i in asked]).numpy()
    with_own, without = np.zeros(len(asked)), np.zeros(len(asked))
    progress = Progress("calibrate", len(asked), "captions")
    for number, caption in enumerate(asked):
        best = np.argsort(-(text_feat[number] @ image_feat.T), kind="stable")[:SHORTLIST]
        match = blip.match([store.load(table.images[i]) for i in best], table.captions[caption])[:, 0].numpy()
        own = table.image_ids[best] == table.caption_ids[caption]
        with_own[number], without[number] = match.max(), match[~own].max(initial=0)
        progress.add(1)
    return best_threshold(with_own, without)


def best_threshold(with_own: np.ndarray, without: np.ndarray) -> Calibration:
    """The best P(match) (M,) of searches that should find something, and of those that should not."""
    candidates = np.unique(np.concatenate([with_own, without]))
    found = 1 - np.searchsorted(np.sort(with_own), candidates, "left") / len(with_own)
    nothing = np.searchsorted(np.sort(without), candidates, "left") / len(without)
    best = int(np.argmax(found + nothing))
    return Calibration(float(candidates[best]), float(found[best]), float(nothing[best]), len(with_own))


def keep_threshold(blip: Blip, run: Path, calibration: Calibration) -> Path:
    """Write it beside the checkpoint, with the weights that it belongs to."""
    values = calibration._asdict() | {"split": "val", "weights_sha256": weights_sha256(blip.model)}
    write_json(run / FILE, values)
    return run / FILE


def kept_threshold(checkpoint: str, sha256: str) -> float | None:
    """The threshold beside a checkpoint, if it was made with these weights."""
    path = Path(checkpoint)
    path = (path if path.is_dir() else path.parent) / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return float(values["threshold"]) if values["weights_sha256"] == sha256 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
