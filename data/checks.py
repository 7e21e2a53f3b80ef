"""What can be known to be wrong with annotations and images before the first step.

Errors stop a run, warnings come with a remedy, facts are for the reader. A run looks at a sample when it starts;
`--check` looks at everything and writes nothing.
"""

from collections import Counter

import numpy as np

from configs.datasets import DATASETS
from configs.schema import RetrievalConfig
from data.annotations import Annotations
from data.caption_checks import check_captions
from data.findings import RARE, Findings
from data.image_checks import check_images
from data.images import open_store

QUICK_CAPTIONS = 2000  # of each split that the start of a run looks at


def check_data(cfg: RetrievalConfig, splits: dict[str, Annotations], full: bool = False) -> Findings:
    """Counts, captions, ids, images and what the splits share; `full`: all images and captions, not a sample."""
    found, info = Findings(), DATASETS[cfg.dataset]
    found.facts += dict.fromkeys(note for table in splits.values() for note in table.notes)
    for split, table in splits.items():
        found.add(check_counts(table, info.counts.get(split), full))
        found.add(check_captions(table, len(table.captions) if full else QUICK_CAPTIONS))
        found.warnings += id_warnings(table, split)
    if info.drawn and not splits:
        return found  # nothing could be drawn, which has been said
    prints: dict[str, dict[str, str]] = {}
    try:
        store = open_store(cfg)
        store.missing([])  # opens an archive, which may be broken
    except ValueError as error:
        folders = "; ".join(f"{folder}/: {source}" for folder, source in info.sources.items())
        found.errors.append(f"{error}. Its folders: {folders}" if folders else str(error))
    else:
        for split, table in splits.items():
            skip = cfg.on_bad_sample == "skip" and split == "train"
            images, prints[split] = check_images(store, table, info.sources, full, skip)
            found.add(images)
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        if one in splits and other in splits:
            found.add(overlap(splits[one], splits[other], prints.get(one, {}), prints.get(other, {})))
    return found


def check_counts(table: Annotations, published: tuple[int, int] | None, full: bool) -> Findings:
    """Numbers of images and captions; other ones than the published are an error of `--check`, a warning of a run."""
    images, captions, ids = len(table.images), len(table.captions), len(np.unique(table.image_ids))
    line = f"{table.name}: {images} images, {captions} captions"
    if (images, captions) == published:
        return Findings(facts=[f"{line}, as published ({table.source})"])
    found = Findings(facts=[f"{line}, {ids} ids ({table.source})"])
    if published:
        (found.errors if full else found.warnings).append(
            f"{table.source}: {images:,} images and {captions:,} captions, not the published {published[0]:,} and "
            f"{published[1]:,}: Recall cannot be compared. Delete it, the next run downloads it again"
        )
    return found


def id_warnings(table: Annotations, split: str) -> list[str]:
    """Captions given twice, an id that covers most of a training set, captions shared by different ids."""
    warnings, count = [], len(table.captions)
    twice = count - len(set(zip(table.caption_image.tolist(), table.captions, strict=True)))
    if twice > RARE * count:
        warnings.append(f"{table.name}: {twice} of {count} captions repeat a caption of the same image: remove them")
    owners = Counter(caption for caption, _ in {*zip(table.captions, table.caption_ids.tolist(), strict=True)})
    shared = sum(owners[caption] > 1 for caption in table.captions)
    if shared > 5 * RARE * count:
        harm = "training takes right pairs for wrong ones" if split == "train" else "no ranking finds all"
        warnings.append(
            f"{table.name}: {shared} of {count} captions belong to images of different image_id, so "
            f"{harm}: give one image_id to images that a caption fits equally well"
        )
    if split == "train":
        largest = np.bincount(table.caption_ids).argmax()
        share = float(np.mean(table.caption_ids == largest))
        if share > 0.5:
            first = table.images[int(np.argmax(table.image_ids == largest))]
            warnings.append(
                f"{table.name}: {100 * share:.0f} % of the captions have the image_id of {first}, so batches hold few "
                "negatives: give an image_id only to images that show the same thing"
            )
    return warnings


def overlap(one: Annotations, other: Annotations, prints: dict[str, str], other_prints: dict[str, str]) -> Findings:
    """Files and captions of split `other` that split `one` has too; equal pixels under two names count as one file."""
    found, known = Findings(), set(one.images)
    same = [name for name in other.images if name in known]
    contents = set(prints.values())
    copies = [name for name in other.images if name not in known and other_prints.get(name) in contents]
    for names, how in ((same, "are also in"), (copies, "are, under other names, copies of images of")):
        if names:
            found.warnings.append(
                f"{other.name}: {len(names)} of {len(other.images)} images {how} {one.name} (the first: {names[0]}), "
                "so its Recall is too good: remove them from one of the two"
            )
    ids = set(one.id_names) - {""}
    if both := len({name for name in other.id_names if name in ids}):
        found.facts.append(f"{other.name}: {both} image_ids are also in {one.name}")
    captions = set(one.captions)
    shared = sum(caption in captions for caption in other.captions)
    line = f"{other.name}: {shared} of {len(other.captions)} captions are word for word also in {one.name}"
    if shared > 10 * RARE * len(other.captions):
        found.warnings.append(f"{line}: remove copies, unless short captions meet by chance")
    elif shared:
        found.facts.append(line)
    return found
