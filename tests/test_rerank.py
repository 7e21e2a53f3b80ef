"""Re-ranking against the straightforward per-query loop: same scores, whatever the sizes, passes and blocks.

Under bf16: the same Recall as in float32.
"""

import logging
import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch

from benchmarks.bench_evaluate import plant_gallery
from benchmarks.published import published_matrices
from retrieval import scoring
from retrieval.metrics import KS, places, retrieval_metrics
from retrieval.pinned import PinnedBlocks, blocks_in_slab
from retrieval.recheck import Queries, open_pairs, recheck_in_float32
from retrieval.rerank import encode_images, encode_texts, needed_pairs, rerank, score_matrices, shortlist
from retrieval.scoring import _passes, score_pairs
from tests.conftest import random_captions, tiny_med, tiny_model
from transform.text import tokenize
from utils import precision

LONGEST = " ".join(["unbelievable"] * 30)  # more than 35 tokens
CASES = {
    "usual": (7, 20, 5),
    "one image": (1, 6, 3),
    "one text": (5, 1, 2),
    "one of each": (1, 1, 1),
    "k beyond the gallery": (4, 9, 100),
}


def gallery(num_images: int, num_texts: int) -> tuple[torch.Tensor, list[str]]:
    captions = random_captions(num_texts, longest=20)
    if num_texts > 5:
        captions[1] = captions[0]  # duplicates
        captions[2], captions[3] = LONGEST, ""  # 35 tokens and 2
    return torch.randn(num_images, 3, 32, 32), captions


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_per_query_loop(name, dtype, atol):
    num_images, num_texts, k = CASES[name]
    model = tiny_model(dtype).eval()
    pixels, captions = gallery(num_images, num_texts)
    expected = published_matrices(model, pixels.to(dtype), tokenize(captions), k)
    got = score_matrices(model, pixels, captions, k, batch_size=3)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours == -100, theirs == -100)
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


