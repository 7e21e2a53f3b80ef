"""Prepare COCO and Flickr30k: check what is on the disk, convert Karpathy's own files.

    python -m data.prepare check --config configs/retrieval_coco.yaml [--decode]     or a folder in place of --config
    python -m data.prepare convert dataset_coco.json annotation

Sources: the splits of Karpathy & Fei-Fei (CVPR 2015), `dataset_coco.json` and `dataset_flickr30k.json`; the layout and
the counts of BLIP's annotation files (Li et al., ICML 2022). Training holds COCO's `train` and `restval`.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from configs.schema import load_config
from data.annotations import FILES, SPLITS, URL, Annotations, build_annotations
from data.checks import Findings, check_images
from data.images import ImageStore
from data.rows import read_rows
from utils import find_path, setup_logging

COUNTS = {  # images and captions of each split, as BLIP's files have them
    "coco": {"train": (113287, 566747), "val": (5000, 25010), "test": (5000, 25010)},
    "flickr": {"train": (29000, 145000), "val": (1014, 5070), "test": (1000, 5000)},
}
KARPATHY = {"coco": "coco", "flickr30k": "flickr"}  # the name in Karpathy's file: ours
WHERE = {  # folder under image_root: where its images come from
    "train2014": "unpack http://images.cocodataset.org/zips/train2014.zip (13 GB, 82,783 images)",
    "val2014": "unpack http://images.cocodataset.org/zips/val2014.zip (6 GB, 40,504 images)",
    "flickr30k-images": "ask the University of Illinois (https://shannon.cs.illinois.edu/DenotationGraph/) for them",
}
FOLDERS = {"coco": ("train2014", "val2014"), "flickr": ("flickr30k-images",)}
JOINED = {"train": "train", "restval": "train", "val": "val", "test": "test"}


# ---- check ----------------------------------------------------------------------------------------------------------


def check_layout(cfg: Any, decode: bool) -> Findings:
    """Annotations, counts and images of `cfg.dataset`, coco or flickr; `decode` reads every image."""
    if cfg.dataset not in COUNTS:
        raise ValueError(
            f"dataset {cfg.dataset!r} has no fixed layout: use `python train_retrieval.py --config ... --check`"
        )
    found, tables = Findings(), {}
    for split in SPLITS:
        file = find_path(cfg.ann_root) / FILES[cfg.dataset][0].format(split)
        if not file.exists():
            source = f"dataset_{'coco' if cfg.dataset == 'coco' else 'flickr30k'}.json"
            found.errors.append(
                f"{file} is missing: the first run downloads it from {URL}{file.name}; without network fetch it "
                f"elsewhere, or make it with `python -m data.prepare convert {source} {file.parent}`"
            )
            continue
        found.attempt(
            lambda split=split, file=file: tables.update(
                {split: build_annotations(f"{cfg.dataset} {split}", file, read_rows(file))}
            )
        )
    for split, table in tables.items():
        found.add(check_counts(table, *COUNTS[cfg.dataset][split]))
    try:
        found.add(check_folders(ImageStore(cfg.image_root), tables, decode))
    except ValueError as error:
        sources = "; ".join(f"{folder}/: {WHERE[folder]}" for folder in FOLDERS[cfg.dataset])
        found.errors.append(f"{error}. Its folders: {sources}")
    return found


def check_counts(table: Annotations, images: int, captions: int) -> Findings:
    """A table's size against the published split's."""
    line = f"{table.name}: {len(table.images):,} images, {len(table.captions):,} captions"
    if (len(table.images), len(table.captions)) == (images, captions):
        return Findings(facts=[f"{line}, as published"])
    return Findings(
        errors=[
            f"{table.file}: {len(table.images):,} images and {len(table.captions):,} captions, not the published "
            f"{images:,} and {captions:,}: Recall cannot be compared. Delete it, the first run downloads it again"
        ]
    )


def check_folders(store: ImageStore, tables: dict[str, Annotations], decode: bool) -> Findings:
    """Missing images by folder, with where to get them; with `decode`, unreadable ones too."""
    found = Findings()
    for table in tables.values():
        missing = store.missing(table.images)
        wanted = Counter(os.path.dirname(name) for name in table.images)
        for folder, count in Counter(os.path.dirname(name) for name in missing).items():
            first = next(name for name in missing if os.path.dirname(name) == folder)
            found.errors.append(
                f"{table.name}: {count:,} of {wanted[folder]:,} images of {folder or 'image_root'} are missing under "
                f"{store.root} (the first: {first}): {WHERE.get(folder, 'put them there')}"
            )
        if not missing:
            found.facts.append(f"{table.name}: all {len(table.images):,} images are under {store.root}")
            if decode:
                found.add(check_images(store, table, full=True, skip=False)[0])
    return found


def guess(folder: Path) -> SimpleNamespace:
    """The settings for a folder that holds images and, in it or in `annotation`, annotation files."""
    for root in (folder, folder / "annotation"):
        for dataset in COUNTS:
            if any((root / FILES[dataset][0].format(split)).exists() for split in SPLITS):
                return SimpleNamespace(dataset=dataset, ann_root=str(root), image_root=str(folder))
    raise ValueError(
        f"{folder}: neither it nor its folder annotation holds coco_karpathy_*.json or flickr30k_*.json: name the "
        "folder that does, or use --config"
    )


# ---- convert --------------------------------------------------------------------------------------------------------


def convert(source: Path, folder: Path) -> list[Path]:
    """Karpathy's file to one file a split, in BLIP's layout; all of them are written, or none."""
    dataset, entries = _read_karpathy(source)
    rows: dict[str, list[dict]] = {split: [] for split in SPLITS}
    running = 0  # image_id of Flickr30k, which publishes none
    for number, entry in enumerate(entries, 1):
        split, image, image_id, captions = _entry(source, number, entry, dataset)
        if split != "train":
            rows[split].append({"image": image, "caption": captions})
            continue
        image_id = running if image_id is None else image_id
        rows["train"] += [{"caption": caption, "image": image, "image_id": image_id} for caption in captions]
        running += 1
    lacking = [split for split in SPLITS if not rows[split]]
    if lacking:
        raise ValueError(f"{source}: has no image of the split {lacking[0]}: it is cut short, fetch it again")
    return _write_all({folder / FILES[dataset][0].format(split): rows[split] for split in SPLITS})


def _read_karpathy(source: Path) -> tuple[str, list]:
    try:
        data = json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{source} cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON ({error}): fetch it again") from None
    if not isinstance(data, dict) or not isinstance(data.get("images"), list):
        raise ValueError(f"{source} is not one of Karpathy's files: it needs the keys dataset and images")
    if data.get("dataset") not in KARPATHY:
        raise ValueError(
            f"{source}: key 'dataset' is {data.get('dataset')!r}, not coco or flickr30k; for other images use "
            "dataset: custom (configs/retrieval_custom.yaml)"
        )
    return KARPATHY[data["dataset"]], data["images"]


def _entry(source: Path, number: int, entry: Any, dataset: str) -> tuple[str, str, str | None, list[str]]:
    """Split, path, image_id and captions of one image."""
    try:
        split, name = JOINED[entry["split"]], entry["filename"]
        captions = [sentence["raw"] for sentence in entry["sentences"]]
        place = entry["filepath"] if dataset == "coco" else "flickr30k-images"
        image_id = f"coco_{entry['cocoid']}" if dataset == "coco" else None
    except (KeyError, TypeError) as error:
        raise ValueError(f"{source}, image {number} lacks, or has another kind of value under, {error}") from None
    texts = [place, name, *captions]
    if not captions or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{source}, image {number}: filepath, filename and sentences[].raw must be non-empty texts")
    return split, f"{place}/{name}", image_id, captions


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


# ---- command line ---------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 all is well, 2 something is missing or wrong (on stderr, a paragraph each)."""
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description="Prepare COCO and Flickr30k.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="say what is missing or wrong, and where it comes from")
    check.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="images and annotations, unless --config")
    check.add_argument("--config", metavar="YAML", help="takes dataset, image_root and ann_root from a config")
    check.add_argument("--decode", action="store_true", help="read every image, too")
    converting = commands.add_parser("convert", help="Karpathy's dataset_coco.json or dataset_flickr30k.json")
    converting.add_argument("source", type=Path, metavar="JSON")
    converting.add_argument("folder", type=Path, metavar="OUT", help="the config's ann_root")
    args = parser.parse_args(argv)
    if args.command == "check" and bool(args.folder) == bool(args.config):
        check.error("give either FOLDER or --config YAML")
    setup_logging()
    try:
        if args.command == "convert":
            for path in convert(args.source, args.folder):
                print(path)
            return 0
        found = check_layout(load_config(args.config) if args.config else guess(args.folder), args.decode)
    except (ValueError, OSError) as error:
        found = Findings(errors=[str(error)])
    if found.facts or not found.errors:
        print(found.report())
    for error in found.errors:
        print(f"error: {error}", file=sys.stderr)
    return 2 if found.errors else 0


if __name__ == "__main__":
    sys.exit(main())
