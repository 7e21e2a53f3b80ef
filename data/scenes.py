"""The embedded default data set `scenes`: two objects in a spatial relation, drawn from a seed, and their captions.

Who is where decides what a caption means: every gallery consists of families of scenes with the same words, which
differ in places, colours, sizes or direction. Training has families too, with places and colours exchanged; each of its
scenes is drawn several times, so that a family meets in a batch often enough to be mined as hard negatives.
`python -m data.scenes --out DIR [--seed 0]` draws it; `load_annotations` does so on first use. It writes
`images.zip` (PNG, stored: as fast to read as 7,000 files, and kinder to a shared file system), `train.json`,
`val.json`, `test.json` (layout of the Karpathy splits) and `stamp.json` (what was drawn, so that a change redraws).
"""

import argparse
import hashlib
import io
import itertools
import json
import logging
import math
import os
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from PIL import Image, ImageDraw

from utils import Progress

logger = logging.getLogger(__name__)

VERSION = 4  # raise it when the drawing changes: folders drawn by an older version are drawn again
SIDE = 60  # pixels: nine cells of 20; the objects lie on either side of the middle cell
JITTER = 2.0  # pixels by which an object may be off the centre of its cell, in x and in y
OVERSAMPLE = 4  # shapes are drawn this many times larger and averaged down, which smooths their edges
TRAIN_IMAGES, VAL_IMAGES, TEST_IMAGES = 6000, 200, 500
DRAWINGS = 24  # pictures of each training scene; they share its image_id, so none is another's negative
FAMILY = 4  # scenes of a split that use the same words; in training fewer where exchanges give the same scene
ARCHIVE, STAMP = "images.zip", "stamp.json"
FILES = {ARCHIVE, STAMP, "train.json", "val.json", "test.json"}  # what a drawing consists of

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
        first, second = random_thing(rng), random_thing(rng)
        if (first.colour, first.shape) != (second.colour, second.shape):
            return Scene(str(rng.choice(list(AXES))), first, second)


def random_thing(rng: np.random.Generator) -> Thing:
    size, colour, shape = (str(rng.choice(list(words))) for words in (RADII, COLOURS, SHAPES))
    return Thing(size, colour, shape)


def arrangements(
    scene: Scene, axes: Sequence[str] = tuple(AXES), swap_sizes: Sequence[bool] = (False, True)
) -> list[Scene]:
    """The other scenes of the same sizes, colours and shapes: attributes exchanged, places exchanged, other axis."""
    _, a, b = scene
    scenes = []
    for swap_size, swap_colour in itertools.product(swap_sizes, (False, True)):
        a_size, b_size = (b.size, a.size) if swap_size else (a.size, b.size)
        a_colour, b_colour = (b.colour, a.colour) if swap_colour else (a.colour, b.colour)
        new_a, new_b = Thing(a_size, a_colour, a.shape), Thing(b_size, b_colour, b.shape)
        scenes += [Scene(axis, new_a, new_b) for axis in axes]
        scenes += [Scene(axis, new_b, new_a) for axis in axes]
    different = dict.fromkeys(scenes)  # in this order, each once
    return [other for other in different if other != scene]


def exchanges(scene: Scene) -> list[Scene]:
    """The arrangements, at most three, that exchange only places, colours or both."""
    return arrangements(scene, axes=(scene.axis,), swap_sizes=(False,))


def choose_scenes(split: str, count: int, used: set[Scene], rng: np.random.Generator) -> list[Scene]:
    """`count` different scenes, shuffled, none of them in `used`, to which they are added.

    They come in families of the same words: places and colours exchanged in `train`, any arrangement in a gallery.
    """
    chosen: list[Scene] = []
    while len(chosen) < count:
        scene = random_scene(rng)
        others = exchanges(scene) if split == "train" else arrangements(scene)
        shuffled = [others[i] for i in rng.permutation(len(others))]
        size = min(FAMILY, count - len(chosen))  # the last family may be cut short
        family = [scene, *shuffled[: size - 1]]
        if used.isdisjoint(family):
            used.update(family)
            chosen += family
    return [chosen[i] for i in rng.permutation(count)]


