"""Image transforms: RandAugment against recorded outputs of BLIP's code, randomness from torch alone, shapes."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from transform import randaugment
from transform.image import MEAN, STD, eval_transform, train_transform
from transform.randaugment import AUGMENTATIONS, OPERATIONS, SIGNED, RandomAugment

GOLDEN = np.load(Path(__file__).parent / "assets" / "randaugment.npz")
RECORDED = [key for key in GOLDEN.files if key != "input"]


def photo(height: int = 60, width: int = 80, seed: int = 0, low: int = 0, high: int = 256) -> Image.Image:
    """Smooth random colours, RGB; pixel values from `low` to below `high`, about."""
    coarse = np.random.default_rng(seed).integers(low, high, (height // 10, width // 10, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def test_every_operation_was_recorded():
    assert {key.split("/")[0] for key in RECORDED} == set(AUGMENTATIONS)
    assert len(RECORDED) == 10 * 3 * 2


@pytest.mark.parametrize("key", RECORDED)
def test_equals_blip_exactly(key):
    name, level, sign = key.split("/")
    # The recording fixes the random draw behind the sign, and BLIP compares it the other way round for Rotate.
    negative = name in SIGNED and (sign == "-") != (name == "Rotate")
    image = GOLDEN["input"]
    output = OPERATIONS[name](image, -int(level) if negative else int(level))
    assert output.dtype == np.uint8
    np.testing.assert_array_equal(output, GOLDEN[key])


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_operations_leave_their_input_alone(name):
    image = np.array(photo())
    before = image.copy()
    image.flags.writeable = False  # as the arrays of PIL images are
    output = OPERATIONS[name](image, 9)
    assert output.shape == before.shape and output.dtype == np.uint8
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("name", ["Identity", "Brightness", "Sharpness"])
def test_level_five_does_nothing(name):
    image = np.asarray(photo())
    assert OPERATIONS[name](image, 5) is image


@pytest.mark.parametrize("low, high", [(0, 256), (30, 200), (77, 78)])
def test_auto_contrast_and_equalize_are_pillows(low, high):
    image = photo(low=low, high=high)
    pixels = np.asarray(image)
    np.testing.assert_array_equal(randaugment.auto_contrast(pixels), np.asarray(ImageOps.autocontrast(image)))
    np.testing.assert_array_equal(randaugment.equalize(pixels), np.asarray(ImageOps.equalize(image)))


@pytest.mark.parametrize("size", [(47, 61), (64, 64), (1, 1), (3, 70)])
def test_whole_pixel_translation_moves_pixels(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    expected = np.full_like(image, 128)
    expected[:, : max(size[1] - 5, 0)] = image[:, 5:]
    np.testing.assert_array_equal(randaugment.translate_x(image, 5), expected)
    expected = np.full_like(image, 128)
    expected[5:] = image[: max(size[0] - 5, 0)]
    np.testing.assert_array_equal(randaugment.translate_y(image, -5), expected)
    np.testing.assert_array_equal(randaugment.rotate(image, 0), image)


def test_everything_outside_is_grey():
    image = np.zeros((20, 20, 3), dtype=np.uint8)
    assert (randaugment.translate_x(image, 1000) == 128).all()
    assert (randaugment.translate_y(image, -1e9) == 128).all()


@pytest.mark.parametrize("make", [lambda: train_transform(32), lambda: RandomAugment(2, 9)])
def test_seeding_torch_repeats_and_varies(make):
    transform, image = make(), photo()

    def draw(seed: int) -> bytes:
        torch.manual_seed(seed)
        return b"".join(np.asarray(transform(image)).tobytes() for _ in range(4))

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_only_torchs_generator_moves():
    transform, image = train_transform(32), photo()
    np.random.seed(0)
    random.seed(0)
    states = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
    for _ in range(10):
        transform(image)
    assert (np.random.get_state()[1] == states[0]).all() and random.getstate() == states[1]
    assert not torch.equal(torch.get_rng_state(), states[2])


def test_half_of_the_operations_are_applied_and_half_of_those_mirrored():
    image = photo()
    pixels = np.asarray(image)
    plain, mirrored = (OPERATIONS["TranslateX"](pixels, level).tobytes() for level in (5, -5))
    augment = RandomAugment(n=1, m=5, augs=["TranslateX"])
    torch.manual_seed(0)
    results = [np.asarray(augment(image)).tobytes() for _ in range(400)]
    assert abs(results.count(pixels.tobytes()) - 200) < 40
    assert abs(results.count(plain) - 100) < 40 and abs(results.count(mirrored) - 100) < 40
    assert results.count(pixels.tobytes()) + results.count(plain) + results.count(mirrored) == 400


def test_operations_are_chosen_uniformly(monkeypatch):
    chosen = []
    for name in AUGMENTATIONS:
        monkeypatch.setitem(OPERATIONS, name, lambda image, level, name=name: chosen.append(name) or image)
    augment, image = RandomAugment(), photo()
    torch.manual_seed(0)
    for _ in range(1000):
        augment(image)
    assert abs(len(chosen) - 1000) < 100
    assert all(abs(chosen.count(name) - 100) < 45 for name in AUGMENTATIONS)


def test_random_augment_keeps_size_and_mode():
    torch.manual_seed(0)
    for _ in range(20):
        output = RandomAugment(n=3, m=9)(photo(40, 70))
        assert output.size == (70, 40) and output.mode == "RGB"
    image = photo()
    assert RandomAugment(n=0)(image) is image


@pytest.mark.parametrize("wrong", [{"n": -1}, {"m": 11}, {"m": -1}, {"augs": ["Rotat"]}, {"augs": []}])
def test_random_augment_rejects(wrong):
    with pytest.raises(ValueError, match="RandomAugment needs"):
        RandomAugment(**wrong)


@pytest.mark.parametrize("make", [train_transform, eval_transform])
@pytest.mark.parametrize("size", [(50, 90), (300, 20), (10, 10)])
def test_shape_and_type(make, size):
    torch.manual_seed(0)
    output = make(48)(photo(*size))
    assert output.shape == (3, 48, 48) and output.dtype == torch.float32 and output.is_contiguous()
    assert torch.isfinite(output).all()


def test_eval_transform_is_bicubic_squash_and_normalisation():
    image = photo(50, 90)
    resized = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32) / 255  # (S, S, 3)
    expected = (resized - np.float32(MEAN)) / np.float32(STD)
    torch.testing.assert_close(eval_transform(32)(image), torch.from_numpy(expected.transpose(2, 0, 1)))


def test_train_transform_is_blips():
    names = [type(step).__name__ for step in train_transform(32).transforms]
    assert names == ["RandomResizedCrop", "RandomHorizontalFlip", "RandomAugment", "ToTensor", "Normalize"]
    crop, flip, augment = train_transform(32).transforms[:3]
    assert (crop.size, crop.scale, crop.interpolation.value, flip.p) == ((32, 32), (0.5, 1.0), "bicubic", 0.5)
    assert (augment.n, augment.m, augment.augs) == (2, 5, AUGMENTATIONS)
