"""The CUDA path, rehearsed on the CPU (`tests/rehearsal.py` says what that does not show): same bits, and few waits."""

import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import train_retrieval
from checkpoints.runs import RunState
from configs.schema import load_config
from models.arrangements import on_device
from retrieval.rerank import rerank
from retrieval.scoring import score_pairs
from tests.conftest import random_captions, tiny_med, tiny_model
from tests.rehearsal import CUDA, Ledger, OnCuda, Wait, rehearsal
from training import loop
from training.dry_run import synthetic_batch
from training.monitor import EpochMonitor, RunClock, TrainingWarnings
from training.schedule import build_optimizer
from utils import precision

CPU = torch.device("cpu")


def lines(waits: list[Wait]) -> str:
    return "\n".join(f"{wait.place}: {wait.what}" for wait in waits)


# ---- the rehearsal itself -------------------------------------------------------------------------------------------


def test_a_mix_raises_and_every_wait_is_noted():
    with rehearsal() as ledger:
        x = torch.arange(4.0, device=CUDA)
        assert x.device == CUDA and x.is_cuda and isinstance(x + 1, OnCuda) and not ledger.waits
        for mix in (lambda: x + torch.ones(4), lambda: x[torch.tensor([1])], lambda: torch.cat([x, torch.ones(1)])):
            with pytest.raises(RuntimeError, match="meets tensors on cuda:0, at tests/test_rehearsal.py:"):
                mix()
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        assert not ledger.waits and (x * torch.tensor(2.0)).host.tolist() == [0, 2, 4, 6]
        pinned = torch.ones(4).pin_memory()
        free = (
            lambda: pinned.to(CUDA, non_blocking=True), lambda: x.copy_(pinned, non_blocking=True),
            lambda: pinned.copy_(x, non_blocking=True), lambda: on_device(CUDA, np.arange(3)), lambda: x[x.long()],
            lambda: torch.full((2,), 3.0, device="cuda"),
            lambda: torch.empty(4, pin_memory=True).copy_(x, non_blocking=True),
        )  # fmt: skip
        for work in free:
            work()
            assert not ledger.waits, lines(ledger.waits)
        waiting = (
            x.tolist, lambda: x[0].item(), lambda: bool(x[1]), lambda: x.cpu(), lambda: x.to("cpu", non_blocking=True),
            lambda: torch.ones(4).to(CUDA, non_blocking=True), lambda: pinned.to(CUDA),
            lambda: pinned.to(CUDA, torch.float64, non_blocking=True), lambda: torch.tensor([1.0], device=CUDA),
            lambda: x[x > 1], lambda: x.nonzero(), lambda: x.copy_(torch.ones(4)),
        )  # fmt: skip
        for number, work in enumerate(waiting, 1):
            work()
            assert len(ledger.waits) == number and ledger.waits[-1].place.startswith("tests/test_rehearsal.py:")


def test_an_event_is_waited_for_unless_the_host_has_waited_since():
    with rehearsal() as ledger:
        x, event = torch.zeros(2, device=CUDA), torch.cuda.Event()
        event.record()
        x.add_(1)
        x.sum().item()
        event.synchronize()
        assert len(ledger.waits) == 1
        event.record()
        event.synchronize()
        assert len(ledger.waits) == 1  # nothing was queued in between
        x.add_(1)
        event.record()
        event.synchronize()
        assert len(ledger.waits) == 2


def test_gradients_and_draws_are_the_cpus():
    weights, x = torch.randn(3, 5), torch.randn(4, 5)
    layer = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5))
    results = []
    for _ in range(2):
        layer[0].weight.data.copy_(weights)
        layer.zero_grad()
        torch.manual_seed(3)
        layer(x).square().sum().backward()
        results.append(layer[0].weight.grad.clone())
    with rehearsal():
        there = layer.to(CUDA)
        there.zero_grad()
        torch.manual_seed(3)
        there(x.to(CUDA)).square().sum().backward()
        assert isinstance(there[0].weight.grad, OnCuda) and isinstance(there[0].weight, nn.Parameter)
        results.append(there[0].weight.grad.host)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# ---- training -------------------------------------------------------------------------------------------------------

STEPS = 2
CONFIG = {
    "precision": "fp32", "batch_size_train": 3, "alpha": 0.4, "init_lr": 1e-3, "weight_decay": 0.05, "log_every": 100,
    "temp_lr_scale": 1.0, "layer_decay": 1.0, "keep_graphs": "auto", "image_size": 32, "global_batch_size": 8,
    "ranks_emulated": 2, "random_negative_steps": 1,  # one step of each kind
}  # fmt: skip


