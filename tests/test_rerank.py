"""Re-ranking against the straightforward per-query loop: same scores, whatever the sizes, passes and blocks."""

import numpy as np
import pytest
import torch

from benchmarks.published import published_matrices
from models.rerank import _passes, needed_pairs, rerank, score_matrices, shortlist
from tests.conftest import random_captions, tiny_med, tiny_model
from transform.text import tokenize

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
    lists = shortlist(torch.eye(3), torch.eye(4, 3), 2)
    codes = needed_pairs(lists)
    wanted = {(i, t) for i, row in enumerate(lists.i2t) for t in row} | {
        (i, t) for t, row in enumerate(lists.t2i) for i in row
    }
    assert codes.tolist() == sorted(int(i) * 4 + int(t) for i, t in wanted)


def test_passes_cover_everything_and_hold_the_bound():
    lengths = np.random.default_rng(0).integers(2, 36, 1000)
    passes = list(_passes(lengths, 500))
    assert [i for part in passes for i in range(part.start, part.stop)] == list(range(1000))
    assert max(lengths[part].sum() for part in passes) <= 500 + 35
    assert list(_passes(np.array([], dtype=int), 500)) == []


def test_shortlists_are_the_best_cosines_in_chunks(monkeypatch):
    monkeypatch.setattr("models.rerank.SIMILARITY_CHUNK", 40)
    image, text = torch.randn(9, 5), torch.randn(13, 5)
    lists = shortlist(image, text, 4)
    expected = (image @ text.T).topk(4, dim=1)
    np.testing.assert_array_equal(lists.i2t, expected.indices)
    np.testing.assert_allclose(lists.i2t_value, expected.values, rtol=1e-6)
    np.testing.assert_array_equal(lists.t2i, (text @ image.T).topk(4, dim=1).indices)
