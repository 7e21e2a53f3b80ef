"""Pixels equal BLIP's `Image.open(path).convert('RGB')`; odd pictures decode sensibly; broken ones are named."""

import io
import os
import pickle
import re
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from data.images import ImageStore, missing_message
from transform.rgb import AS_BLIP, PixelRule
from utils import REPOSITORY, find_path


def noise(seed: int = 0, shape: tuple[int, ...] = (9, 7, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    picture = Image.fromarray(noise())
    picture.save(root / "a.png")
    picture.save(root / "sub" / "b.jpg")
    picture.convert("L").save(root / "grey.png")
    picture.convert("CMYK").save(root / "cmyk.jpg")
    Image.fromarray(noise(1, (9, 7, 4)), "RGBA").save(root / "alpha.png")
    picture.save(root / "one.webp", lossless=True)
    return root


@pytest.fixture
def archive(folder, tmp_path):
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for image in folder.rglob("*.*"):
            file.write(image, image.relative_to(folder).as_posix())
    return path


NAMES = ["a.png", "sub/b.jpg", "grey.png", "cmyk.jpg", "alpha.png", "one.webp"]


@pytest.mark.parametrize("name", NAMES)
def test_pixels_are_blips_from_folder_and_zip(folder, archive, name):
    expected = np.asarray(Image.open(folder / name).convert("RGB"))
    for root in (folder, archive, str(archive)):
        image = ImageStore(root).load(name)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), expected)


