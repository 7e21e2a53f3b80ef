"""The drawn data set: captions say what is in the picture, splits share nothing, and it is drawn once, whole."""

import functools
import hashlib
import json
import logging
import multiprocessing
import re
import time

import numpy as np
import pytest

from configs.schema import RetrievalConfig
from data import scenes
from data.annotations import load_annotations
from data.images import ImageStore
from data.scenes import (
    AXES,
    PLACES,
    Scene,
    Thing,
    arrangements,
    captions_of,
    choose_scenes,
    draw_scene,
    ensure_scenes,
    exchanges,
)
from transform.text import clean_caption


@pytest.fixture
def few(monkeypatch):
    """Draw 12 + 4 + 6 pictures instead of thousands; the 12 are 4 scenes three times."""
    for name, count in {"TRAIN_IMAGES": 12, "DRAWINGS": 3, "VAL_IMAGES": 4, "TEST_IMAGES": 6}.items():
        monkeypatch.setattr(scenes, name, count)


def parse(caption: str) -> Scene:
    """The canonical scene a caption describes, read independently of how captions are written."""
    words = caption.removeprefix("there is ")
    for axis, (forth, back) in AXES.items():
        for phrase, first_is_left in ((forth, True), (back, False)):
            match = re.fullmatch(f"a (.+) {phrase} a (.+)", words)
            if match:
                left, right = match.groups() if first_is_left else match.groups()[::-1]
                return Scene(axis, Thing(*left.split()), Thing(*right.split()))
    a, here, b, there = re.fullmatch(r"a (\S+ \S+ \S+) (.+) and a (\S+ \S+ \S+) (.+)", words).groups()
    axis = next(axis for axis, places in PLACES.items() if {here, there} == set(places))
    first, second = (a, b) if here == PLACES[axis][0] else (b, a)
    return Scene(axis, Thing(*first.split()), Thing(*second.split()))


@functools.cache
def real_splits(seed: int = 0) -> list[list[Scene]]:
    used: set[Scene] = set()
    train = scenes.TRAIN_IMAGES // scenes.DRAWINGS
    counts = {"test": scenes.TEST_IMAGES, "val": scenes.VAL_IMAGES, "train": train}
    return [
        choose_scenes(split, count, used, np.random.default_rng([seed, n]))
        for n, (split, count) in enumerate(counts.items())
    ]


def test_splits_share_no_combination_and_no_gallery_repeats_one():
    splits = real_splits()
    everything = [scene for split in splits for scene in split]
    assert len(set(everything)) == len(everything) == 700 + scenes.TRAIN_IMAGES // scenes.DRAWINGS
    for scene in everything:
        assert scene.first[1:] != scene.second[1:]  # else "a red ring left of a red ring" could mean either


def words_of(scene: Scene) -> list[str]:
    return sorted([*scene.first, *scene.second])


def test_every_gallery_scene_has_three_others_of_its_words_and_every_training_scene_its_exchanges():
    *galleries, train = real_splits()
    for split in galleries:
        for scene in split:
            assert len(set(split).intersection(arrangements(scene))) >= 3
            assert all(words_of(other) == words_of(scene) for other in arrangements(scene))
    complete = [scene for scene in train if set(exchanges(scene)) <= set(train)]
    assert len(train) - len(complete) < 4  # the last family may be cut off by the number of scenes
    assert all(set(exchanges(scene)) <= set(arrangements(scene)) for scene in train)


def test_places_and_colours_exchange():
    red, blue = Thing("small", "red", "ring"), Thing("large", "blue", "star")
    blue_ring, red_star = Thing("small", "blue", "ring"), Thing("large", "red", "star")
    others = {(blue, red), (blue_ring, red_star), (red_star, blue_ring)}
    assert {scene[1:] for scene in exchanges(Scene("vertical", red, blue))} == others
    alike = Scene("vertical", red, Thing("small", "blue", "ring"))  # new colours are new places
    assert exchanges(alike) == [Scene("vertical", alike.second, alike.first)]


