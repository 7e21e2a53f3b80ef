"""Pictures by name, out of a folder, a .zip or shards: the same RGB pixels as BLIP's `Image.open(path).convert('RGB')`.

Where that line crashes or gives nonsense (16-bit greyscale, floats, bombs, truncated files): `transform.rgb.to_rgb`
and `ImageStore.load`.
"""

import errno
import io
import os
import unicodedata
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

from PIL import Image, UnidentifiedImageError

from configs.datasets import DATASETS
from configs.schema import RetrievalConfig
from data.cache import open_cache
from data.scenes import ARCHIVE
from data.shards import Shards, is_shards, open_shards
from data.tars import ShardError
from transform.rgb import AS_BLIP, PixelRule, to_rgb
from utils import find_path

ORIENTATION = 0x0112  # in EXIF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
MAX_BYTES = 1 << 30  # of one image file: a member of a small .zip can unpack to more than the memory
NOT_THE_FILE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # what says nothing about the file that was to be opened
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # ImageStore.load refuses such pictures


class ImageStore:
    """Images under `image_root`: a folder, a .zip or a set of shards; worker processes may inherit it or be sent it."""

    def __init__(
        self, root: str | os.PathLike, rule: PixelRule = AS_BLIP, upright: bool = False, shards: Shards | None = None
    ) -> None:
        """`upright`: apply the orientation in EXIF, which evaluation does not, as BLIP does not.

        `shards`: those of `root` where they are fetched.
        """
        if not os.fspath(root):
            raise ValueError("image_root is empty: set it to the folder, the .zip or the .tar that holds the images")
        self.root, self.rule, self.upright = find_path(root), rule, upright
        self.is_zip = self.root.suffix.lower() == ".zip"
        self._zip: zipfile.ZipFile | None = None
        self._zip_pid = 0
        self.shards = shards or (open_shards(self.root) if is_shards(self.root) else None)
        if self.shards:
            return
        if not (self.root.is_file() if self.is_zip else self.root.is_dir()):
            kind = "not an archive" if self.is_zip else "neither a folder nor a .zip nor a .tar"
            raise ValueError(
                f"image_root {self.root} is {kind}: set image_root in the config to where the images are "
                "(a relative path is looked up from the working directory, then from the repository)"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zip": None}

    @property
    def archive(self) -> zipfile.ZipFile:
        """The archive, opened once per process: a forked worker must not share the file position of its parent."""
        if self._zip is None or self._zip_pid != os.getpid():
            try:
                self._zip, self._zip_pid = zipfile.ZipFile(self.root), os.getpid()
            except (zipfile.BadZipFile, OSError) as error:
                raise ValueError(f"image_root {self.root} cannot be read as a .zip archive: {error}") from error
        return self._zip

    def load(self, name: str) -> Image.Image:
        """The RGB picture called `name`; ValueError names the file when it is absent, broken or absurdly large."""
        return self.examine(name)[0]

    def examine(self, name: str) -> tuple[Image.Image, str]:
        """The RGB picture, and what its file may hold that the picture has lost: 'alpha', 'depth' or ''."""
        try:
            with Image.open(self._open(name)) as image:
                limit = Image.MAX_IMAGE_PIXELS
                if limit and image.width * image.height > limit:
                    raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, {limit} at most")
                lost = "depth" if image.mode.startswith("I") else "alpha" if image.has_transparency_data else ""
                rgb = self.as_rgb(image)
                return rgb, "" if lost == "alpha" and self.rule.flatten_alpha else lost
        except FileNotFoundError:
            raise ValueError(f"image {name} is missing from image_root {self.root}") from None
        except UnidentifiedImageError:
            raise ValueError(
                f"image {name} in {self.root} cannot be read (not an image, or of an unknown format): replace the "
                "file, or remove its rows from the annotations"
            ) from None
        except Image.DecompressionBombError as error:
            raise ValueError(
                f"image {name} in {self.root} is too large to be decoded safely ({error}): scale it down"
            ) from None
        except (MemoryError, ShardError):
            raise
        except Exception as error:  # a broken file can raise nearly anything in Pillow's decoders
            if isinstance(error, OSError) and error.errno in NOT_THE_FILE:
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"image {name} in {self.root} cannot be read ({reason}): "
                "replace the file, or remove its rows from the annotations"
            ) from error

    def as_rgb(self, image: Image.Image) -> Image.Image:
        """The picture of an open file, not decoded yet, in RGB as those of this store: by its rule, perhaps upright."""
        rgb = to_rgb(image, self.rule)
        turn = TURNS.get(orientation(image)) if self.upright else None
        return rgb if turn is None else rgb.transpose(turn)

    def open_file(self, name: str) -> IO[bytes]:
        """The file called `name`, as it is; KeyError, OSError or ShardError when it cannot be opened."""
        if self.shards:
            return io.BytesIO(self.shards.read(name))
        name = self._spelt(name)
        return self.archive.open(name) if self.is_zip else open(self.root / name, "rb")

    def _open(self, name: str) -> io.BytesIO | Path:
        """What Pillow opens; FileNotFoundError, and no KeyError, which Pillow itself raises for odd files."""
        if not self.shards:
            name = self._spelt(name)
        if not self.shards and not self.is_zip:
            return self.root / name
        try:
            size = self.shards.size(name) if self.shards else self.archive.getinfo(name).file_size
        except KeyError:
            raise FileNotFoundError(name) from None
        if size > MAX_BYTES:
            raise Image.DecompressionBombError(f"it unpacks to {size} bytes, {MAX_BYTES} at most")
        return io.BytesIO(self.shards.read(name) if self.shards else self.archive.read(name))

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are not there, in their order; each folder is listed only once."""
        names = list(names)
        if self.shards:
            return [name for name in names if name not in self.shards]
        if self.is_zip:
            return [name for name in names if self._spelt(name) not in self.archive.NameToInfo]
        by_folder: dict[str, set[str]] = defaultdict(set)
        for folder in {os.path.dirname(name) for name in names}:
            if (self.root / folder).is_dir():
                by_folder[folder] = set(os.listdir(self.root / folder))
        return [
            name for name in names
            if os.path.basename(name) not in by_folder[os.path.dirname(name)]
            and (name.isascii() or not (self.root / self._spelt(name)).exists())
        ]  # fmt: skip

    def _spelt(self, name: str) -> str:
        """The name as the disk or archive spells it: accents may be letters of their own there, as on a Mac."""
        if name.isascii():
            return name
        other = unicodedata.normalize("NFD", name)
        if self.is_zip:
            return other if name not in self.archive.NameToInfo and other in self.archive.NameToInfo else name
        return other if not (self.root / name).exists() and (self.root / other).exists() else name

    def entries(self, most: int = 200_000) -> Iterator[str]:
        """Paths of files that are there, relative to the root; at most `most`."""
        if self.shards:
            yield from (name for name, _, _ in islice(self.shards.listing(), most))
            return
        if self.is_zip:
            yield from islice((name for name in self.archive.NameToInfo if not name.endswith("/")), most)
            return
        paths = (os.path.join(folder, file) for folder, _, files in os.walk(self.root) for file in files)
        yield from (os.path.relpath(path, self.root).replace(os.sep, "/") for path in islice(paths, most))


def orientation(image: Image.Image) -> int:
    """Which way is up by the EXIF of a picture that is decoded, 1 to 8; 1, as it is, where the EXIF is malformed."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # Pillow raises nearly anything here, and the pixels are good
        return 1


