"""What can be known to be wrong with annotations and images before the first step.

Errors stop a run, warnings come with a remedy, facts are for the reader. A run looks at a sample when it starts;
`--check` looks at everything and writes nothing.
"""

import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from configs.datasets import DATASETS
from configs.schema import RetrievalConfig
from data.annotations import Annotations
from data.images import ImageStore, missing_message, open_store
from transform.text import MAX_TOKENS, MAX_WORDS, build_tokenizer
from utils import Progress

logger = logging.getLogger(__name__)

QUICK_IMAGES, QUICK_CAPTIONS = 24, 2000  # of each split that the start of a run looks at
NAMED = 10  # images that a message lists
RARE = 0.01  # share of captions below which a finding is a fact, not a warning
SIDES = (64, 128, 256, 384, 512, 1024)  # pixels, edges of the histogram's bins


@dataclass
class Findings:
    """Lines for the user, one paragraph each."""

    facts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, other: "Findings") -> None:
        self.facts += other.facts
        self.warnings += other.warnings
        self.errors += other.errors

    def attempt(self, do: Callable[[], Any]) -> None:
        """Call `do`; if it raises ValueError, the message becomes one of the errors."""
        try:
            do()
        except ValueError as error:
            self.errors.append(str(error))

    def report(self) -> str:
        """Facts and warnings, then the numbers of errors and warnings."""
        lines = [*self.facts, *(f"warning: {warning}" for warning in self.warnings)]
        counts = [f"{len(x)} {name}{'s' * (len(x) > 1)}" for x, name in
                  ((self.errors, "error"), (self.warnings, "warning")) if x]  # fmt: skip
        return "\n".join([*lines, ", ".join(counts) or "all good"])

    def print(self) -> None:
        """The report on stdout, then the errors on stderr, a paragraph each."""
        print(self.report())
        for error in self.errors:
            print(f"error: {error}", file=sys.stderr)

    def raise_or_log(self) -> None:
        """ValueError with the first error, or else log facts and warnings."""
        if self.errors:
            more = f" ({len(self.errors) - 1} more: --check lists all)" if len(self.errors) > 1 else ""
            raise ValueError(self.errors[0] + more)
        for fact in self.facts:
            logger.info("%s", fact)
        for warning in self.warnings:
            logger.warning("warning: %s", warning)


# ---- data -----------------------------------------------------------------------------------------------------------


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


def check_captions(table: Annotations, limit: int) -> Findings:
    """Captions that are cut (at MAX_WORDS, or at MAX_TOKENS) and words outside the English vocabulary."""
    found = Findings()
    captions = _spread(table.captions, limit)
    tokenizer, long, unknown, total = build_tokenizer(), 0, 0, 0
    progress = Progress(f"{table.name}: captions", len(captions), "captions")
    for start in range(0, len(captions), 1000):
        for ids in tokenizer(captions[start : start + 1000], verbose=False)["input_ids"]:
            long += len(ids) > MAX_TOKENS
            unknown += ids.count(tokenizer.unk_token_id)
            total += len(ids) - 2
        progress.add(len(captions[start : start + 1000]))
    sample = "" if len(captions) == len(table.captions) else " looked at"
    for count, of, what, remedy in (
        (table.cut, len(table.captions), f"captions have more than {MAX_WORDS} words and are cut there", "shorten"),
        (long, len(captions), f"captions{sample} have more than {MAX_TOKENS} tokens and are cut there", "shorten"),
    ):
        if count:
            line = f"{table.name}: {count} of {of} {what}"
            rare = count < RARE * of
            (found.facts if rare else found.warnings).append(line if rare else f"{line}: {remedy} them")
    if unknown > 0.05 * total:
        found.warnings.append(
            f"{table.name}: {100 * unknown / total:.0f} % of the word pieces{sample} are unknown to the English "
            "vocabulary, so these captions look alike: translate them"
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


class Look(NamedTuple):
    """One image file."""

    side: int  # the shorter one, in pixels
    error: str
    fingerprint: str


def check_images(
    store: ImageStore, table: Annotations, sources: Mapping[str, str], full: bool, skip: bool
) -> tuple[Findings, dict[str, str]]:
    """Decode some images, or all of them, which gives a histogram of sizes and the fingerprints by name."""
    if errors := missing_images(store, table, sources):
        return Findings(errors=errors), {}
    names = table.images if full else _spread(table.images, QUICK_IMAGES)
    looks = look_at(store, names, f"{table.name}: images decoded")
    found, whole = Findings(), len(names) == len(table.images)
    bad = {name: seen.error for name, seen in looks.items() if seen.error}
    if bad:
        line = unreadable(table.name, bad, len(looks), "images" if whole else "images looked at (--check looks at all)")
        if skip and len(bad) < len(table.images):
            found.warnings.append(f"{line}; on_bad_sample skip leaves them out of training")
        else:
            found.errors.append(line)
    if full:
        found.facts += [
            f"{table.name}: all {len(names)} images are under {store.root}",
            f"{table.name}: images by their shorter side in pixels: {histogram(looks.values())}",
        ]
    return found, {name: seen.fingerprint for name, seen in looks.items() if full and not seen.error}


def missing_images(store: ImageStore, table: Annotations, sources: Mapping[str, str]) -> list[str]:
    """An error for each folder of `sources` that lacks images, and one for all other missing images."""
    by_folder: dict[str, list[str]] = {folder: [] for folder in (*sources, "")}
    for name in table.images:
        folder = os.path.dirname(name)
        by_folder[folder if folder in sources else ""].append(name)
    messages = [missing_message(store, names, folder, sources.get(folder, "")) for folder, names in by_folder.items()]
    return [f"{table.name}: {message}" for message in messages if message]


def look_at(store: ImageStore, names: Sequence[str], what: str) -> dict[str, Look]:
    """Decode images, as many at once as there are cores."""

    def look(name: str) -> Look:
        try:
            return Look(min(store.load(name).size), "", store.fingerprint(name))
        except ValueError as error:
            return Look(0, str(error), "")

    looks, progress = {}, Progress(what, len(names), "images")
    with ThreadPoolExecutor(min(8, cores())) as pool:
        for name, seen in zip(names, pool.map(look, names), strict=True):
            looks[name] = seen
            progress.add(1)
    return looks


def unreadable(name: str, bad: dict[str, str], count: int, of: str = "images") -> str:
    """One line for the images `bad` (name to reason) among `count`."""
    more = [*bad][1:NAMED]
    rest = f"; also {', '.join(more)}{' ...' * (len(bad) > NAMED)}" if more else ""
    return f"{name}: {len(bad)} of {count} {of} are unreadable: {next(iter(bad.values()))}{rest}"


def histogram(looks: Iterable[Look]) -> str:
    """'64-127: 3, 512-1023: 9': readable images by their shorter side."""
    place = np.searchsorted(SIDES, [look.side for look in looks if not look.error], side="right")
    labels = [f"< {SIDES[0]}", *(f"{a}-{b - 1}" for a, b in pairwise(SIDES)), f">= {SIDES[-1]}"]
    counts = np.bincount(place, minlength=len(labels))
    return ", ".join(f"{label}: {n}" for label, n in zip(labels, counts, strict=True) if n) or "none"


def overlap(one: Annotations, other: Annotations, prints: dict[str, str], other_prints: dict[str, str]) -> Findings:
    """Files and captions of split `other` that split `one` has too; equal bytes under two names count as one file."""
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


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _spread(items: Sequence[str], limit: int) -> list[str]:
    """At most `limit` items, evenly spread."""
    if len(items) <= limit:
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]
