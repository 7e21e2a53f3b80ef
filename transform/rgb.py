"""Pictures of any mode to RGB, with Pillow and numpy alone: exports take this file along (`checkpoints/graphs.py`)."""

from typing import IO, NamedTuple

import numpy as np
from PIL import Image

BITS_PER_SAMPLE, MAX_SAMPLE_VALUE = 258, 281  # tags of TIFF


class PixelRule(NamedTuple):
    """How pictures that are not plain 8-bit colours become RGB; the config's keys of the same names."""

    grey_bits: int = 0  # of content in 16-bit greyscale that does not state it; 0 = all that the format has
    flatten_alpha: str = ""  # 'white': lay pictures on white; '': drop alpha, as BLIP does


AS_BLIP = PixelRule()


def to_rgb(image: Image.Image, rule: PixelRule = AS_BLIP) -> Image.Image:
    """First frame as RGB; as in BLIP, alpha is dropped (unless `rule` flattens it), and EXIF orientation not applied.

    Greyscale of more than 8 bits keeps its 8 highest bits of content. How many there are is the same for all pictures
    of a kind: what the file states, else `rule.grey_bits`, else all of its format. (Pillow would clip at 255, which
    leaves a white picture.) ValueError for floating-point pixels, whose range nothing states.
    """
    if image.mode.startswith("F"):
        raise ValueError("floating-point pixels, whose range is not known: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        bits = stated_bits(image) or rule.grey_bits or container_bits(image)
        grey = np.asarray(image).astype(np.int64).clip(min=0)
        grey = grey >> (bits - 8) if bits >= 8 else grey << (8 - bits)
        return Image.fromarray(grey.clip(max=255).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # same colours in the end, without Pillow's warning for each picture
    if rule.flatten_alpha and image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, rule.flatten_alpha), image).convert("RGB")
    return image.convert("RGB")


def stated_bits(image: Image.Image) -> int:
    """Bits of content that the file states: PNG's sBIT, TIFF's MaxSampleValue; 0 where it does not."""
    file = getattr(image, "fp", None)
    if image.format == "PNG" and file:
        place = file.tell()
        try:
            return _png_significant_bits(file)
        finally:
            file.seek(place)
    highest = getattr(image, "tag_v2", {}).get(MAX_SAMPLE_VALUE, 0)
    return int(max(highest) if isinstance(highest, tuple) else highest).bit_length()


def container_bits(image: Image.Image) -> int:
    """Bits of a sample of its format: what a TIFF says, else 16, as in PNG and PGM."""
    bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, 16)
    return int(bits[0] if isinstance(bits, tuple) else bits)


def _png_significant_bits(file: IO[bytes]) -> int:
    file.seek(8)
    while len(head := file.read(8)) == 8 and head[4:] not in (b"IDAT", b"IEND"):
        length = int.from_bytes(head[:4], "big")
        if head[4:] == b"sBIT":
            return max(file.read(length), default=0)
        file.seek(length + 4, 1)
    return 0
