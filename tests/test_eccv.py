"""Corrected measures of COCO: on invented rankings over the package's own ids, against its own functions."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from configs.schema import RetrievalConfig
from data.annotations import NO_SENTENCE, Annotations, build_annotations, load_annotations
from data.rows import read_rows
from retrieval.eccv import COCO_CAPTIONS, coco_ids, corrected_metrics, ids_by_words
from retrieval.rerank import Ranking, Shortlists

package = pytest.importorskip("eccv_caption", reason="needs the package: pip install -r requirements-eccv.txt")


@pytest.fixture(scope="module")
def official():
    with warnings.catch_warnings(action="ignore"):
        return package.Metrics()


def name_of(image_id: int) -> str:
    return f"val2014/COCO_val2014_{image_id:012}.jpg"


def coco_table(official, folder: Path, sentids: bool = True) -> Annotations:
    """The corrected test split with invented words, in an order of its own."""
    rng = np.random.default_rng(0)
    images = rng.permutation(list(official.coco_gts["i2t"]))
    index = {int(image): i for i, image in enumerate(images)}
    captions = rng.permutation([c for c in official.coco_gts["t2i"]])
    caption_image = np.array([index[official.coco_gts["t2i"][int(c)][0]] for c in captions])
    ids = captions.astype(np.int64) if sentids else np.full(len(captions), NO_SENTENCE)
    return Annotations(
        "coco test", [folder / "coco_karpathy_test.json"], [name_of(int(i)) for i in images], np.arange(len(images)),
        [f"words of {c}" for c in captions], caption_image, sentids=ids,
    )  # fmt: skip


def invented(table: Annotations, k: int) -> Ranking:
    """Random candidates, and the right ones among them for most queries."""
    rng, images, captions = np.random.default_rng(1), len(table.images), len(table.captions)
    i2t = np.stack([rng.choice(captions, k, replace=False) for _ in range(images)]).astype(np.int32)
    t2i = np.stack([rng.choice(images, k, replace=False) for _ in range(captions)]).astype(np.int32)
    for caption in range(0, captions, 2):  # it stands first or so for its own image, and the image for it
        image = table.caption_image[caption]
        if caption not in i2t[image]:
            i2t[image, caption % k] = caption
        if image not in t2i[caption]:
            t2i[caption, 0] = image
    scores = [rng.random(x.shape).astype(np.float32) for x in (i2t, t2i)]
    scores[1][::2, 0] += 1
    lists = Shortlists(i2t, scores[0], t2i, scores[1])
    return Ranking(lists, lists, 0)


@pytest.mark.parametrize("k", [60, 12])  # 12 is less than some queries have right answers
def test_numbers_are_the_packages_own(official, tmp_path, k, capsys):
    table = coco_table(official, tmp_path)
    ranking = invented(table, k)
    numbers, lines = corrected_metrics(ranking, table)
    image_ids = [int(name[-16:-4]) for name in table.images]
    plain: dict[str, dict[int, list[int]]] = {"i2t": {}, "t2i": {}}
    for way, ids, gallery in (("i2t", image_ids, table.sentids.tolist()), ("t2i", table.sentids.tolist(), image_ids)):
        candidates, values = getattr(ranking.itm, way), getattr(ranking.itm, f"{way}_value")
        for query, own in enumerate(ids):
            best = sorted(range(k), key=lambda j: (-values[query, j], candidates[query, j]))  # noqa: B023
            plain[way][own] = [gallery[candidates[query, j]] for j in best] + [-own - j for j in range(60)]
    expected = official.eccv_metrics(plain, "all") | {
        f"cxc_r{n}": official.cxc_recalls(plain, "all", n) for n in (1, 5, 10)
    }
    capsys.readouterr()
    assert len(numbers) == 12
    for name, by_way in expected.items():
        kind, _, rest = name.partition("_")
        for way, prefix in (("i2t", "txt"), ("t2i", "img")):
            assert numbers[f"{kind}_{prefix}_{rest}"] == pytest.approx(100 * by_way[way]), name
    assert numbers["cxc_img_r1"] > 5 and numbers["eccv_img_map_at_r"] > 0.5
    assert any("k_test 12 cuts lists short of R" in line for line in lines) == (k == 12)
    assert f"{numbers['eccv_img_map_at_r']:.2f}" in lines[-2] and f"{numbers['cxc_img_r10']:.2f}" in lines[-1]


def test_a_caption_without_an_id_counts_as_wrong_and_no_more(official, tmp_path):
    table = coco_table(official, tmp_path)
    ranking = invented(table, 60)
    whole, _ = corrected_metrics(ranking, table)
    asked = official.eccv_gts["t2i"]
    unknown = [i for i, caption in enumerate(table.sentids.tolist()) if caption in asked][:100]
    table.sentids[unknown] = NO_SENTENCE
    numbers, lines = corrected_metrics(ranking, table)
    assert "100 of 25000 captions have no id in sentids: they count as wrong" in lines[0] and len(numbers) == 12
    hits = [whole["eccv_img_r1"] * len(asked) / 100, numbers["eccv_img_r1"] * len(asked) / 100]
    assert 0 <= hits[0] - hits[1] <= 100 and numbers["eccv_img_map_at_r"] < whole["eccv_img_map_at_r"]
    assert all(numbers[key] <= whole[key] + 1e-9 for key in whole)
    assert numbers["cxc_txt_r1"] > 0.9 * whole["cxc_txt_r1"]


def test_ids_by_the_words_within_an_image(tmp_path):
    rows = [{"image_id": 5, "id": 11, "caption": "A dog, running."}, {"image_id": 5, "id": 12, "caption": "a cat"},
            {"image_id": 6, "id": 13, "caption": "A CAT"}, {"image_id": 6, "id": 14, "caption": "a cat."}]  # fmt: skip
    (tmp_path / COCO_CAPTIONS).write_text(json.dumps({"annotations": rows}))
    captions = ["a dog, running", "a cat", "a cat", "a cat", "a bus"]
    table = Annotations("coco test", [tmp_path / "t.json"], [name_of(5), name_of(6)], np.arange(2), captions,
                        np.array([0, 0, 1, 1, 1]))  # fmt: skip
    assert ids_by_words(table, np.array([5, 6]), tmp_path / COCO_CAPTIONS).tolist() == [11, 12, 13, 14, NO_SENTENCE]
    image_ids, ids, notes = coco_ids(table)
    assert image_ids.tolist() == [5, 6] and ids.tolist() == [11, 12, 13, 14, -1]
    assert "1 of 5 captions have no id" in notes[0] and "2 captions have the words of another one" in notes[1]
    (tmp_path / COCO_CAPTIONS).write_text("[]")
    with pytest.raises(ValueError, match="is not COCO's file of captions"):
        coco_ids(table)


def test_what_cannot_be_linked_is_said(official, tmp_path):
    table = coco_table(official, tmp_path, sentids=False)
    ranking = invented(table, 12)
    numbers, (line,) = corrected_metrics(ranking, table)
    assert numbers == {} and "captions_val2014.json is not beside it: put it there" in line
    small = Annotations("coco test", table.files, table.images[:3], np.arange(3), ["a"], np.array([0]),
                        sentids=np.array([official.coco_gts["i2t"][int(table.images[0][-16:-4])][0]]))  # fmt: skip
    numbers, (line,) = corrected_metrics(ranking, small)
    assert numbers == {} and "4997 images and" in line and "are not here" in line
    other = Annotations("coco test", table.files, ["a.jpg"], np.arange(1), ["a"], np.array([0]))
    assert "do not have COCO's file names" in corrected_metrics(ranking, other).lines[0]


def test_sentids_come_with_the_annotations(tmp_path):
    rows = [{"image": "a.jpg", "caption": ["x", "..."], "sentids": [7, 8]}, {"image": "b.jpg", "caption": "y"}]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    table = build_annotations("coco test", *read_rows(tmp_path / "t.json"), distractors=True, skip=True)
    assert table.captions == ["x", "y"] and table.sentids.tolist() == [7, NO_SENTENCE]
    karpathy = {"images": [{"filename": "a.jpg", "sentids": [5, 6], "split": "test",
                            "sentences": [{"raw": "p"}, {"raw": "q"}]}], "dataset": "coco"}  # fmt: skip
    (tmp_path / "k.json").write_text(json.dumps(karpathy))
    cfg = RetrievalConfig(dataset="custom", image_root="x", ann_root=str(tmp_path), test_file="k.json")
    assert load_annotations(cfg, "test").sentids.tolist() == [5, 6]
    for wrong in ([7], "7", [1, "2"], [1, True]):
        rows[0]["sentids"] = wrong
        (tmp_path / "t.json").write_text(json.dumps(rows))
        with pytest.raises(ValueError, match="row 1 needs under 'sentids' a list of whole numbers"):
            read_rows(tmp_path / "t.json")