@pytest.mark.parametrize("layers", [1, 2])
def test_shallow_text_encoders(layers):
    model = tiny_model(torch.float64, med_config=tiny_med(num_hidden_layers=layers)).eval()
    pixels, captions = gallery(3, 8)
    expected = published_matrices(model, pixels.double(), tokenize(captions), 4)
    torch.testing.assert_close(score_matrices(model, pixels, captions, 4), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("tokens_per_pass", [1, 37, 10**6])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_passes_and_blocks_do_not_change_scores(tokens_per_pass, batch_size):
    model = tiny_model(torch.float64).eval()
    pixels, captions = gallery(7, 20)
    expected = rerank(model, [pixels], 7, captions, 5, batch_size=7).itm
    got = rerank(model, pixels.split(batch_size), 7, captions, 5, batch_size, tokens_per_pass).itm
    np.testing.assert_array_equal(got.i2t, expected.i2t)
    np.testing.assert_allclose(got.i2t_value, expected.i2t_value, atol=1e-12)
    np.testing.assert_allclose(got.t2i_value, expected.t2i_value, atol=1e-12)


def test_each_needed_pair_once():
    lists = shortlist(torch.eye(3), torch.eye(4, 3), np.arange(4), 2)
    pairs = needed_pairs(lists, np.arange(4))
    wanted = {(i, t) for i, row in enumerate(lists.i2t) for t in row} | {
        (i, t) for t, row in enumerate(lists.t2i) for i in row
    }
    assert list(zip(pairs.image.tolist(), pairs.text.tolist(), strict=True)) == sorted(
        (int(i), int(t)) for i, t in wanted
    )


def test_passes_on_a_cpu_stay_in_its_cache(monkeypatch):
    model = tiny_model().eval()
    pixels, captions = gallery(7, 20)
    tokens, score = [], scoring._score
    monkeypatch.setattr(scoring, "CPU_TOKENS", 50)
    monkeypatch.setattr(scoring, "_score", lambda *args: tokens.append(args[3].lengths[args[4]].sum()) or score(*args))
    rerank(model, [pixels], 7, captions, 5, batch_size=7, tokens_per_pass=10**6)
    assert len(tokens) > 3 and max(tokens) <= 50 + 35


def test_passes_cover_everything_and_hold_the_bound():
    lengths = np.random.default_rng(0).integers(2, 36, 1000)
    passes = list(_passes(lengths, 500))
    assert [i for part in passes for i in range(part.start, part.stop)] == list(range(1000))
    assert max(lengths[part].sum() for part in passes) <= 500 + 35
    assert list(_passes(np.array([], dtype=int), 500)) == []


def test_shortlists_are_the_best_cosines_in_chunks(monkeypatch):
    monkeypatch.setattr("retrieval.rerank.SIMILARITY_CHUNK", 40)
    image, text = torch.randn(9, 5), torch.randn(13, 5)
    lists = shortlist(image, text, np.arange(13), 4)
    expected = (image @ text.T).topk(4, dim=1)
    np.testing.assert_array_equal(lists.i2t, expected.indices)
    np.testing.assert_allclose(lists.i2t_value, expected.values, rtol=1e-6)
    np.testing.assert_array_equal(lists.t2i, (text @ image.T).topk(4, dim=1).indices)


def test_captions_of_the_same_tokens_tie_exactly_and_are_scored_once():
    model = tiny_model().eval()
    pixels, captions = gallery(6, 12)
    captions[7] = captions[9] = captions[0]  # with captions[1] four of one text
    ranking = rerank(model, [pixels], 6, captions, 100, batch_size=6)
    i2t = np.take_along_axis(ranking.itm.i2t_value, ranking.itm.i2t.argsort(1), 1)  # (6, 12)
    assert (i2t[:, [1, 7, 9]] == i2t[:, :1]).all()
    np.testing.assert_array_equal(ranking.itm.t2i_value[[1, 7, 9]], ranking.itm.t2i_value[[0] * 3])
    assert ranking.num_pairs == 6 * 9


@torch.inference_mode()
def test_some_pairs_alone_get_the_same_scores():
    """Images without any pair between images with some, as when a few are scored again."""
    model = tiny_model(torch.float64).eval()
    pixels, captions = gallery(7, 9)
    texts = encode_texts(model, tokenize(captions), 100)
    images = encode_images(model, pixels.split(4), 7, batch_size=4)
    image, text = np.divmod(np.arange(7 * len(texts.lengths)), len(texts.lengths))
    scores = score_pairs(model, images, texts, image, text, 64)
    some = np.flatnonzero(np.isin(image, [1, 3, 6]) & (text % 2 == 0))
    np.testing.assert_allclose(score_pairs(model, images, texts, image[some], text[some], 64), scores[some], atol=1e-12)
    assert score_pairs(model, images, texts, image[:0], text[:0], 64).shape == (0,)


def coco_bookkeeping() -> float:
    """Everything about COCO 5K's 6.4 million pairs but their scores: bytes that it adds to the process at its peak."""
    gallery = plant_gallery(5000, 25010, 30524)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    captions = np.arange(25010)
    lists = shortlist(gallery.image_feat, gallery.text_feat, captions, 256)
    pairs = needed_pairs(lists, captions)
    screened = np.random.default_rng(0).standard_normal(len(pairs.image), dtype=np.float32)
    i2t = Queries(pairs.i2t, lists.i2t_value, gallery.text_ids[lists.i2t] == gallery.image_ids[:, None])
    t2i = Queries(pairs.t2i, lists.t2i_value, gallery.image_ids[lists.t2i] == gallery.text_ids[:, None])
    scores = recheck_in_float32(screened, [i2t, t2i], lambda some: screened[some] + np.float32(0.001))
    ids = gallery.image_ids, gallery.text_ids
    retrieval_metrics(lists.i2t, scores[pairs.i2t], lists.t2i, scores[pairs.t2i], *ids)
    return 1024.0 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


@pytest.mark.slow
def test_bookkeeping_of_coco_needs_less_memory_than_one_dense_matrix():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:  # a peak of its own
        assert process.submit(coco_bookkeeping).result() < 0.75e9


# ---- bf16 -----------------------------------------------------------------------------------------------------------

IMAGE_IDS, TEXT_IDS = np.arange(12), np.arange(12).repeat(3)


def recall_of(lists, image_ids=IMAGE_IDS, text_ids=TEXT_IDS) -> dict[str, float]:
    return retrieval_metrics(lists.i2t, lists.i2t_value, lists.t2i, lists.t2i_value, image_ids, text_ids)


def test_bf16_recall_equals_float32_recall_only_with_the_recheck():
    same_without = 0
    for seed in range(8):
        torch.manual_seed(seed)
        model = tiny_model().eval()
        pixels, captions = torch.randn(12, 3, 32, 32), random_captions(36, longest=20)
        exact = rerank(model, [pixels], 12, captions, 12, 12)
        with precision(model, "bf16"):
            plain = rerank(model, [pixels], 12, captions, 12, 12)
            rechecked = rerank(model, [pixels], 12, captions, 12, 12, image_ids=IMAGE_IDS, text_ids=TEXT_IDS)
        for lists in (plain.itc, rechecked.itc):  # the encoders compute in float32
            np.testing.assert_array_equal(lists.i2t, exact.itc.i2t)
            np.testing.assert_array_equal(lists.t2i_value, exact.itc.t2i_value)
        assert not np.array_equal(plain.itm.i2t_value, exact.itm.i2t_value)
        assert recall_of(rechecked.itm) == recall_of(exact.itm), seed
        same_without += recall_of(plain.itm) == recall_of(exact.itm)
    assert same_without < 8


def test_ids_change_nothing_in_float32(monkeypatch):
    model = tiny_model().eval()
    pixels, captions = torch.randn(12, 3, 32, 32), random_captions(36)
    expected = rerank(model, [pixels], 12, captions, 5, 12)
    monkeypatch.setattr("retrieval.rerank.recheck_in_float32", None)
    got = rerank(model, [pixels], 12, captions, 5, 12, image_ids=IMAGE_IDS, text_ids=TEXT_IDS)
    np.testing.assert_array_equal(got.itm.i2t_value, expected.itm.i2t_value)


def drawn_direction(rng: np.random.Generator) -> tuple[np.ndarray, Queries]:
    """60 queries with 30 candidates each, every candidate a pair of its own; scores crowd around the right answers."""
    pair = np.arange(60 * 30).reshape(60, 30)
    right = np.zeros(pair.shape, dtype=bool)
    for row, count in zip(right, rng.integers(0, 4, 60), strict=True):
        row[rng.choice(30, count, replace=False)] = True
    return (0.05 * rng.standard_normal(pair.size)).astype(np.float32), Queries(pair, np.zeros_like(right, float), right)


def ranks_of(scores: np.ndarray, queries: Queries) -> np.ndarray:
    ids = np.where(queries.right, 0, 1).ravel()  # of candidates; queries have id 0
    return places(queries.pair, scores[queries.pair], np.zeros(len(queries.pair), int), ids)


@pytest.mark.parametrize("seed", range(20))
def test_rechecked_ranks_fall_on_the_same_side_of_every_cutoff(seed):
    rng = np.random.default_rng(seed)
    exact, queries = drawn_direction(rng)
    screened = exact + rng.uniform(-0.01, 0.01, exact.shape).astype(np.float32)
    asked = []

    def rescore(some: np.ndarray) -> np.ndarray:
        asked.extend(some.tolist())
        return exact[some]

    scores = recheck_in_float32(screened, [queries], rescore)
    expected = ranks_of(exact, queries)
    for k in KS:
        np.testing.assert_array_equal(ranks_of(scores, queries) < k, expected < k)
    assert any(((ranks_of(screened, queries) < k) != (expected < k)).any() for k in KS)
    assert len(set(asked)) == len(asked) < 0.7 * exact.size  # nothing twice, not everything
    assert set(queries.pair[queries.right]) <= set(asked)


def test_an_error_beyond_the_margin_widens_it(caplog):
    rng = np.random.default_rng(1)
    exact, queries = drawn_direction(rng)
    screened = exact + rng.uniform(-1e-3, 1e-3, exact.shape).astype(np.float32)
    far = rng.choice(exact.size, 200, replace=False)
    far = far[~queries.right.ravel()[far]]
    screened[far] += rng.choice([-0.02, 0.02], len(far)).astype(np.float32)
    with caplog.at_level(logging.INFO), pytest.MonkeyPatch.context() as patch:
        patch.setattr("retrieval.recheck.SAMPLE", 0)  # so that the first error measured is a small one
        scores = recheck_in_float32(screened, [queries], lambda some: exact[some])
    assert "exceeded by" in caplog.messages[-1] and "exceeded by 0 pairs" not in caplog.messages[-1]
    for k in KS:
        np.testing.assert_array_equal(ranks_of(scores, queries) < k, ranks_of(exact, queries) < k)


def test_open_pairs_by_hand():
    """One right answer (pair 0, score 0); of six wrong candidates some are surely ahead, some unsure."""
    assert KS == KS
    queries = Queries(np.arange(7)[None], np.zeros((1, 7)), np.arange(7)[None] == 0)
    known = np.arange(7) == 0

    def found(*wrong: float) -> list[int]:
        return np.flatnonzero(open_pairs(np.array([0.0, *wrong]), known, [queries], margin=0.1)).tolist()

    assert found(-1, -1, -1, 0.05, -0.05, -1) == [4, 5]  # place 0, 1 or 2: R@1 depends on it
    assert found(1, 1, -1, 0.05, -0.05, -1) == []  # rank 2, 3 or 4: R@1 missed, R@5 hit
    assert found(1, 1, 1, 0.05, -0.05, -1) == [4, 5]  # rank 3, 4 or 5
    assert found(1, 1, 1, 1, 1, 0.0) == []  # rank 5 or 6
    known[4] = True
    assert found(1, 1, 1, 0.0, -0.05, 1) == [5]  # a known tie may or may not be ahead, so 5 decides


@pytest.mark.parametrize(("block", "blocks"), [(113_442_816, 79), (151_257_088, 79), (151_257_088, 3), (900, 5)])
def test_pinned_memory_is_not_rounded_up(block, blocks):
    """torch takes the next power of two of each allocation; blocks of ViT-B, of ViT-L, and a few small ones."""

    def rounded(size: int) -> int:
        return 1 << (size - 1).bit_length()

    left, taken = blocks, 0
    while left:
        count = blocks_in_slab(block, left)
        taken += rounded(count * block)
        left -= count
    assert taken <= min(1.19 * block * blocks, rounded(block) * blocks)


def test_pinned_blocks_keep_what_they_were_given(monkeypatch):
    monkeypatch.setattr("retrieval.pinned.SLAB_BYTES", 1 << 9)
    given = [torch.randn(3, 4, 5) for _ in range(7)] + [torch.randn(2, 4, 5)]
    pinned = PinnedBlocks(len(given))
    for x, kept in zip(given, [pinned.take(x) for x in given], strict=True):
        assert torch.equal(kept, x)


@pytest.mark.parametrize("before", [True, False])
def test_cudnns_attention_is_off_whatever_computes(before):
    torch.backends.cuda.enable_cudnn_sdp(before)
    try:
        with precision(tiny_model(), "bf16"):
            assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
