"""What a GPU must show: the published code's numbers, equal gradients for any micro-batch, and a run that is killed.

`make gpu-report` runs these on the card; else they run on the CPU, so that they stay what they are. TOLERANCES are
relative for losses and gradient norms, absolute for scores: float32's are those of `test_golden.py`, TF32's and
bfloat16's follow from products of 10 and 7 bits through the recorded models' few layers.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from benchmarks.bench_evaluate import plant_gallery
from checkpoints.runs import find_runs
from retrieval.metrics import retrieval_metrics
from retrieval.rerank import rerank, score_matrices
from tests.conftest import random_captions, tiny_model
from tests.golden import (
    PARAM_ATOL,
    QUEUE_ATOL,
    Golden,
    argmax_instead_of_sampling,
    gradient_deviation,
    losses_by_rank,
    state_deviation,
)
from tests.golden_inputs import images
from tests.test_golden import RUNS, adamw
from tests.test_resume import SABOTAGE
from tests.test_train import ROOT
from training.step import train_step
from transform.text import tokenize
from utils import precision

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cpu"))
TOLERANCES = {"fp32": (2e-5, 1e-4, 1e-4), "tf32": (5e-3, 5e-2, 3e-2), "bf16": (3e-2, 2e-1, 2e-1)}  # loss, grad, score


@contextmanager
def on_the_cpu(model):
    """For comparisons with recorded sums."""
    model.cpu()
    yield model
    model.to(DEVICE)


@pytest.mark.parametrize("name", TOLERANCES)
@pytest.mark.parametrize("run", RUNS if DEVICE.type == "cuda" else RUNS[-1:])  # test_golden.py has the CPU's
def test_training_gives_the_published_numbers(monkeypatch, run, name):
    """Negatives are the likeliest ones, which rounding may exchange: lower precisions are held to the first step."""
    argmax_instead_of_sampling(monkeypatch)
    golden, (loss_rtol, grad_rtol, _) = Golden(run), TOLERANCES[name]
    model = golden.model().train().to(DEVICE)
    optimizer = adamw(model)
    for step in range(golden.meta["steps"] if name == "fp32" else 1):
        optimizer.zero_grad()
        image, captions, idx, alpha = golden.batch(step)
        with precision(model, name):
            batch = image.to(DEVICE), tokenize(captions), idx.to(DEVICE), alpha
            report = train_step(model, *batch, golden.meta["world"], 3)
        losses = losses_by_rank(report).squeeze(0).cpu().numpy()
        np.testing.assert_allclose(losses, golden.data[f"loss_{step}"], rtol=loss_rtol)
        if step == 0:
            with on_the_cpu(model):
                assert gradient_deviation(model, golden) < grad_rtol
        optimizer.step()
    if name == "fp32":
        with on_the_cpu(model):
            params, queues = state_deviation(model, golden)
        assert params < PARAM_ATOL and queues < QUEUE_ATOL


@pytest.mark.parametrize("name", TOLERANCES)
def test_scores_are_the_published_ones(name):
    golden = Golden("evaluate")
    meta, captions = golden.meta, [str(caption) for caption in golden.data["captions"]]
    model = golden.model().eval().to(DEVICE)
    pixels = images("evaluate/im", meta["n_images"], meta["image_size"], meta["seed"])
    with precision(model, name):
        matrices = [m.numpy() for m in score_matrices(model, pixels, captions, meta["k_test"])]
    for ours, theirs in zip(matrices, (golden.data["i2t"], golden.data["t2i"]), strict=True):
        both = (ours != -100) & (theirs != -100)  # rounding may exchange the last of a shortlist
        assert both.sum() >= (1 if name == "fp32" else 0.97) * (theirs != -100).sum()
        np.testing.assert_allclose(ours[both], theirs[both], atol=TOLERANCES[name][2])


def test_bfloat16_finds_what_float32_finds():
    gallery = plant_gallery(40, 160, 30524)
    model, pixels, captions = tiny_model().eval().to(DEVICE), torch.randn(40, 3, 32, 32), random_captions(160)
    found = []
    for name in ("fp32", "bf16"):
        with precision(model, name):
            ids = gallery.image_ids, gallery.text_ids
            ranking = rerank(model, pixels.split(16), 40, captions, 16, 16, 2000, *ids).itm
        found.append(retrieval_metrics(ranking.i2t, ranking.i2t_value, ranking.t2i, ranking.t2i_value, *ids))
    assert found[0] == found[1]


@pytest.mark.parametrize("everywhere", [True, False])
def test_any_micro_batch_gives_the_same_gradients(monkeypatch, everywhere):
    argmax_instead_of_sampling(monkeypatch)
    model = tiny_model(negative_all_rank=everywhere).to(DEVICE).eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    image, text = torch.randn(8, 3, 32, 32).to(DEVICE), tokenize(random_captions(8))
    grads = []
    for micro_batch, keep in ((8, 8), (3, 0), (1, 2)):
        model.load_state_dict(state)
        model.zero_grad()
        with precision(model, "fp32"):
            train_step(model, image, text, torch.arange(8, device=DEVICE), 0.4, 2, micro_batch, keep)
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    total = torch.stack([grad.norm() for grad in grads[0].values()]).norm()
    for other in grads[1:]:
        assert other.keys() == grads[0].keys()
        apart = torch.stack([(other[name] - grad).norm() for name, grad in grads[0].items()]).norm()
        assert apart < 1e-4 * total


def train(folder, out: str, sabotage: tuple[str, str] = ("SIGTERM", "1000")) -> int:
    (folder / "sabotage.py").write_text(SABOTAGE)
    argv = ["--config", folder / "config.yaml", "--output_dir", folder / out, "--device", DEVICE, "--resume", "auto"]
    script = [folder / "sabotage.py", *sabotage, folder / f"{out}_marker", "0", *argv]
    command = [str(word) for word in (sys.executable, *script, "--set", "save_every_steps=2", "log_every=1")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=300).returncode


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(tiny_run):
    assert train(tiny_run, "straight") == 0
    assert train(tiny_run, "killed", ("SIGKILL", "5")) == -signal.SIGKILL
    assert find_runs(tiny_run / "killed")
    assert train(tiny_run, "killed") == 0
    runs = [(tiny_run / out / "steps.jsonl").read_text().splitlines() for out in ("straight", "killed")]
    straight, killed = ([json.loads(line) for line in lines] for lines in runs)
    assert [row["step"] for row in straight] == [row["step"] for row in killed] == list(range(1, 7))
    for key in ("loss_ita", "loss_itm", "grad_norm"):
        expected = [row[key] for row in straight]
        rtol = 0 if DEVICE.type == "cpu" else 1e-2  # CUDA adds in any order
        np.testing.assert_allclose([row[key] for row in killed], expected, rtol=rtol)