def open_store(cfg: RetrievalConfig) -> ImageStore:
    """The images of the config's data set; drawn ones lie beside their annotations, wherever image_root points."""
    root = find_path(cfg.ann_root) / ARCHIVE if DATASETS[cfg.dataset].drawn else cfg.image_root
    shards = open_cache(cfg).shards if cfg.fetch else None
    return ImageStore(root, PixelRule(cfg.grey_bits, cfg.flatten_alpha), shards=shards)


def missing_message(store: ImageStore, names: Sequence[str], folder: str = "", source: str = "") -> str:
    """How many of the images `names` (of `folder`) are missing and what to do; '' when all are there.

    `source`: where the images of that folder come from.
    """
    missing = store.missing(names)
    if not missing:
        return ""
    remedy = explain_missing(store, missing)
    if not remedy:
        same = "make the paths inside the archive equal those in the annotations"
        remedy = same if store.is_zip or store.shards else "set image_root so that image_root/path exists"
        if len(missing) < len(names) and not source:
            remedy = "add them, or remove their rows from the annotations"
        remedy = f"{source}, or {remedy}" if source else remedy
    return (
        f"{len(missing):,} of {len(names):,} images{f' of {folder}' if folder else ''} are missing under image_root "
        f"{store.root}, the first is {missing[0]}: {remedy}"
    )


