"""The embedded default data set `scenes`: two objects in a spatial relation, drawn from a seed, and their captions.

Who is where decides what a caption means: every gallery consists of families of the same words in four arrangements
(places, colours, sizes or direction exchanged). Training has families too, places and colours exchanged, each scene
drawn several times, so that a family meets in a batch often enough to be mined as hard negatives.
`python -m data.scenes --out DIR [--seed 0]` draws it; `load_annotations` does so on first use. It writes
`images.zip` (PNG, stored: read as fast as 7,000 files, and kinder to a shared file system), `train.json`, `val.json`,
`test.json` (layout of the Karpathy splits) and `stamp.json` (what was drawn, so that a change redraws).
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import logging
import math
import os
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from utils import file_lock

logger = logging.getLogger(__name__)

VERSION = 4  # raise it when the drawing changes: folders drawn by an older version are drawn again
SIDE = 60  # pixels: nine cells of 20; the objects lie on either side of the middle one
JITTER = 2.0  # pixels that an object may lie off the centre of its cell, in x and in y
OVERSAMPLE = 4  # shapes are drawn this many times larger and averaged down, which smooths their edges
TRAIN_IMAGES, VAL_IMAGES, TEST_IMAGES = 6000, 200, 500
DRAWINGS = 24  # pictures of each training scene; they share its image_id, so none is another's negative
FAMILY = 4  # scenes of a split that use the same words; in training fewer where that many do not differ
ARCHIVE, STAMP = "images.zip", "stamp.json"

COLOURS = {
    "red": (215, 25, 30), "orange": (250, 130, 10), "yellow": (250, 225, 30), "green": (25, 145, 45),
    "blue": (30, 70, 225), "purple": (140, 35, 165), "white": (250, 250, 250), "black": (12, 12, 12),
}  # fmt: skip
RADII = {"small": (4.6, 5.4), "large": (7.6, 8.4)}  # range in pixels
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
REACH = 1.25  # no shape reaches further from its centre than this times its radius
AXES = {"horizontal": ("to the left of", "to the right of"), "vertical": ("above", "below")}
PLACES = {"horizontal": ("on the left", "on the right"), "vertical": ("at the top", "at the bottom")}


class Thing(NamedTuple):
    """One object of a scene."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


class Scene(NamedTuple):
    """Two objects and their relation, in one canonical order: `first` is left of, or above, `second`."""

    axis: str
    first: Thing
    second: Thing


# ---------------------------------------------------------------- which scenes


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene whose two objects differ in colour or shape, so that every sentence about them is unambiguous."""
    while True:
        first, second = (Thing(*(str(rng.choice(list(values))) for values in (RADII, COLOURS, SHAPES))) for _ in "ab")
        if first[1:] != second[1:]:
            return Scene(str(rng.choice(list(AXES))), first, second)


def arrangements(
    scene: Scene, axes: Sequence[str] = tuple(AXES), swap_sizes: Sequence[bool] = (False, True)
) -> list[Scene]:
    """The other scenes of the same sizes, colours and shapes: attributes exchanged, places exchanged, other axis."""
    _, a, b = scene
    things = []
    for swap_size, swap_colour in itertools.product(swap_sizes, (False, True)):
        size, colour = (a.size, b.size)[:: -1 if swap_size else 1], (a.colour, b.colour)[:: -1 if swap_colour else 1]
        things.append(tuple(Thing(*words) for words in zip(size, colour, (a.shape, b.shape), strict=True)))
    scenes = [Scene(axis, *pair[::order]) for pair in things for order in (1, -1) for axis in axes]
    return [other for other in dict.fromkeys(scenes) if other != scene]


def exchanges(scene: Scene) -> list[Scene]:
    """The arrangements, up to three, that exchange only places, colours or both."""
    return arrangements(scene, axes=(scene.axis,), swap_sizes=(False,))


def choose_scenes(split: str, count: int, used: set[Scene], rng: np.random.Generator) -> list[Scene]:
    """`count` different scenes not in `used` (which grows by them).

    They come in families of the same words: places and colours exchanged in `train`, any arrangement in a gallery.
    """
    chosen: list[Scene] = []
    while len(chosen) < count:
        scene = random_scene(rng)
        others = exchanges(scene) if split == "train" else arrangements(scene)
        group = [scene, *(others[i] for i in rng.permutation(len(others))[: min(FAMILY, count - len(chosen)) - 1])]
        if used.isdisjoint(group):
            used.update(group)
            chosen += group
    return [chosen[i] for i in rng.permutation(count)]


def captions_of(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Three sentences: from the first object, mirrored from the second, and by their places, in either order."""
    axis, a, b = scene
    towards, back = AXES[axis]
    here, there = PLACES[axis]
    parts = [f"{a} {here}", f"{b} {there}"]
    third = " and ".join(parts if rng.random() < 0.5 else parts[::-1])
    return [f"{a} {towards} {b}", f"{b} {back} {a}", f"there is {third}"]