def test_exif_orientation_is_not_applied(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    Image.fromarray(noise()).save(folder / "turned.jpg", exif=exif)
    assert ImageStore(folder).load("turned.jpg").size == (7, 9)


@pytest.mark.parametrize("number", range(10))
def test_upright_pictures_are_turned_as_pillow_turns_them(folder, number):
    """0 and 9 mean nothing."""
    exif = Image.Exif()
    exif[0x0112] = number
    for name in ("turned.jpg", "turned.png", "turned.tif"):
        Image.fromarray(noise()).save(folder / name, exif=exif)
        with Image.open(folder / name) as image:
            expected = np.asarray(ImageOps.exif_transpose(image))
        np.testing.assert_array_equal(np.asarray(ImageStore(folder, upright=True).load(name)), expected)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage, no TIFF", b"Exif\0\0II*\0\xff\0\0\0", b"Exif\0\0"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_picture_with_malformed_exif_stays_as_it_is(folder, exif):
    Image.fromarray(noise()).save(folder / "odd.jpg", exif=exif)
    plain = ImageStore(folder).load("odd.jpg")
    np.testing.assert_array_equal(np.asarray(ImageStore(folder, upright=True).load("odd.jpg")), np.asarray(plain))


def deep(bits: int) -> np.ndarray:
    return np.linspace(0, 2**bits - 1, 256).astype(np.uint16).reshape(16, 16)


def png_stating(bits: int, pixels: np.ndarray) -> bytes:
    """A 16-bit PNG whose sBIT chunk says how many of them mean something."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    data, body = file.getvalue(), b"sBIT" + bytes([bits])
    return data[:33] + struct.pack(">I", 1) + body + struct.pack(">I", zlib.crc32(body)) + data[33:]


def test_sixteen_bit_greyscale_has_one_rule_for_all_pictures(folder):
    """What the file states, else the option, else all 16 bits: never what the picture happens to hold."""
    Image.fromarray(deep(16)).save(folder / "full.png")
    Image.fromarray(deep(12)).save(folder / "twelve.png")
    Image.fromarray(deep(12) >> 6).save(folder / "dark.png")
    (folder / "states.png").write_bytes(png_stating(12, deep(12)))
    Image.fromarray(deep(12)).save(folder / "states.tif", tiffinfo={281: 4095})
    Image.fromarray(deep(12).astype(np.int32) << 19).save(folder / "wide.tif")

    def greys(name: str, rule: PixelRule = AS_BLIP) -> np.ndarray:
        pixels = np.asarray(ImageStore(folder, rule).load(name))
        np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])
        return pixels[..., 0]

    np.testing.assert_array_equal(greys("full.png"), deep(16) >> 8)
    np.testing.assert_array_equal(greys("twelve.png"), deep(12) >> 8)  # dark, as a series of such pictures is
    assert greys("dark.png").max() == 0
    for name in ("states.png", "states.tif"):
        np.testing.assert_array_equal(greys(name), deep(12) >> 4)
        np.testing.assert_array_equal(greys(name, PixelRule(grey_bits=10)), deep(12) >> 4)
    for name in ("twelve.png", "dark.png"):
        np.testing.assert_array_equal(greys(name, PixelRule(grey_bits=12)), np.asarray(Image.open(folder / name)) >> 4)
    np.testing.assert_array_equal(greys("wide.tif"), deep(12) >> 5)
    assert greys("twelve.png", PixelRule(grey_bits=6)).max() == 255


def test_floating_point_pictures_are_refused(folder):
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(folder / "float.tif")
    with pytest.raises(ValueError, match="image float.tif .*floating-point pixels, whose range is not known: save it"):
        ImageStore(folder).load("float.tif")


def test_what_is_drawn_in_alpha_is_black_as_in_blip_or_laid_on_white(folder):
    drawn = np.zeros((8, 8, 4), np.uint8)
    drawn[2:6, 2:6, 3] = 255
    Image.fromarray(drawn, "RGBA").save(folder / "drawn.png")
    Image.fromarray(drawn, "RGBA").quantize(4).save(folder / "palette.png")
    Image.fromarray(drawn[..., 2:], "LA").save(folder / "grey_alpha.png")
    white = ImageStore(folder, PixelRule(flatten_alpha="white"))
    for name in ("drawn.png", "palette.png", "grey_alpha.png"):
        assert np.asarray(ImageStore(folder).load(name)).max() == 0
        np.testing.assert_array_equal(np.asarray(white.load(name))[..., 1], 255 - drawn[..., 3])
    for name in ("a.png", "sub/b.jpg", "grey.png", "cmyk.jpg", "one.webp"):
        np.testing.assert_array_equal(np.asarray(white.load(name)), np.asarray(ImageStore(folder).load(name)))


def test_palette_with_transparency_animation_and_one_pixel(folder):
    palette = Image.fromarray(noise()).quantize(8)
    palette.save(folder / "palette.png", transparency=bytes([0, 128, 255]))
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("1", (1, 1), 1).save(folder / "dot.png")
    store = ImageStore(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(np.asarray(store.load("palette.png")), np.asarray(palette.convert("RGB")))
        assert store.load("moving.gif").getpixel((2, 2)) == (255, 0, 0)
        assert store.load("dot.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("zipped", [False, True])
def test_unreadable_images_are_named(folder, tmp_path, zipped):
    whole = io.BytesIO()
    Image.fromarray(noise(0, (64, 64, 3))).save(whole, "JPEG")
    tiff, compression = io.BytesIO(), lambda kind: struct.pack("<HHIHH", 259, 3, 1, kind, 0)
    Image.fromarray(noise(0, (8, 8, 3))).save(tiff, "TIFF")
    assert compression(1) in tiff.getvalue()
    bad = {
        "scan.tif": tiff.getvalue().replace(compression(1), compression(34712)),  # JPEG 2000: Pillow's KeyError
        "cut.jpg": whole.getvalue()[:700],
        "empty.png": b"",
        "page.jpg": b"<!DOCTYPE html><html>404</html>",
        "header.png": (folder / "a.png").read_bytes()[:20],
    }
    root = tmp_path / "bad.zip" if zipped else tmp_path / "bad"
    if zipped:
        with zipfile.ZipFile(root, "w") as file:
            for name, data in bad.items():
                file.writestr(name, data)
    else:
        root.mkdir()
        for name, data in bad.items():
            (root / name).write_bytes(data)
    store = ImageStore(root)
    for name in bad:
        with pytest.raises(ValueError, match=f"image {name} in .* cannot be read") as error:
            store.load(name)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="image none.png is missing from image_root"):
        store.load("none.png")


@pytest.mark.parametrize("limit", [50, 20])  # of 63 pixels: above Pillow's limit it warns, above twice that it raises
def test_decompression_bombs_are_refused(folder, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ValueError, match="a.png .* too large to be decoded safely"):
            ImageStore(folder).load("a.png")


def test_damaged_archive_members_and_archives(folder, archive, tmp_path):
    data = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as file:
        start = file.getinfo("a.png").header_offset + 60
    data[start : start + 20] = bytes(20)
    (tmp_path / "flipped.zip").write_bytes(data)
    with pytest.raises(ValueError, match="image a.png in .*flipped.zip cannot be read"):
        ImageStore(tmp_path / "flipped.zip").load("a.png")
    (tmp_path / "half.zip").write_bytes(archive.read_bytes()[:300])
    with pytest.raises(ValueError, match="half.zip cannot be read as a .zip archive"):
        ImageStore(tmp_path / "half.zip").load("a.png")
    with pytest.raises(ValueError, match="half.zip cannot be read as a .zip archive"):
        ImageStore(tmp_path / "half.zip").missing(["a.png"])


def test_missing_root_names_image_root(tmp_path):
    cases = [
        ("", "image_root is empty"),
        (tmp_path / "no", "is neither a folder nor a .zip"),
        (tmp_path / "no.zip", "is not an archive"),
    ]
    for root, said in cases:
        with pytest.raises(ValueError, match="image_root") as error:
            ImageStore(root)
        assert said in str(error.value)


def test_missing_images_are_counted(folder, archive, tmp_path):
    names = ["a.png", "gone.png", "sub/b.jpg", "sub/c.jpg", "other/d.jpg"]
    for root in (folder, archive):
        store = ImageStore(root)
        assert store.missing(names) == ["gone.png", "sub/c.jpg", "other/d.jpg"]
        assert missing_message(store, NAMES) == ""
        message = missing_message(store, names)
        assert f"3 of 5 images are missing under image_root {root}, the first is gone.png" in message
        message = missing_message(store, ["sub/b.jpg", "sub/c.jpg"], "sub", "unpack sub.zip")
        assert message.startswith("1 of 2 images of sub are missing under ")
        assert "the first is sub/c.jpg: unpack sub.zip, or " in message


THERE = ["Beach.JPG", "cat.png", "dog", "sub/deep/owl.jpg", "nai\u0308ve.png", "back\\slash.png", "x/fox.png"]
NOT_THERE = {  # what is asked for: (what is said to be there, the remedy)
    "beach.jpg": ("Beach.JPG", "upper and lower case"),
    "cat.jpg": ("cat.png", "in the extension"),
    "dog.png": ("dog", "in the extension"),
    "beach.png": ("Beach.JPG", "in case and extension"),
    "deep/owl.jpg": ("sub/deep/owl.jpg", "without the leading sub/|set image_root to .*/pictures/sub/?$"),
    "pictures/cat.png": ("cat.png", "remove the leading pictures/|set image_root to .*[^s]$"),
    "other/cat.png": ("cat.png", "remove the leading other/"),
    "back/slash.png": ("back\\slash.png", "has backslashes"),
    "y/fox.png": ("x/fox.png", "lies in another folder"),
}  # fmt: skip


@pytest.mark.parametrize("zipped", [False, True])
def test_a_missing_image_is_looked_for_and_the_remedy_fits(tmp_path, zipped):
    root = tmp_path / ("pictures.zip" if zipped else "pictures")
    if zipped:
        with zipfile.ZipFile(root, "w") as file:
            for name in THERE:
                file.writestr(name, b"")
    for name in [] if zipped else THERE:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    store = ImageStore(root)
    assert store.missing(["na\u00efve.png"]) == []  # composed here, decomposed there
    for name, (there, remedy) in NOT_THERE.items():
        message = missing_message(store, [name])
        assert f"there is {there!r} for {name!r}: " in message and re.search(remedy, message), message
    many = ["beach.jpg", "cat.jpg", "nowhere.png", "dog.png"]
    message = missing_message(store, many)
    assert "4 of 4 images are missing" in message and "'cat.png' for 'cat.jpg' (as for 2 of them): " in message
    assert missing_message(store, ["nowhere.png"]).count(": ") == 1


def test_an_accent_is_found_in_either_form(tmp_path):
    for form in ("na\u00efve.png", "nai\u0308ve.png"):
        root = tmp_path / ascii(form)
        root.mkdir()
        Image.fromarray(noise()).save(root / form)
        assert ImageStore(root).missing(["na\u00efve.png"]) == []
        assert ImageStore(root).load("na\u00efve.png").size == (7, 9)


def test_names_of_another_code_page_are_recognised(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("K\u251c\u00f1se.png".encode().decode(), b"")  # UTF-8 bytes that were read as code page 437
    message = missing_message(ImageStore(tmp_path / "a.zip"), ["K\u00e4se.png"])
    assert "for 'K\u00e4se.png': the archive's names are of another code page; pack it again with UTF-8" in message


def test_archive_survives_fork_and_pickle(archive):
    store = ImageStore(archive)
    expected = [np.asarray(store.load(name)) for name in NAMES]
    opened = store.archive  # by the parent, before the fork
    np.testing.assert_array_equal(np.asarray(pickle.loads(pickle.dumps(store)).load("a.png")), expected[0])
    children = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:  # a shared file position would mix the bytes of the three children
            same = store.archive is not opened and all(
                np.array_equal(np.asarray(store.load(name)), image)
                for _ in range(30)
                for name, image in zip(NAMES, expected, strict=True)
            )
            os._exit(0 if same else 1)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0, 0]


def test_paths_are_looked_up_here_then_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_path("data/scenes.py") == REPOSITORY / "data" / "scenes.py"
    assert str(find_path("data/nowhere")) == "data/nowhere"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "scenes.py").touch()
    assert str(find_path("data/scenes.py")) == "data/scenes.py"
    assert find_path(tmp_path / "x") == tmp_path / "x"
