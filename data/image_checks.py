"""Whether the images are there, can be decoded, and show something."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from data.annotations import Annotations
from data.findings import RARE, Findings, cores, spread
from data.images import ImageStore, missing_message
from utils import Progress

QUICK_IMAGES = 24  # of each split that the start of a run looks at
NAMED = 10  # images that a message lists
CLIPPED = 0.2  # share of white pixels in a picture of more than 8 bits
FLAT, FEW_GREYS = 2, 16  # spread of a picture of one colour; grey levels that a photograph has more of
SIDES = (64, 128, 256, 384, 512, 1024)  # pixels, edges of the histogram's bins


class Look(NamedTuple):
    """One image file."""

    side: int  # the shorter one, in pixels
    error: str = ""
    pixels: str = ""  # equal for pictures of equal pixels
    spread: int = 255  # between the lowest and the highest value of a colour channel, the widest of the three
    greys: int = 256  # different values as greyscale
    white: float = 0.0  # share of the pixels that have the highest value
    lost: str = ""  # what the file may hold that these pixels have lost: 'alpha', 'depth' or ''


def check_images(
    store: ImageStore, table: Annotations, sources: Mapping[str, str], full: bool, skip: bool
) -> tuple[Findings, dict[str, str]]:
    """Decode some images, or all of them, which gives a histogram of sizes and digests of the pixels by name."""
    if errors := missing_images(store, table, sources):
        return Findings(errors=errors), {}
    names = table.images if full else spread(at_hand(store, table), QUICK_IMAGES)
    looks = look_at(store, names, f"{table.name}: images decoded")
    found, whole = Findings(), len(names) == len(table.images)
    bad = {name: seen.error for name, seen in looks.items() if seen.error}
    if bad:
        line = unreadable(table.name, bad, len(looks), "images" if whole else "images looked at (--check looks at all)")
        if skip and len(bad) < len(table.images):
            found.warnings.append(f"{line}; on_bad_sample skip leaves them out of training")
        else:
            found.errors.append(line)
    found.add(strange_pixels(table, {name: seen for name, seen in looks.items() if not seen.error}, whole))
    if full:
        found.facts += [
            f"{table.name}: all {len(names)} images are under {store.root}",
            f"{table.name}: images by their shorter side in pixels: {histogram(looks.values())}",
        ]
    return found, {name: seen.pixels for name, seen in looks.items() if full and not seen.error}


def at_hand(store: ImageStore, table: Annotations) -> Sequence[str]:
    """The images; of shards that are fetched, those of one shard, as looking at more would fetch them all."""
    if not (store.shards and store.shards.fetch):
        return table.images
    first = store.shards.shard_of(table.images[0])
    return [name for name in table.images if store.shards.shard_of(name) == first]


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
            image, lost = store.examine(name)
        except ValueError as error:
            return Look(0, str(error))
        histogram = image.convert("L").histogram()
        greys, white = sum(map(bool, histogram)), histogram[255] / max(1, sum(histogram))
        pixels = hashlib.sha1(f"{image.size}".encode() + image.tobytes()).hexdigest()
        spread = int(np.ptp(np.asarray(image), axis=(0, 1)).max())
        return Look(min(image.size), "", pixels, spread, greys, white, lost)

    looks, progress = {}, Progress(what, len(names), "images")
    with ThreadPoolExecutor(min(8, cores())) as pool:
        for name, seen in zip(names, pool.map(look, names), strict=True):
            looks[name] = seen
            progress.add(1)
    return looks


def strange_pixels(table: Annotations, looks: Mapping[str, Look], whole: bool) -> Findings:
    """Pictures of (nearly) one colour, of few grey levels, and different files with equal pixels."""
    found, of = Findings(), f"{len(looks)} images{'' if whole else ' looked at'}"
    flat = [name for name, seen in looks.items() if seen.spread <= FLAT]
    few = [name for name, seen in looks.items() if seen.spread > FLAT and seen.greys <= FEW_GREYS]
    for names, what in ((flat, "are of one colour, or nearly"), (few, f"have at most {FEW_GREYS} grey levels")):
        hidden = Counter(looks[name].lost for name in names)
        line = f"{table.name}: {len(names)} of {of} {what} ({_named(names)})"
        if hidden["alpha"]:
            line += f"; {hidden['alpha']} have an alpha channel, which BLIP drops: set flatten_alpha to white"
        if hidden["depth"]:
            line += f"; {hidden['depth']} have more than 8 bits: set grey_bits to those that their content has"
        if names and (hidden["alpha"] or hidden["depth"]):
            found.warnings.append(line)
        elif names is flat and len(flat) > RARE * len(looks):
            found.warnings.append(f"{line}: look at them")
        elif names:
            found.facts.append(line)
    clipped = [name for name, seen in looks.items() if seen.lost == "depth" and seen.white > CLIPPED]
    if clipped:
        found.warnings.append(
            f"{table.name}: {len(clipped)} of {of} have more than 8 bits, and over {100 * CLIPPED:.0f} % of "
            f"their pixels are white ({_named(clipped)}): is grey_bits too low?"
        )
    by_pixels: dict[str, list[str]] = {}
    for name, seen in looks.items():
        by_pixels.setdefault(seen.pixels, []).append(name)
    equal = [name for names in by_pixels.values() if len(names) > 1 for name in names]
    if equal:
        id_of = dict(zip(table.images, table.image_ids.tolist(), strict=True))
        apart = sum(len({id_of[name] for name in names}) > 1 for names in by_pixels.values() if len(names) > 1)
        line = f"{table.name}: {len(equal)} of {of} have the pixels of another one ({_named(equal)})"
        if apart and len(equal) > RARE * len(looks):
            found.warnings.append(f"{line}, with another image_id: remove copies, or give them one image_id")
        else:
            found.facts.append(line)
    return found


def _named(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + " ..." * (len(names) > most)


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
