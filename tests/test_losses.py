"""Contrast and matching as pure functions: targets by hand, sampling against torch.multinomial, the order of pairs."""

import pytest
import torch
from torch.nn import functional as F

from models import itc, itm


def test_captions_of_one_image_share_the_target():
    idx, queue = torch.tensor([7, 3]), torch.tensor([[7, itc.EMPTY, 3, 7]])
    own = torch.tensor([[7, 3], [7, 3]])
    expected = [[1 / 3, 0, 1 / 3, 0, 0, 1 / 3], [0, 1 / 2, 0, 0, 1 / 2, 0]]
    torch.testing.assert_close(itc.positives(idx, own, queue), torch.tensor(expected))


def test_soft_targets_and_loss_equal_the_formula():
    feat, own, queue = torch.randn(2, 8), torch.randn(3, 8), torch.randn(8, 5)
    sim = itc.similarities(feat, own.expand(2, 3, 8), queue)
    torch.testing.assert_close(sim, feat @ torch.cat([own.T, queue], dim=1))
    positive = F.one_hot(torch.tensor([0, 4]), 8).float()
    temp = torch.tensor(0.07)
    targets = itc.soft_targets(sim, positive, temp, alpha=0.4)
    torch.testing.assert_close(targets, 0.4 * (sim / temp).softmax(1) + 0.6 * positive)
    torch.testing.assert_close(
        itc.soft_cross_entropy(sim, positive), F.cross_entropy(sim, torch.tensor([0, 4]), reduction="none")
    )


def test_negative_is_never_the_same_image_even_where_softmax_underflows():
    feat = F.normalize(torch.randn(6, 16), dim=1)
    idx = torch.tensor([0, 0, 1, 2, 1, 3])
    for temp in (0.001, 0.07):
        for _ in range(50):
            drawn, found = itm.sample_negatives(feat, feat, idx, idx, torch.tensor(temp), None)
            assert found.all() and (idx[drawn] != idx).all()


def test_rows_without_a_negative_are_reported():
    feat, idx = torch.randn(3, 4), torch.tensor([5, 5, 5])
    drawn, found = itm.sample_negatives(feat, feat, idx, idx, torch.tensor(0.07), None)
    assert not found.any() and ((0 <= drawn) & (drawn < 3)).all()


def test_draws_follow_the_masked_softmax():
    torch.manual_seed(0)
    feat, idx, temp = F.normalize(torch.randn(5, 8), dim=1), torch.tensor([0, 1, 1, 2, 3]), torch.tensor(0.3)
    weights = F.softmax(feat @ feat.T / temp, dim=1).masked_fill(idx[:, None] == idx, 0)
    rows = 40000
    drawn, _ = itm.sample_negatives(feat[1].expand(rows, 8), feat, idx[1].expand(rows), idx, temp, None)
    observed = torch.bincount(drawn, minlength=5) / rows
    torch.testing.assert_close(observed, weights[1] / weights[1].sum(), atol=0.01, rtol=0)


def test_an_infinite_temperature_draws_all_others_equally():
    torch.manual_seed(0)
    feat, idx, rows = F.normalize(torch.randn(5, 8), dim=1), torch.tensor([0, 1, 1, 2, 3]), 40000
    drawn, found = itm.sample_negatives(feat[1].expand(rows, 8), feat, idx[1].expand(rows), idx, torch.inf, None)
    observed = torch.bincount(drawn, minlength=5) / rows
    torch.testing.assert_close(observed, torch.tensor([1, 0, 0, 1, 1]) / 3, atol=0.01, rtol=0)
    assert found.all()


def test_generator_decides_the_draw():
    feat, idx, temp = torch.randn(64, 8), torch.arange(64), torch.tensor(1.0)
    draws = [itm.sample_negatives(feat, feat, idx, idx, temp, torch.Generator().manual_seed(s))[0] for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("size", [1, 2, 5])
def test_pairs_by_image_are_the_published_triples(size):
    negative_image, negative_text = [3, 3, 0, 1, 3], [1, 4, 4, 0, 2]
    pairs = []
    for first in range(0, 5, size):
        part = itm.pairs_by_image(first, min(first + size, 5), negative_image, negative_text)
        pairs += zip([first + i for i in part.image], part.text, part.label, part.owner, strict=True)
    expected = [(i, i, 1, i) for i in range(5)]
    expected += [(i, negative_text[i], 0, i) for i in range(5)] + [(negative_image[t], t, 0, t) for t in range(5)]
    assert sorted(pairs) == sorted(expected)