def explain_missing(store: ImageStore, missing: Sequence[str]) -> str:
    """What is there instead of the images `missing`, and the remedy that mends most of them, or ''."""
    index: dict[str, dict[str, str]] = {kind: {} for kind in LIKENESS}
    for entry in store.entries():
        for kind, same in LIKENESS.items():
            index[kind].setdefault(same(entry), entry)
    found: dict[str, list[tuple[str, str]]] = {}  # remedy: pairs of what is asked for and what is there
    for name in missing:
        for kind, same in LIKENESS.items():
            there = index[kind].get(same(name))
            if there:
                found.setdefault(_remedy(store, kind, name, there), []).append((name, there))
                break
    if not found:
        return ""
    remedy, pairs = max(found.items(), key=lambda item: len(item[1]))
    name, entry = pairs[0]
    of = "" if len(pairs) == len(missing) else f" (as for {len(pairs):,} of them)"
    return f"there is {entry!r} for {name!r}{of}: {remedy}"


def _code_page(name: str) -> str:
    """A name that zipfile took for code page 437, as the UTF-8 that it was."""
    try:
        return unicodedata.normalize("NFC", name.encode("cp437").decode("utf-8"))
    except ValueError:
        return name


# How a file that is there may be the one that is asked for, the likeliest first.
LIKENESS: dict[str, Callable[[str], str]] = {
    "form": lambda name: unicodedata.normalize("NFC", name),
    "backslash": lambda name: name.replace("\\", "/"),
    "code page": lambda name: name if name.isascii() else _code_page(name),
    "case": str.casefold,
    "extension": lambda name: os.path.splitext(name)[0],
    "both": lambda name: os.path.splitext(name)[0].casefold(),
    "folder": os.path.basename,
}


def _remedy(store: ImageStore, kind: str, name: str, entry: str) -> str:
    if kind == "folder" and entry.endswith(f"/{name}"):
        prefix = entry.removesuffix(name)
        if store.is_zip or store.shards:
            return f"pack the archive again without the leading {prefix}"
        return f"set image_root to {store.root / prefix}"
    if kind == "folder" and name.endswith(f"/{entry}"):
        prefix = name.removesuffix(entry)
        if not (store.is_zip or store.shards) and f"{store.root.resolve()}/".endswith(f"/{prefix}"):
            return f"set image_root to {store.root.resolve().parents[prefix.count('/') - 1]}"
        return f"remove the leading {prefix} from the paths in the annotations"
    return {
        "form": "its accents are spelt otherwise; rename the file, or correct the annotations",
        "backslash": "its name has backslashes where folders were meant; unpack it again with another program",
        "code page": "the archive's names are of another code page; pack it again with UTF-8 names",
        "case": "they differ in upper and lower case; correct the annotations, or rename the files",
        "extension": "they differ in the extension; correct the annotations, or rename the files",
        "both": "they differ in case and extension; correct the annotations, or rename the files",
        "folder": "it lies in another folder; correct the paths in the annotations",
    }[kind]
