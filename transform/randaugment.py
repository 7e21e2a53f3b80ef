"""RandAugment as BLIP trains with it (two of ten operations at magnitude 5), in numpy instead of OpenCV.

Sources: RandAugment (Cubuk et al., 2020); BLIP (Li et al., ICML 2022), `transform/randaugment.py`: levels and rounding.
Exactness: all ten operations equal BLIP's code byte for byte when that runs on OpenCV 5, whose `warpAffine` works in
float32 with fused multiply-adds. OpenCV 4 rounds source positions to 1/32 pixel: after a shear or a rotation one value
in five or six differs from its result, nearly always by 1 and at most by 4 grey levels on a noisy image.
Deliberate difference: BLIP's AutoContrast negates an unsigned byte, which turns a channel without black pixels almost
white; here it stretches the channel, as BLIP's comment says and Pillow does. Channels with black pixels are the same.
Legend: H rows, W columns, C = 3 channels, R rows of a block of them. An image is (H, W, C) uint8, RGB;
an operation returns a new array or its input, which it never changes.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

MAX_LEVEL = 10
MAX_SHEAR = 0.3  # pixels per pixel
MAX_TRANSLATE = 10.0  # pixels, whatever the image size: 10 of 384
MAX_ROTATE = 30.0  # degrees
PROBABILITY = 0.5  # that a chosen operation is applied at all
FILL = 128  # grey outside the image

_PAD = 2  # border pixels: with two, a clipped position still sees nothing but FILL on both sides
_BLOCK = 32  # rows warped at a time: the intermediate arrays then stay in the processor's cache, twice as fast at 384


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32 values, rounded to float32 once, as a processor's fused multiply-add does."""
    # The product of two float32 is exact in float64. Rounding it by itself would move pixels that lie halfway.
    return np.add(np.multiply(a, b, dtype=np.float64), c, dtype=np.float64).astype(np.float32)