def test_all_arrangements_of_distinct_attributes_are_sixteen():
    scene = Scene("horizontal", Thing("small", "red", "ring"), Thing("large", "blue", "star"))
    assert len({scene, *arrangements(scene)}) == 16
    assert Scene("vertical", Thing("small", "blue", "star"), Thing("large", "red", "ring")) in arrangements(scene)


def test_three_captions_mean_the_same_scene():
    rng = np.random.default_rng(0)
    for scene in real_splits()[1][:200]:
        captions = captions_of(scene, rng)
        assert len(set(captions)) == 3
        assert [parse(caption) for caption in captions] == [scene] * 3
        assert all(clean_caption(caption) == caption for caption in captions)


def test_pictures_show_what_the_captions_say():
    """Where the pixels of either colour lie and how many there are agrees with relation and sizes."""
    checked = 0
    for i, scene in enumerate(real_splits()[0][:150]):
        picture = np.asarray(draw_scene(scene, np.random.default_rng(i)), np.float32)
        centres, areas = [], []
        for thing in (scene.first, scene.second):
            distance = np.abs(picture - np.array(scenes.COLOURS[thing.colour], np.float32)).max(-1)
            y, x = np.nonzero(distance < 12)
            assert len(x) > 8, f"{thing} cannot be seen in picture {i}"
            centres.append((x.mean(), y.mean()))
            areas.append(len(x))
        if scene.first.colour == scene.second.colour:
            continue
        along, across = (0, 1) if scene.axis == "horizontal" else (1, 0)
        apart = centres[1][along] - centres[0][along]
        assert apart > 30 and abs(centres[1][across] - centres[0][across]) < 8
        if scene.first.shape == scene.second.shape and scene.first.size != scene.second.size:
            assert (areas[0] > areas[1]) == (scene.first.size == "large")
        checked += 1
    assert checked > 100


def test_objects_stay_inside_the_frame():
    rng = np.random.default_rng(0)
    for axis in AXES:
        for radii in ([8.4, 8.4], [8.4, 4.6], [4.6, 8.4], [4.6, 4.6]) * 50:
            scene = Scene(axis, Thing("large", "red", "star"), Thing("large", "blue", "star"))
            centres = scenes.place(scene, radii, rng)
            for centre, radius in zip(centres, radii, strict=True):
                assert all(scenes.REACH * radius - 1e-6 <= v <= 60 - scenes.REACH * radius + 1e-6 for v in centre)
    for shape in scenes.SHAPES[1:]:
        if shape != "ring":
            assert max(np.hypot(*corner) for corner in scenes.polygon(shape, 0.1)) <= 1.45  # corners of tilted squares
            assert max(max(map(abs, corner)) for corner in scenes.polygon(shape, 0.12)) <= scenes.REACH


