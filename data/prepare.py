"""Karpathy's own files of COCO and Flickr30k to annotation files in BLIP's layout.

    python -m data.prepare convert dataset_coco.json annotation

Sources: the splits of Karpathy & Fei-Fei (CVPR 2015), `dataset_coco.json` and `dataset_flickr30k.json`; the layout of
BLIP's annotation files (Li et al., ICML 2022), whose training split is COCO's `train` and `restval` together.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.datasets import DATASETS, SPLITS

SPLIT_OF = {"train": "train", "restval": "train", "val": "val", "test": "test"}  # Karpathy's split: BLIP's


def convert(source: Path, folder: Path) -> list[Path]:
    """Write Karpathy's file `source` as one file per split, in BLIP's layout: all of them or none."""
    dataset, entries = _read_karpathy(source)
    rows: dict[str, list[dict]] = {split: [] for split in SPLITS}
    running = 0  # image_id where none is published, as for Flickr30k
    for number, entry in enumerate(entries, 1):
        split, image, published_id, captions = _entry(source, number, entry, dataset)
        if split != "train":
            ids = {"sentids": entry["sentids"]} if len(entry.get("sentids") or ()) == len(captions) else {}
            rows[split].append({"image": image, "caption": captions} | ids)
            continue
        image_id = running if published_id is None else published_id
        rows["train"] += [{"caption": caption, "image": image, "image_id": image_id} for caption in captions]
        running += 1
    lacking = [split for split in SPLITS if not rows[split]]
    if lacking:
        raise ValueError(f"{source}: has no image of the split {lacking[0]}: it is cut short, fetch it again")
    return _write_all({folder / DATASETS[dataset].files.format(split): rows[split] for split in SPLITS})


def _read_karpathy(source: Path) -> tuple[str, list]:
    try:
        data = json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{source} cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON ({error}): fetch it again") from None
    if not isinstance(data, dict) or not isinstance(data.get("images"), list):
        raise ValueError(f"{source} is not one of Karpathy's files: it needs the keys dataset and images")
    known = {info.karpathy: dataset for dataset, info in DATASETS.items() if info.karpathy}
    if data.get("dataset") not in list(known):
        raise ValueError(
            f"{source}: key 'dataset' is {data.get('dataset')!r}, not {' or '.join(known)}; for other images use "
            "dataset: custom (configs/retrieval_custom.yaml)"
        )
    return known[data["dataset"]], data["images"]


def _entry(source: Path, number: int, entry: Any, dataset: str) -> tuple[str, str, str | None, list[str]]:
    """Split, path, image_id and captions of one image."""
    folders = list(DATASETS[dataset].sources)
    try:
        split, name = SPLIT_OF[entry["split"]], entry["filename"]
        captions = [sentence["raw"] for sentence in entry["sentences"]]
        folder = entry["filepath"] if len(folders) > 1 else folders[0]
        image_id = f"coco_{entry['cocoid']}" if dataset == "coco" else None
    except (KeyError, TypeError) as error:
        raise ValueError(f"{source}, image {number} lacks a key, or has a value of another kind ({error})") from None
    texts = [folder, name, *captions]
    if not captions or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{source}, image {number}: filepath, filename and sentences[].raw must be non-empty texts")
    return split, f"{folder}/{name}", image_id, captions


def _write_all(files: dict[Path, list[dict]]) -> list[Path]:
    for path in files:
        if path.exists():
            raise ValueError(f"{path} is there already: remove it, or convert into another folder")
    parts = {path: path.with_name(f".{path.name}.part") for path in files}
    try:
        for path, rows in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            parts[path].write_text(json.dumps(rows), encoding="utf-8")
        for path, part in parts.items():
            os.replace(part, path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    return list(files)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 converted, 2 something is wrong (one paragraph on stderr)."""
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description="Prepare COCO and Flickr30k.")
    commands = parser.add_subparsers(dest="command", required=True)
    converting = commands.add_parser("convert", help="Karpathy's dataset_coco.json or dataset_flickr30k.json")
    converting.add_argument("source", type=Path, metavar="JSON")
    converting.add_argument("folder", type=Path, metavar="OUT", help="the config's ann_root")
    args = parser.parse_args(argv)
    try:
        for path in convert(args.source, args.folder):
            print(path)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
