"""The published Recall of the released checkpoints, to hold an evaluation against.

Source: Li et al. 2022 (BLIP, arXiv 2201.12086), Table 5.
"""

from pathlib import PurePosixPath
from urllib.parse import urlparse

from configs.datasets import DATASETS
from retrieval.metrics import KS

# Released file: its data set, and the test split's Recall@1/5/10 of image -> text, then of text -> image, in percent.
PUBLISHED = {
    "model_base_retrieval_coco.pth": ("coco", (81.9, 95.4, 97.8, 64.3, 85.7, 91.5)),
    "model_base_retrieval_flickr.pth": ("flickr", (97.3, 99.9, 100.0, 87.3, 97.6, 98.9)),
    "model_large_retrieval_coco.pth": ("coco", (82.4, 95.4, 97.9, 65.1, 86.3, 91.8)),
    "model_large_retrieval_flickr.pth": ("flickr", (97.4, 99.8, 99.9, 87.6, 97.7, 99.0)),
}
AGREES = 0.5  # points of Recall within which repetitions of the published numbers lie


def published_metrics(source: str, dataset: str, split: str, images: int, captions: int) -> dict[str, float]:
    """Published numbers of a released file, known by its name, on the whole test split of its data set; else none."""
    home, values = PUBLISHED.get(PurePosixPath(urlparse(source).path).name, ("", ()))
    if not values or split != "test" or home != dataset or (images, captions) != DATASETS[dataset].counts.get(split):
        return {}
    keys = [f"{way}_r{k}" for way in ("txt", "img") for k in KS]
    return {**dict(zip(keys, values, strict=True)), "r_mean": sum(values) / len(values)}


def compare(metrics: dict[str, float], published: dict[str, float]) -> str:
    """A line that says of TR@1, IR@1 and the mean whether they are the published ones."""
    parts = []
    for name, key in (("TR@1", "txt_r1"), ("IR@1", "img_r1"), ("mean", "r_mean")):
        difference = metrics[key] - published[key]
        verdict = "within" if abs(difference) <= AGREES + 1e-9 else "NOT within"
        parts.append(f"{name} {difference:+.2f} ({verdict} {AGREES})")
    return f"against the published numbers: {', '.join(parts)}"