def test_files_are_karpathy_layout_and_repeatable(tmp_path, few):
    first, second = ensure_scenes(tmp_path / "a"), ensure_scenes(tmp_path / "b")
    for file in ("images.zip", "train.json", "val.json", "test.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    train = json.loads((first / "train.json").read_text())
    assert len(train) == 36 and set(train[0]) == {"image", "caption", "image_id"}
    drawings = {key: {row["image"] for row in train if row["image_id"] == key} for key in range(4)}
    assert all(len(images) == 3 for images in drawings.values())
    assert len(set().union(*drawings.values())) == 12
    test = json.loads((first / "test.json").read_text())
    assert len(test) == 6 and len(test[0]["caption"]) == 3
    assert ImageStore(first / "images.zip").load(test[0]["image"]).size == (60, 60)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_the_drawn_data_set_never_changes_by_itself(tmp_path, few):
    """Figures in the README and saved runs are about these scenes, words and pixels: a change needs a new VERSION."""
    root = ensure_scenes(tmp_path / "scenes")
    words, pixels = hashlib.sha256(), hashlib.sha256()
    store = ImageStore(root / "images.zip")
    for split in ("train", "val", "test"):
        words.update((root / f"{split}.json").read_bytes())
    for name in sorted(store.archive.namelist()):
        pixels.update(store.load(name).tobytes())
    assert words.hexdigest()[:16] == "c8208b6b6425ebed"
    assert pixels.hexdigest()[:16] == "d70128bae04c83c9"


def test_drawn_again_only_when_something_changed(tmp_path, few, monkeypatch):
    root = ensure_scenes(tmp_path / "scenes")
    before = (root / "images.zip").stat().st_mtime_ns, (root / "images.zip").read_bytes()
    ensure_scenes(root)
    assert (root / "images.zip").stat().st_mtime_ns == before[0]
    ensure_scenes(root, seed=1)
    assert (root / "images.zip").read_bytes() != before[1]
    monkeypatch.setattr(scenes, "TEST_IMAGES", 8)
    ensure_scenes(root, seed=1)
    assert len(json.loads((root / "test.json").read_text())) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_an_interrupted_drawing_leaves_nothing(tmp_path, few, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "draw_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_scenes(tmp_path / "scenes")
    assert list(tmp_path.iterdir()) == []


def test_other_peoples_files_are_not_replaced(tmp_path, few):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else.*new folder"):
        ensure_scenes(tmp_path)
    with pytest.raises(ValueError, match="holds something else"):
        ensure_scenes(tmp_path / "thesis.txt")
    with pytest.raises(ValueError, match="cannot be written"):
        ensure_scenes(tmp_path / "thesis.txt" / "below")
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_drawing_is_read_whatever_its_seed(tmp_path, few, monkeypatch):
    root = ensure_scenes(tmp_path / "scenes", seed=3)
    before = (root / "images.zip").stat().st_mtime_ns, (root / "images.zip").read_bytes()
    cfg = RetrievalConfig(dataset="scenes", ann_root=str(root), image_root=str(root))
    assert len(load_annotations(cfg, "test").images) == 6
    assert ((root / "images.zip").stat().st_mtime_ns, (root / "images.zip").read_bytes()) == before
    monkeypatch.setattr(scenes, "TEST_IMAGES", 8)
    assert len(load_annotations(cfg, "test").images) == 8
    assert json.loads((root / "stamp.json").read_text())["seed"] == 3


def test_a_drawing_with_other_files_beside_it_is_not_replaced(tmp_path, few):
    root = ensure_scenes(tmp_path / "scenes")
    (root / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds something else \(thesis.txt\): .*new folder"):
        ensure_scenes(root, seed=1)
    assert ensure_scenes(root) == root and (root / "thesis.txt").read_text() == "mine"
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "stamp.json").write_text('{"price": 1}')
    with pytest.raises(ValueError, match=r"holds something else \(there is no stamp.json of a drawing\)"):
        ensure_scenes(tmp_path / "letters")


def test_two_processes_draw_once(tmp_path, few, monkeypatch):
    draw = scenes._write

    def slow_write(folder, seed):
        with open(tmp_path / "count", "a") as file:
            file.write("x")
        time.sleep(0.3)
        draw(folder, seed)

    monkeypatch.setattr(scenes, "_write", slow_write)
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=ensure_scenes, args=(tmp_path / "scenes",)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert (tmp_path / "count").read_text() == "x"
    assert (tmp_path / "scenes" / "stamp.json").exists()


def test_command_line(tmp_path, few, caplog, capsys):
    with caplog.at_level(logging.INFO):
        scenes.main(["--out", str(tmp_path / "s"), "--seed", "3"])
    assert "22 pictures" in caplog.text
    with pytest.raises(SystemExit) as stop:
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "file").touch()
        scenes.main(["--out", str(tmp_path / "other")])
    assert stop.value.code == 2 and "holds something else" in capsys.readouterr().err
