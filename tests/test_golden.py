"""The published code's own numbers: losses, gradients, parameters and queues after three steps, scores of a gallery."""

import json

import numpy as np
import pytest
import torch

from retrieval.metrics import retrieval_metrics
from retrieval.rerank import rerank, score_matrices
from tests.golden import (
    GRAD_RTOL,
    LOSS_RTOL,
    PARAM_ATOL,
    QUEUE_ATOL,
    Golden,
    argmax_instead_of_sampling,
    gradient_deviation,
    losses_by_rank,
    state_deviation,
)
from tests.golden_inputs import images
from training.step import train_step
from transform.text import tokenize

RUNS = ("train_one_rank", "train_two_ranks_all", "train_two_ranks_local")


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.05)


def check_run(golden: Golden, step_losses) -> None:
    """Three steps; step_losses(model, batch) leaves gradients and returns the losses by rank."""
    model = golden.model().train()
    optimizer = adamw(model)
    for step in range(golden.meta["steps"]):
        optimizer.zero_grad()
        losses = step_losses(model, golden.batch(step))
        np.testing.assert_allclose(losses, golden.data[f"loss_{step}"], rtol=LOSS_RTOL)
        if step == 0:
            assert gradient_deviation(model, golden) < GRAD_RTOL
        optimizer.step()
    params, queues = state_deviation(model, golden)
    assert params < PARAM_ATOL
    assert queues < QUEUE_ATOL
    np.testing.assert_allclose(model.temp.item(), golden.data["temp"], atol=1e-7)


def test_forward_reproduces_the_published_step(monkeypatch):
    argmax_instead_of_sampling(monkeypatch)

    def losses(model, batch):
        image, captions, idx, alpha = batch
        loss_ita, loss_itm = model(image, captions, alpha=alpha, idx=idx)
        (loss_ita + loss_itm).backward()
        return [loss_ita.item(), loss_itm.item()]

    check_run(Golden("train_one_rank"), losses)


@pytest.mark.parametrize("micro_batch", [1, 3, None])
@pytest.mark.parametrize("name", RUNS)
def test_one_process_reproduces_every_rank_of_the_published_step(monkeypatch, name, micro_batch):
    argmax_instead_of_sampling(monkeypatch)
    golden = Golden(name)

    def losses(model, batch):
        image, captions, idx, alpha = batch
        report = train_step(model, image, tokenize(captions), idx, alpha, golden.meta["world"], micro_batch)
        return losses_by_rank(report).squeeze(0).numpy()

    check_run(golden, losses)


def test_scores_and_metrics_of_a_gallery():
    golden = Golden("evaluate")
    meta, captions = golden.meta, [str(caption) for caption in golden.data["captions"]]
    model = golden.model().eval()
    pixels = images("evaluate/im", meta["n_images"], meta["image_size"], meta["seed"])
    matrices = [m.numpy() for m in score_matrices(model, pixels, captions, meta["k_test"])]
    for ours, theirs in zip(matrices, (golden.data["i2t"], golden.data["t2i"]), strict=True):
        np.testing.assert_array_equal(ours == -100, theirs == -100)
        np.testing.assert_allclose(ours, theirs, atol=1e-4)

    image_ids = np.arange(meta["n_images"])
    text_ids = image_ids.repeat(meta["captions_per_image"])
    published = json.loads(str(golden.data["metrics"]))
    assert published_recall(*matrices, text_ids) == pytest.approx(published)

    r = rerank(model, pixels.split(5), len(pixels), captions, meta["k_test"], batch_size=5).itm
    recall = retrieval_metrics(r.i2t, r.i2t_value, r.t2i, r.t2i_value, image_ids, text_ids)
    # k_test is 8 here, so the published R@10 counts two arbitrary candidates that were never scored.
    for key in ("txt_r1", "txt_r5", "img_r1", "img_r5"):
        assert recall[key] == pytest.approx(published[key])


def published_recall(i2t: np.ndarray, t2i: np.ndarray, text_ids: np.ndarray) -> dict[str, float]:
    """Recall as BLIP counts it: sort every dense row, look the right answers up."""
    stats = {}
    for prefix, scores, right in (("txt", i2t, np.arange(len(i2t))[:, None] == text_ids), ("img", t2i, None)):
        right = text_ids[:, None] == np.arange(len(i2t)) if right is None else right
        ranks = np.array(
            [np.flatnonzero(ok[np.argsort(row)[::-1]]).min() for row, ok in zip(scores, right, strict=True)]
        )
        stats |= {f"{prefix}_r{k}": 100 * np.mean(ranks < k) for k in (1, 5, 10)}
        stats[f"{prefix}_r_mean"] = np.mean([stats[f"{prefix}_r{k}"] for k in (1, 5, 10)])
    return {**stats, "r_mean": (stats["txt_r_mean"] + stats["img_r_mean"]) / 2}
