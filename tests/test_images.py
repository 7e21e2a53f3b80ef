"""Pixels equal BLIP's `Image.open(path).convert('RGB')`; odd pictures decode sensibly; broken ones are named."""

import io
import os
import pickle
import warnings
import zipfile

import numpy as np
import pytest
from PIL import Image

from data.images import ImageStore, missing_message
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


def test_sixteen_bit_greyscale_keeps_its_greys(folder):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(folder / "deep.png")
    grey = np.asarray(ImageStore(folder).load("deep.png"))
    np.testing.assert_array_equal(grey[..., 0], ramp >> 8)
    np.testing.assert_array_equal(grey[..., 0], grey[..., 2])


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
    bad = {
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
    with zipfile.ZipFile(tmp_path / "deeper.zip", "w") as file:
        file.write(folder / "a.png", "flickr/images/a.png")
    message = missing_message(ImageStore(tmp_path / "deeper.zip"), ["a.png"])
    assert "it holds flickr/images/a.png, so pack it again without the leading flickr/images/" in message


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