# ---------------------------------------------------------------- pictures


def background(rng: np.random.Generator) -> np.ndarray:
    """(SIDE, SIDE, 3) float32: plain, gradient, stripes or smooth noise, in muted mid-tones that no object has."""
    base = rng.uniform(105, 165) + rng.uniform(-12, 12, 3)
    change = rng.uniform(-22, 22) + rng.uniform(-11, 11, 3)
    angle, kind = rng.uniform(0, 2 * math.pi), rng.integers(4)
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE - 0.5
    along = x * math.cos(angle) + y * math.sin(angle)
    if kind == 0:
        wave = np.zeros((SIDE, SIDE))
    elif kind == 1:
        wave = along * 1.4
    elif kind == 2:
        wave = 0.7 * np.sin(along * rng.uniform(18, 45))
    else:
        cells = Image.fromarray(rng.uniform(-1, 1, (int(rng.integers(5, 12)),) * 2).astype(np.float32))
        wave = np.asarray(cells.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return (base + wave[..., None] * change).astype(np.float32)


def polygon(shape: str, tilt: float) -> list[tuple[float, float]]:
    """Corners of a shape of radius 1 around the origin, y downwards, turned by `tilt` radians."""
    if shape == "square":
        corners = [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
    elif shape == "triangle":
        corners = [(0.0, -1.1), (1.1, 0.85), (-1.1, 0.85)]
    elif shape == "star":
        corners = [
            (r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5)) for k, r in enumerate([1.25, 0.52] * 5)
        ]
    else:
        w, r = 0.36, 1.08  # one arm, then the same turned by 90 degrees three times
        corners, arm = [], [(-w, -w), (-w, -r), (w, -r)]
        for _ in range(4):
            corners += arm
            arm = [(-y, x) for x, y in arm]
    cos, sin = math.cos(tilt), math.sin(tilt)
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in corners]


def coverage(shape: str, centre: tuple[float, float], radius: float, tilt: float) -> np.ndarray:
    """(SIDE, SIDE) float32 in [0, 1]: how much of each pixel the shape covers."""
    mask = Image.new("L", (SIDE * OVERSAMPLE,) * 2)
    draw = ImageDraw.Draw(mask)
    x, y, r = (value * OVERSAMPLE for value in (*centre, radius))
    if shape in ("circle", "ring"):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if shape == "ring":
            draw.ellipse((x - 0.52 * r, y - 0.52 * r, x + 0.52 * r, y + 0.52 * r), fill=0)
    else:
        draw.polygon([(x + r * u, y + r * v) for u, v in polygon(shape, tilt)], fill=255)
    return np.asarray(mask.reduce(OVERSAMPLE), np.float32) / 255


def place(scene: Scene, radii: list[float], rng: np.random.Generator) -> list[tuple[float, float]]:
    """Centres (x, y) of the two objects, near the centres of two cells; both stay inside the frame."""
    centres = []
    for cell, radius in zip((1 / 6, 5 / 6), radii, strict=True):
        reach = REACH * radius
        along = cell * SIDE + rng.uniform(-JITTER, JITTER)
        along, across = min(max(along, reach), SIDE - reach), SIDE / 2 + rng.uniform(-JITTER, JITTER)
        centres.append((along, across) if scene.axis == "horizontal" else (across, along))
    return centres


