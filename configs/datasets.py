"""The table of data sets. A new one is an entry here and a YAML file beside it.

Sources: the splits of Karpathy & Fei-Fei (CVPR 2015); names, addresses and counts of BLIP's annotation files (Li et
al., ICML 2022).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

SPLITS = ("train", "val", "test")
ANNOTATIONS_URL = "https://storage.googleapis.com/sfr-vision-language-research/datasets/"


@dataclass(frozen=True)
class DatasetInfo:
    """What is known about a data set before its files are read."""

    files: str = ""  # annotation file of a split, under ann_root; '' = the config names the files
    online: bool = False  # whether those files can be downloaded from ANNOTATIONS_URL
    drawn: bool = False  # whether data/scenes.py draws annotations and images at the first use
    karpathy: str = ""  # its name in Karpathy's own JSON, which `data.prepare convert` reads
    counts: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # split: published images and captions
    sources: Mapping[str, str] = field(default_factory=dict)  # folder under image_root: where its images come from


DATASETS = {
    "coco": DatasetInfo(
        files="coco_karpathy_{}.json",
        online=True,
        karpathy="coco",
        counts={"train": (113287, 566747), "val": (5000, 25010), "test": (5000, 25010)},
        sources={
            "train2014": "unpack http://images.cocodataset.org/zips/train2014.zip (13 GB, 82,783 images)",
            "val2014": "unpack http://images.cocodataset.org/zips/val2014.zip (6 GB, 40,504 images)",
        },
    ),
    "flickr": DatasetInfo(
        files="flickr30k_{}.json",
        online=True,
        karpathy="flickr30k",
        counts={"train": (29000, 145000), "val": (1014, 5070), "test": (1000, 5000)},
        sources={
            "flickr30k-images": "ask the University of Illinois (https://shannon.cs.illinois.edu/DenotationGraph/) "
            "for them",
        },
    ),
    "scenes": DatasetInfo(files="{}.json", drawn=True),
    "emoji": DatasetInfo(files="{}.json"),
    "custom": DatasetInfo(),
}