def train_steps(device: torch.device, ledger: Ledger | None, **sizes) -> tuple[dict, dict, list[list[Wait]]]:
    """Two steps as in a run: the model's state, the means of the losses, and what each step has waited for."""
    torch.manual_seed(5)
    model = tiny_model(med_config=tiny_med(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1), **sizes)
    model = model.to(device).train()
    cfg = SimpleNamespace(**CONFIG)
    optimizer, state = build_optimizer(model, cfg), RunState()
    journal = SimpleNamespace(cfg=cfg, step=lambda *_: None)
    kept = loop.count_kept_graphs(model, cfg, optimizer)
    monitor = EpochMonitor(STEPS, 8, state, device, TrainingWarnings(STEPS), RunClock(STEPS, 1, 1.0), journal)
    batch = synthetic_batch(8, 32, 30524)
    if ledger:
        image, text, idx = batch.image.pin_memory(), batch.text.pin_memory(), batch.idx.pin_memory()
        batch = batch._replace(image=image, text=text, idx=idx)
    waits: list[list[Wait]] = []
    for step in range(STEPS):
        before = len(ledger.waits) if ledger else 0
        optimizer.zero_grad()
        report = loop.compute_gradients(model, batch, cfg, 1, range(2), kept, 0, step, STEPS)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        monitor.update(report, norm, model.temp.detach(), 1e-3, batch, stop=False)
        waits.append(ledger.waits[before:] if ledger else [])
    means = monitor.means()
    return model.state_dict(), means, waits


# negatives of all ranks are drawn at once, those of the own rank for each rank: a wait for each time
WAYS = {"COCO": ({"negative_all_rank": True}, 1), "Flickr30k": ({}, 2)}


@pytest.mark.parametrize(("way", "checkpointing"), [("COCO", False), ("COCO", True), ("Flickr30k", False)])
def test_a_training_step_is_the_cpus_bit_for_bit_and_waits_once(way, checkpointing):
    sizes, allowed = WAYS[way]
    sizes = {**sizes, "vit_grad_ckpt": checkpointing, "vit_ckpt_layer": 2}
    state, means, _ = train_steps(CPU, None, **sizes)
    with rehearsal() as ledger:
        there, means_there, waits = train_steps(CUDA, ledger, **sizes)
        for waited in waits:
            assert len(waited) <= allowed, lines(waited)
        assert means_there == means
    for name, value in state.items():
        assert torch.equal(there[name].host, value), name


# ---- evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pinned", "name"), [(False, "fp32"), (True, "fp32"), (True, "bf16")])
def test_evaluation_is_the_cpus_bit_for_bit_and_waits_a_few_times(monkeypatch, pinned, name):
    """However many passes there are; also where image tokens go to page-locked memory and come back."""
    model, captions = tiny_model().eval(), random_captions(30)
    pixels = torch.randn(9, 3, 32, 32)
    with precision(model, name):
        expected = rerank(model, pixels.split(4), 9, captions, 5, 4, tokens_per_pass=40)
    kept = []
    monkeypatch.setattr("retrieval.rerank._fits", lambda *_: not pinned)
    monkeypatch.setattr("retrieval.rerank.score_pairs", lambda *args: kept.append(args[1]) or score_pairs(*args))
    with rehearsal() as ledger, precision(model, name):
        there, blocks = model.to(CUDA), [block.pin_memory() for block in pixels.split(4)]
        del ledger.waits[:]
        got = rerank(there, blocks, 9, captions, 5, 4, tokens_per_pass=40)
        assert [ledger.is_pinned(tokens) for tokens in kept[0].tokens] == [pinned] * 3
    for ours, cpus in ((got.itm, expected.itm), (got.itc, expected.itc)):
        for field in ("i2t", "i2t_value", "t2i", "t2i_value"):
            np.testing.assert_array_equal(getattr(ours, field), getattr(cpus, field))
    assert len(ledger.waits) <= 5 + pinned, lines(ledger.waits)  # indices and values both ways, scores


# ---- the program ----------------------------------------------------------------------------------------------------


def run(folder, out: str, device: str, *args: str) -> int:
    argv = ["--config", str(folder / "config.yaml"), "--output_dir", str(folder / out), "--device", device]
    return train_retrieval.main([*argv, *args])


def rows(path) -> list[dict]:
    """Without what tells where and when."""
    own = ("time", "device", "images_per_second", "memory_mb", "checkpoint")
    return [{k: v for k, v in json.loads(row).items() if k not in own} for row in path.read_text().splitlines()]


def test_the_program_trains_stops_resumes_and_evaluates_as_on_the_cpu(tiny_run, monkeypatch):
    with open(tiny_run / "config.yaml", "a") as file:
        file.write("precision: fp32\neval_precision: fp32\nlog_every: 1\n")
    original, steps = loop.compute_gradients, []

    def stop_at_the_fourth(*args):
        steps.append(len(ledger.waits))
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    assert run(tiny_run, "cpu", "cpu") == 0
    assert run(tiny_run, "cpu", "cpu", "--evaluate") == 0
    with rehearsal() as ledger, monkeypatch.context() as patch:
        patch.setattr(loop, "compute_gradients", stop_at_the_fourth)
        assert run(tiny_run, "gpu", "cuda") == 75
        assert run(tiny_run, "gpu", "cuda", "--resume", "auto") == 0
        assert run(tiny_run, "gpu", "cuda", "--evaluate") == 0
    assert load_config(tiny_run / "gpu" / "config.yaml").precision == "fp32"
    for name in ("log.txt", "steps.jsonl", "evaluate.txt"):
        assert rows(tiny_run / "gpu" / name) == rows(tiny_run / "cpu" / name), name


@pytest.mark.slow
def test_the_dry_run_searches_the_largest_micro_batch(tiny_run, capsys):
    with rehearsal():
        assert run(tiny_run, "gpu", "cuda", "--dry_run") == 0
    out = capsys.readouterr().out
    assert "px, tf32, torch" in out and "largest batch_size_train that fits: 8 (of 8 samples a step)" in out