def draw_scene(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The RGB picture of a scene; positions, sizes within their class, shades, tilt and background come from `rng`."""
    picture = background(rng)
    things = (scene.first, scene.second)
    radii = [rng.uniform(*RADII[thing.size]) for thing in things]
    for thing, centre, radius in zip(things, place(scene, radii, rng), radii, strict=True):
        colour = np.asarray(COLOURS[thing.colour]) + rng.uniform(-10, 10, 3)
        share = coverage(thing.shape, centre, radius, rng.uniform(-0.12, 0.12))[..., None]
        picture += share * (colour.astype(np.float32) - picture)
    return Image.fromarray(np.clip(picture + 0.5, 0, 255).astype(np.uint8))


# ---------------------------------------------------------------- files


def stamp_of(seed: int) -> dict:
    """Everything that decides what is drawn, as it reads back from JSON."""
    counts = {"train": TRAIN_IMAGES, "val": VAL_IMAGES, "test": TEST_IMAGES}
    kind = {"version": VERSION, "drawings": DRAWINGS, "family": FAMILY}
    return {**kind, "seed": seed, "side": SIDE, "images": counts}


def ensure_scenes(root: Path, seed: int = 0) -> Path:
    """Draw the data set into `root` unless it is there already; returns `root`.

    Raises ValueError when `root` holds other files, which are never replaced.
    """
    root = Path(root)
    if _stamp_in(root) == stamp_of(seed):
        return root
    with one_process_at_a_time(root):
        if _stamp_in(root) == stamp_of(seed):  # another process drew it while this one waited
            return root
        if root.is_file() or (root.is_dir() and _stamp_in(root) is None and any(root.iterdir())):
            raise ValueError(
                f"{root} is to hold the drawn data set `scenes`, but it holds something else (there is no {STAMP}): "
                "name an empty or a new folder (ann_root in the config, or --out)"
            )
        try:
            root.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as work:
                _write(Path(work, "new"), seed)
                if root.exists():
                    root.rename(Path(work, "old"))
                Path(work, "new").rename(root)
        except OSError as error:
            raise ValueError(f"the data set `scenes` cannot be written to {root} (ann_root): {error}") from error
    return root


def _write(folder: Path, seed: int) -> None:
    """Draw the three splits into a new folder."""
    folder.mkdir()
    stamp, used, started, done = stamp_of(seed), set(), time.time(), 0
    total = sum(stamp["images"].values())
    logger.info("drawing the data set `scenes`: %d pictures of %d x %d pixels", total, SIDE, SIDE)
    with zipfile.ZipFile(folder / ARCHIVE, "w", zipfile.ZIP_STORED) as archive:
        for number, split in enumerate(("test", "val", "train")):  # test first: it stays when TRAIN_IMAGES changes
            rng, rows = np.random.default_rng([seed, number]), []
            images = stamp["images"][split]
            scenes = choose_scenes(split, -(-images // DRAWINGS) if split == "train" else images, used, rng)
            for i in range(images):
                scene_id = i % len(scenes)  # i itself but for training, whose scenes are drawn several times
                scene = scenes[scene_id]
                rng = np.random.default_rng([seed, number, i])
                name, captions, png = f"{split}/{i:05d}.png", captions_of(scene, rng), io.BytesIO()
                draw_scene(scene, rng).save(png, "PNG", compress_level=1)
                archive.writestr(zipfile.ZipInfo(name), png.getvalue())
                if split == "train":
                    rows += [{"image": name, "caption": caption, "image_id": scene_id} for caption in captions]
                else:
                    rows.append({"image": name, "caption": captions})
                done += 1
                if done % 1000 == 0:
                    logger.info("  %d of %d pictures, %.0f s", done, total, time.time() - started)
            lines = ",\n".join(json.dumps(row) for row in rows)
            (folder / f"{split}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    (folder / STAMP).write_text(json.dumps(stamp), encoding="utf-8")


def _stamp_in(root: Path) -> dict | None:
    """What the folder was drawn from; None when it is no such folder."""
    try:
        return json.loads((root / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def one_process_at_a_time(path: Path) -> Iterator[None]:
    """Hold the lock that goes with a path, against the other ranks and runs of this user on this machine.

    The lock file lies in the system's folder for temporary files and stays there (removing it would let a third process
    lock a new one while a second still waits on the old); the lock itself ends with the process, so none is left over.
    """
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    user = os.getuid() if hasattr(os, "getuid") else 0
    with file_lock(Path(tempfile.gettempdir()) / f"blip-retrieval-{user}-{name}.lock"):
        yield


def main(argv: list[str] | None = None) -> None:
    """Draw the data set from the command line."""
    parser = argparse.ArgumentParser(prog="python -m data.scenes", description="draw the data set `scenes`")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; an earlier drawing in it is replaced")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        ensure_scenes(args.out, args.seed)
    except ValueError as error:
        parser.error(str(error))
    size = sum(file.stat().st_size for file in args.out.iterdir())
    logger.info("%s holds %.1f MB", os.fspath(args.out), size / 1e6)


if __name__ == "__main__":
    main()