def _lerp(start: np.ndarray, stop: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return _fused(weight, stop - start, start)


def _inverse(matrix: np.ndarray) -> np.ndarray:
    """The (2, 3) affine matrix from output to input, float32, computed in float64 as OpenCV does."""
    (a, b, tx), (c, d, ty) = matrix.astype(np.float64)
    inverse = np.array([[d, -b, b * ty - d * tx], [-c, a, c * tx - a * ty]]) / (a * d - b * c)
    return inverse.astype(np.float32)


def warp(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The image under a (2, 3) affine map (input to output, pixels), bilinear, grey outside, as cv2.warpAffine."""
    height, width, channels = image.shape
    planes = np.full((channels, height + 2 * _PAD, width + 2 * _PAD), FILL, dtype=np.float32)
    planes[:, _PAD:-_PAD, _PAD:-_PAD] = image.transpose(2, 0, 1)
    planes = planes.reshape(channels, -1)  # (C, (H + 2 pad) * (W + 2 pad))
    inverse = _inverse(matrix)
    out = np.empty_like(image)
    for start in range(0, height, _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, height), dtype=np.float32)
        _warp_rows(out[start : start + len(rows)], rows, planes, inverse, (height, width))
    return out


def _warp_rows(
    out: np.ndarray, rows: np.ndarray, planes: np.ndarray, inverse: np.ndarray, size: tuple[int, int]
) -> None:
    """Fill `out` (R, W, C), the output rows numbered `rows` (R,), from the padded flat `planes` of a `size` image."""
    height, width = size
    columns = np.arange(width, dtype=np.float32)
    # Only the product with the column is fused: OpenCV computes the row's share once per row, with two roundings.
    # (R, W) each: where in the input an output pixel comes from.
    x, y = (_fused(px, columns, py * rows[:, None] + shift) for px, py, shift in inverse)
    left, top = np.floor(x), np.floor(y)
    weight_x, weight_y = x - left, y - top
    stride = width + 2 * _PAD
    # (R, W) index into a flat plane of the pixel left of and above it.
    corner = (top.clip(-_PAD, height).astype(np.intp) + _PAD) * stride
    corner += left.clip(-_PAD, width).astype(np.intp) + _PAD
    # A shear or a translation falls between columns, or between rows, or on pixels: half of the work or none.
    between_columns, between_rows = weight_x.any(), weight_y.any()

    def sample(plane: np.ndarray, at: np.ndarray) -> np.ndarray:
        value = plane.take(at)
        return _lerp(value, plane.take(at + 1), weight_x) if between_columns else value

    for channel, plane in enumerate(planes):
        value = sample(plane, corner)
        if between_rows:
            value = _lerp(value, sample(plane, corner + stride), weight_y)
        out[..., channel] = np.rint(value)


def shear_x(image: np.ndarray, factor: float) -> np.ndarray:
    """Move each row right by `factor` times its distance from the top."""
    return warp(image, np.array([[1, factor, 0], [0, 1, 0]], dtype=np.float32))


def shear_y(image: np.ndarray, factor: float) -> np.ndarray:
    """Move each column down by `factor` times its distance from the left."""
    return warp(image, np.array([[1, 0, 0], [factor, 1, 0]], dtype=np.float32))


def translate_x(image: np.ndarray, pixels: float) -> np.ndarray:
    """Move the image left by `pixels`."""
    return warp(image, np.array([[1, 0, -pixels], [0, 1, 0]], dtype=np.float32))


def translate_y(image: np.ndarray, pixels: float) -> np.ndarray:
    """Move the image up by `pixels`."""
    return warp(image, np.array([[1, 0, 0], [0, 1, -pixels]], dtype=np.float32))


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """Rotate counter-clockwise about (W / 2, H / 2), which is half a pixel off the centre, as in BLIP."""
    height, width = image.shape[:2]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return warp(image, np.array([[cos, sin, (1 - cos) * x - sin * y], [-sin, cos, sin * x + (1 - cos) * y]]))


def _map_channels(image: np.ndarray, make_table: Callable[[np.ndarray], np.ndarray | None]) -> np.ndarray:
    """Send each channel through the (256,) table that `make_table` makes from it; None leaves it as it is."""
    out = image.copy()
    for channel in range(image.shape[2]):
        plane = np.ascontiguousarray(image[..., channel])
        table = make_table(plane)
        if table is not None:
            out[..., channel] = table.clip(0, 255).astype(np.uint8)[plane]
    return out


def auto_contrast(image: np.ndarray) -> np.ndarray:
    """Stretch each channel to the full range 0 to 255."""

    def table(plane: np.ndarray) -> np.ndarray | None:
        low, high = int(plane.min()), int(plane.max())  # int: the negation below must not wrap around
        if high <= low:
            return None
        scale = 255 / (high - low)
        return np.arange(256) * scale + -low * scale

    return _map_channels(image, table)


def equalize(image: np.ndarray) -> np.ndarray:
    """Flatten the histogram of each channel, with Pillow's rounding."""

    def table(plane: np.ndarray) -> np.ndarray | None:
        histogram = np.bincount(plane.ravel(), minlength=256)
        step = int(histogram[histogram > 0][:-1].sum()) // 255
        if step == 0:
            return None
        below = np.concatenate(([step // 2], histogram[:-1]))  # (256,)
        return below.cumsum() // step

    return _map_channels(image, table)


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiply by `factor`, clipped at 255."""
    if factor == 1:
        return image
    return (np.arange(256, dtype=np.float32) * np.float32(factor)).clip(0, 255).astype(np.uint8)[image]


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the image smoothed by [1 1 1; 1 5 1; 1 1 1] / 13: less of it (factor > 1) or more (factor < 1).

    The outermost pixels stay as they are.
    """
    if factor == 1 or min(image.shape[:2]) < 3:
        return image
    wide = image.astype(np.int32)
    three_rows = wide[:-2] + wide[1:-1] + wide[2:]
    inner = wide[1:-1, 1:-1]
    total = three_rows[:, :-2] + three_rows[:, 1:-1] + three_rows[:, 2:] + 4 * inner
    smooth = ((total + 6) // 13).astype(np.float32)  # nearest integer: thirteenths have no ties
    out = image.copy()
    # BLIP does not clip, so overshoot wraps around; by way of int32 this is defined. Level 5 never comes here.
    blend = smooth + np.float32(factor) * (inner.astype(np.float32) - smooth)
    out[1:-1, 1:-1] = blend.astype(np.int32).astype(np.uint8)
    return out


def _enhancement(level: float) -> float:
    # Level 5 gives exactly 1.0: in BLIP's recipe Brightness and Sharpness change nothing, like Identity.
    return level / MAX_LEVEL * 1.8 + 0.1


OPERATIONS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "Identity": lambda image, level: image,
    "AutoContrast": lambda image, level: auto_contrast(image),
    "Brightness": lambda image, level: brightness(image, _enhancement(level)),
    "Sharpness": lambda image, level: sharpness(image, _enhancement(level)),
    "Equalize": lambda image, level: equalize(image),
    "ShearX": lambda image, level: shear_x(image, level / MAX_LEVEL * MAX_SHEAR),
    "ShearY": lambda image, level: shear_y(image, level / MAX_LEVEL * MAX_SHEAR),
    "TranslateX": lambda image, level: translate_x(image, level / MAX_LEVEL * MAX_TRANSLATE),
    "TranslateY": lambda image, level: translate_y(image, level / MAX_LEVEL * MAX_TRANSLATE),
    "Rotate": lambda image, level: rotate(image, level / MAX_LEVEL * MAX_ROTATE),
}
AUGMENTATIONS = tuple(OPERATIONS)
SIGNED = frozenset({"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"})  # in either direction, with equal chance


class RandomAugment:
    """PIL RGB -> PIL RGB: `n` operations drawn uniformly, with replacement, from `augs`; each is applied half the time.

    `m` is their level, 0 to 10. Draws come from torch's global RNG alone, so that seeding torch repeats an image.
    ValueError for a negative `n`, a level out of range or an unknown operation.
    """

    def __init__(self, n: int = 2, m: float = 5, augs: Sequence[str] = AUGMENTATIONS) -> None:
        unknown = [name for name in augs if name not in OPERATIONS]
        if n < 0 or not 0 <= m <= MAX_LEVEL or unknown or not augs:
            raise ValueError(
                f"RandomAugment needs n >= 0, 0 <= m <= {MAX_LEVEL} and augs from {', '.join(AUGMENTATIONS)}; "
                f"it got n={n}, m={m}, augs={list(augs)}."
            )
        self.n, self.m, self.augs = n, m, tuple(augs)

    def __call__(self, image: Image.Image) -> Image.Image:
        pixels = original = np.asarray(image)
        assert pixels.ndim == 3 and pixels.shape[2] == 3, f"expected RGB, got {image.mode}"
        for choice in torch.randint(len(self.augs), (self.n,)).tolist():
            if torch.rand(()).item() > PROBABILITY:
                continue
            name = self.augs[choice]
            mirrored = name in SIGNED and torch.rand(()).item() > 0.5
            pixels = OPERATIONS[name](pixels, -self.m if mirrored else self.m)
        return image if pixels is original else Image.fromarray(pixels)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(n={self.n}, m={self.m}, augs={list(self.augs)})"
