"""Pictures by name, out of a folder or a .zip: the same RGB pixels as BLIP's `Image.open(path).convert('RGB')`.

Where that line crashes or gives nonsense (16-bit greyscale, bombs, truncated files): `to_rgb` and `ImageStore.load`.
"""

import errno
import hashlib
import io
import os
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from configs.datasets import DATASETS
from configs.schema import RetrievalConfig
from data.scenes import ARCHIVE
from transform.image import to_rgb
from utils import find_path

MAX_BYTES = 1 << 30  # of one image file: a member of a small .zip can unpack to more than the memory
NOT_THE_FILE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # what says nothing about the file that was to be opened
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # ImageStore.load refuses such pictures


class ImageStore:
    """Images under `image_root`, a folder or a .zip archive; it can be sent to, or inherited by, worker processes."""

    def __init__(self, root: str | os.PathLike) -> None:
        if not os.fspath(root):
            raise ValueError("image_root is empty: set it to the folder, or the .zip, that holds the images")
        self.root = find_path(root)
        self.is_zip = self.root.suffix.lower() == ".zip"
        self._zip: zipfile.ZipFile | None = None
        self._zip_pid = 0
        if not (self.root.is_file() if self.is_zip else self.root.is_dir()):
            kind = "not an archive" if self.is_zip else "neither a folder nor a .zip"
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
        try:
            with Image.open(self._open(name)) as image:
                limit = Image.MAX_IMAGE_PIXELS
                if limit and image.width * image.height > limit:
                    raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, {limit} at most")
                return to_rgb(image)
        except (KeyError, FileNotFoundError):
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
        except MemoryError:
            raise
        except Exception as error:  # a broken file can raise nearly anything in Pillow's decoders
            if isinstance(error, OSError) and error.errno in NOT_THE_FILE:
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"image {name} in {self.root} cannot be read ({reason}): "
                "replace the file, or remove its rows from the annotations"
            ) from error

    def _open(self, name: str) -> io.BytesIO | Path:
        if not self.is_zip:
            return self.root / name
        size = self.archive.getinfo(name).file_size
        if size > MAX_BYTES:
            raise Image.DecompressionBombError(f"it unpacks to {size} bytes, {MAX_BYTES} at most")
        return io.BytesIO(self.archive.read(name))

    def fingerprint(self, name: str) -> str:
        """Equal for files with equal bytes, whatever their names; '' for a file that cannot be opened."""
        try:
            if self.is_zip:
                info = self.archive.getinfo(name)
                return f"{info.CRC:08x}{info.file_size}"
            with open(self.root / name, "rb") as file:
                return hashlib.file_digest(file, "sha1").hexdigest()
        except (OSError, KeyError):
            return ""

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are not there, in their order; each folder is listed only once."""
        names = list(names)
        if self.is_zip:
            return [name for name in names if name not in self.archive.NameToInfo]
        by_folder: dict[str, set[str]] = defaultdict(set)
        for folder in {os.path.dirname(name) for name in names}:
            if (self.root / folder).is_dir():
                by_folder[folder] = set(os.listdir(self.root / folder))
        return [name for name in names if os.path.basename(name) not in by_folder[os.path.dirname(name)]]


def open_store(cfg: RetrievalConfig) -> ImageStore:
    """The images of the config's data set; drawn ones lie beside their annotations, wherever image_root points."""
    return ImageStore(find_path(cfg.ann_root) / ARCHIVE if DATASETS[cfg.dataset].drawn else cfg.image_root)


def missing_message(store: ImageStore, names: Sequence[str], folder: str = "", source: str = "") -> str:
    """How many of the images `names` (of `folder`) are missing and what to do; '' when all are there.

    `source`: where the images of that folder come from.
    """
    missing = store.missing(names)
    if not missing:
        return ""
    remedy = "set image_root so that image_root/path exists"
    if store.is_zip:
        remedy = "make the paths inside the archive equal those in the annotations"
        longer = next((entry for entry in store.archive.NameToInfo if entry.endswith("/" + missing[0])), None)
        if longer:
            remedy += f"; it holds {longer}, so pack it again without the leading {longer.removesuffix(missing[0])}"
    return (
        f"{len(missing):,} of {len(names):,} images{f' of {folder}' if folder else ''} are missing under image_root "
        f"{store.root}, the first is {missing[0]}: {f'{source}, or ' if source else ''}{remedy}"
    )