def captions_of(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Three sentences: seen from the first object, from the second, and by their places, in either order."""
    axis, a, b = scene
    forth, back = AXES[axis]
    place_a, place_b = PLACES[axis]
    one, other = f"{a} {place_a}", f"{b} {place_b}"
    places = f"{one} and {other}" if rng.random() < 0.5 else f"{other} and {one}"
    return [f"{a} {forth} {b}", f"{b} {back} {a}", f"there is {places}"]


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
        radii = [1.25, 0.52] * 5  # outer and inner corners in turn
        corners = [(r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5)) for k, r in enumerate(radii)]
    else:  # a cross: one arm, then the same turned by 90 degrees three times
        w, r = 0.36, 1.08
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


def ensure_scenes(root: Path, seed: int | None = None) -> Path:
    """Draw the data set into `root` unless it is there already; returns `root`.

    `seed`: None is the one that `root` was drawn from, or 0. Raises ValueError when there is something to draw but
    `root` holds other files, which are never replaced.
    """
    root = Path(root)
    if _stamp_in(root) == _stamp_for(root, seed):
        return root
    with _lock_of(root):
        stamp = _stamp_for(root, seed)
        if _stamp_in(root) == stamp:  # another process drew it while this one waited
            return root
        if other := _something_else(root):
            raise ValueError(
                f"the data set `scenes` would be drawn into {root}, but it holds something else ({other}): "
                "name an empty or a new folder (ann_root in the config, or --out)"
            )
        try:
            root.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as work:
                _write(Path(work, "new"), stamp["seed"])
                if root.exists():
                    root.rename(Path(work, "old"))
                Path(work, "new").rename(root)
        except OSError as error:
            raise ValueError(f"the data set `scenes` cannot be written to {root} (ann_root): {error}") from error
    return root


def _write(folder: Path, seed: int) -> None:
    """Draw the three splits into a new folder."""
    folder.mkdir()
    stamp = stamp_of(seed)
    used: set[Scene] = set()
    total = sum(stamp["images"].values())
    logger.info("drawing the data set `scenes`: %d pictures of %d x %d pixels", total, SIDE, SIDE)
    progress = Progress("drawing", total, "pictures")
    with zipfile.ZipFile(folder / ARCHIVE, "w", zipfile.ZIP_STORED) as archive:
        for number, split in enumerate(("test", "val", "train")):  # test first: it stays when TRAIN_IMAGES changes
            count = stamp["images"][split]
            different = math.ceil(count / DRAWINGS) if split == "train" else count
            scenes = choose_scenes(split, different, used, np.random.default_rng([seed, number]))
            rows = []
            for i in range(count):
                scene_id = i % different  # the scenes in turn, those of training several times
                rng = np.random.default_rng([seed, number, i])
                name, captions = f"{split}/{i:05d}.png", captions_of(scenes[scene_id], rng)
                _add_picture(archive, name, draw_scene(scenes[scene_id], rng))
                if split == "train":
                    rows += [{"image": name, "caption": caption, "image_id": scene_id} for caption in captions]
                else:
                    rows.append({"image": name, "caption": captions})
                progress.add(1)
            lines = ",\n".join(json.dumps(row) for row in rows)
            (folder / f"{split}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    (folder / STAMP).write_text(json.dumps(stamp), encoding="utf-8")


def _add_picture(archive: zipfile.ZipFile, name: str, picture: Image.Image) -> None:
    png = io.BytesIO()
    picture.save(png, "PNG", compress_level=1)
    archive.writestr(zipfile.ZipInfo(name), png.getvalue())  # a ZipInfo of its own, as it carries no time of writing


def _stamp_in(root: Path) -> dict | None:
    """What the folder was drawn from; None if it is not such a folder."""
    try:
        stamp = json.loads((root / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) and isinstance(stamp.get("seed"), int) else None


def _stamp_for(root: Path, seed: int | None) -> dict:
    """The stamp that the folder should have; `seed` as in `ensure_scenes`."""
    return stamp_of((_stamp_in(root) or {"seed": 0})["seed"] if seed is None else seed)


def _something_else(root: Path) -> str:
    """What is there that no drawing has left, for a message; '' if nothing is."""
    if not root.is_dir():
        return "a file" if root.exists() else ""
    names = {path.name for path in root.iterdir()}
    if names and _stamp_in(root) is None:
        return f"there is no {STAMP} of a drawing"
    return ", ".join(sorted(names - FILES)[:3])


def _lock_of(root: Path) -> FileLock:
    """The lock of a folder, against the other ranks and runs of this user on this machine; it ends with its process.

    It lies among the temporary files and stays there: the folder itself may not exist yet, and is replaced as a whole.
    """
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    user = os.getuid() if hasattr(os, "getuid") else 0
    return FileLock(Path(tempfile.gettempdir()) / f"blip-retrieval-{user}-{name}.lock")


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
