"""Kept rankings: places and best candidates against a plain sort, Recall read back, files, and who writes them."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data.annotations import NO_IMAGE, Annotations
from retrieval.metrics import retrieval_metrics
from retrieval.rankings import ABSENT, BEST, keep, load_rankings, order, rankings_file, save_rankings
from retrieval.rerank import Ranking, Shortlists
from tests.test_train import ROOT, lines, run


def random_ranking(seed: int, images: int = 12, per_image: int = 3, k: int = 8) -> tuple[Ranking, Annotations]:
    """Scores with ties over a gallery where two images share an id; one image and one caption are distractors."""
    rng = np.random.default_rng(seed)
    caption_image = np.repeat(np.arange(images - 1), per_image)
    caption_image[-1] = NO_IMAGE
    count = len(caption_image)
    ids = np.arange(images)
    ids[1] = 0
    table = Annotations(
        "custom test", [ROOT / "rows.json"], [f"{i}.png" for i in range(images)], ids,
        [f"caption {i} é" for i in range(count)], caption_image,
    )  # fmt: skip

    def lists(values: int) -> Shortlists:
        i2t = np.stack([rng.permutation(count)[:k] for _ in range(images)]).astype(np.int32)
        t2i = np.stack([rng.permutation(images)[:k] for _ in range(count)]).astype(np.int32)
        return Shortlists(i2t, rng.integers(0, values, i2t.shape) / 4, t2i, rng.integers(0, values, t2i.shape) / 4)

    itc = lists(9)
    itm = Shortlists(itc.i2t, lists(5).i2t_value, itc.t2i, lists(5).t2i_value)
    return Ranking(itc, itm, 0), table


@pytest.mark.parametrize("k", [8, 12])
def test_best_and_places_are_those_of_a_plain_sort(k):
    ranking, table = random_ranking(0, k=k)
    kept = keep(ranking, table, "test")
    for way, lists in (("txt", "i2t"), ("img", "t2i")):
        for name in ("itm", "itc"):
            source = getattr(ranking, name)
            candidates, scores = getattr(source, lists), getattr(source, f"{lists}_value")
            found = getattr(kept.direction(way), name)
            for query in range(len(candidates)):
                pairs = zip(-scores[query], candidates[query], strict=True)
                plain = [int(c) for _, c in sorted(pairs)]
                length = min(k, BEST)
                assert found.best[query, :length].tolist() == plain[:BEST]
                assert (found.best[query, length:] == ABSENT).all()
                right = [plain.index(c) for c in kept.right(way, query) if c in plain]
                assert found.place[query] == (min(right) if right else ABSENT)
    assert kept.txt.asked.sum() == 11 and kept.img.asked.sum() == 32
    assert (keep(ranking, table, "val").gallery) == kept.gallery and kept.k_test == k


def test_recall_is_that_of_the_metrics():
    ranking, table = random_ranking(1)
    kept = keep(ranking, table, "test")
    for name in ("itm", "itc"):
        lists = getattr(ranking, name)
        values = lists.i2t, lists.i2t_value, lists.t2i, lists.t2i_value
        expected = retrieval_metrics(*values, table.image_ids, table.caption_ids)
        assert kept.recall(name) == pytest.approx(expected)


def test_a_file_gives_back_what_was_kept(tmp_path):
    ranking, table = random_ranking(2)
    kept, row = keep(ranking, table, "test"), {"kind": "test", "test_r_mean": 12.5, "checkpoint": "ü.pth"}
    path = save_rankings(tmp_path / "new", kept, row)
    found = load_rankings(str(path))
    assert path == rankings_file(tmp_path / "new", "test") and [p.name for p in path.parent.iterdir()] == [path.name]
    assert (found.images, found.captions, found.row, found.split) == (table.images, table.captions, row, "test")
    assert found.gallery == kept.gallery and found.recall() == kept.recall() and found.k_test == kept.k_test
    for way in ("txt", "img"):
        for a, b in zip(found.direction(way).itm, kept.direction(way).itm, strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype


@pytest.mark.parametrize("content", [None, b"", b"PK\3\4nothing", b"text"])
def test_files_that_are_none_are_explained(tmp_path, content):
    path = tmp_path / "ranking_test.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="ranking_test.npz: .*evaluate"):
        load_rankings(path)


def tear(archive: Path, name: str) -> None:
    """Damage the first byte of a member that is deflated, so that zlib cannot go on."""
    with zipfile.ZipFile(archive) as file:
        start = file.getinfo(name).header_offset
    data = bytearray(archive.read_bytes())
    start += 30 + sum(int.from_bytes(data[start + at : start + at + 2], "little") for at in (26, 28))  # name, extra
    data[start] = 0xFF
    archive.write_bytes(data)


def test_a_damaged_file_is_explained(tmp_path):
    ranking, table = random_ranking(3)
    path = save_rankings(tmp_path, keep(ranking, table, "test"), {})
    tear(path, "images.npy")
    with pytest.raises(ValueError, match="ranking_test.npz: .*damaged .*evaluate again"):
        load_rankings(path)


def test_fewer_than_ten_candidates_are_padded():
    found = order(np.array([[2, 0]]), np.array([[0.5, 0.5]]), np.array([7]), np.array([7, 1, 7]))
    assert found.best[0].tolist() == [0, 2] + [ABSENT] * 8 and found.place.tolist() == [0]
    assert found.score[0, :2].tolist() == [0.5, 0.5] and np.isnan(found.score[0, 2:]).all()


def test_training_and_evaluation_keep_their_rankings(tiny_run):
    assert run(tiny_run, "--set", "k_test=3") == 0
    *_, test = lines(tiny_run / "out" / "log.txt")
    rows = [row for row in lines(tiny_run / "out" / "log.txt") if row.get("kind") == "epoch"]
    best = next(row for row in rows if row["epoch"] == test["best_epoch"])
    for split, row in (("test", test), ("val", best)):
        kept = load_rankings(rankings_file(tiny_run / "out", split))
        assert {key: row[key] for key in row if key != "time"} == {k: v for k, v in kept.row.items() if k != "time"}
        for order_, prefix in (("itm", ""), ("itc", "itc_")):
            for key, value in kept.recall(order_).items():
                assert row[f"{split}_{prefix}{key}"] == pytest.approx(value, abs=1e-4)
    before = rankings_file(tiny_run / "out", "test").read_bytes()
    assert run(tiny_run, "--evaluate", "--set", "k_test=3") == 0
    (row,) = lines(tiny_run / "out" / "evaluate.txt")
    kept = load_rankings(rankings_file(tiny_run / "out", "test"))
    assert kept.row["kind"] == "evaluate" and kept.row["test_r_mean"] == row["test_r_mean"]
    assert rankings_file(tiny_run / "out", "test").read_bytes() != before
    assert json.loads(json.dumps(kept.row)) == kept.row
