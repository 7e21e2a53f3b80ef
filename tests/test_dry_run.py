"""What a run costs before it starts, and what this machine allows: kept graphs and compiled encoders."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from configs.sizes import VitSize
from data.retrieval import TrainBatch
from models.arrangements import TrainingTexts
from models.itm import pairs_by_image
from tests.conftest import random_captions, tiny_med, tiny_model
from tests.golden import NOISE, argmax_instead_of_sampling
from training import dry_run as dry
from training import memory
from training.compilation import compile_encoders
from training.dry_run import DrySizes, dry_run, largest_that_fits, synthetic_batch, synthetic_captions
from training.memory import auto_keep_graphs, run_micro_batch, worst_pairs
from training.step import train_step
from transform.text import CLS, MAX_TOKENS, SEP, tokenize

SIZES = DrySizes(train_captions=803, val_images=20, val_captions=90)
CPU = torch.device("cpu")


def config(**changes) -> SimpleNamespace:
    values = {
        "global_batch_size": 8, "ranks_emulated": 2, "batch_size_train": 3, "image_size": 32, "compile": False,
        "precision": "fp32", "eval_precision": "fp32", "alpha": 0.4, "keep_graphs": "auto", "vit": "nano",
        "init_lr": 1e-5, "weight_decay": 0.05, "temp_lr_scale": 1.0, "batch_size_test": 4, "rerank_tokens": 500,
        "k_test": 6, "max_epoch": 3, "layer_decay": 1.0, "eval_before": True,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def number(lines: list[str], pattern: str) -> float:
    found = [m for line in lines if (m := re.search(pattern, line))]
    assert len(found) == 1, (pattern, lines)
    return float(found[0][1])


def loaded_batch() -> TrainBatch:
    image = torch.randn(8, 3, 32, 32)
    fields = {"image": image, "text": tokenize(random_captions(8)), "idx": torch.arange(8), "names": ["x.jpg"] * 8}
    return TrainBatch(**fields, **{name: 0 for name in TrainBatch._fields if name not in fields})


def test_the_report_adds_up():
    lines = dry_run(tiny_model(), config(), SIZES, loaded_batch(), CPU)
    step = number(lines, r"([\d.]+) images/s.*image graphs kept")
    epoch = number(lines, r"an epoch: (\S+) h, 100 steps of 8 from 803 captions")
    assert epoch == pytest.approx(800 / step / 3600, rel=0.02)
    evaluation = number(lines, r"an evaluation: (\S+) h for 20 images and 90 captions")
    assert number(lines, r"at most (\d+) pairs") == 20 * 6 + 90 * 6
    assert number(lines, r"the run: (\S+) h, 3 epochs and 5") == pytest.approx(3 * epoch + 5 * evaluation, rel=0.02)
    assert number(lines, r"(\d+) of 8 image graphs kept") == 8
    assert number(lines, r"peak memory: ([\d.]+) GB") > 0


def test_a_slow_machine_times_fewer_samples(monkeypatch):
    monkeypatch.setattr(dry, "CPU_SECONDS", 0.0)
    cfg = config(keep_graphs=2, precision="bf16", eval_before=False)
    lines = dry_run(tiny_model(), cfg, SIZES, loaded_batch(), CPU)
    assert number(lines, r"3 epochs and (\d+) evaluations") == 4
    assert number(lines, r"from (\d+) samples a step; micro-batches of 3, 3 of 8") == 2


@pytest.mark.parametrize(
    ("limit", "start", "most", "found"),
    [
        (200, 32, 256, 128),
        (300, 32, 256, 256),
        (33, 32, 256, 32),
        (9, 32, 256, 8),
        (1, 5, 8, 1),
        (0, 4, 8, 0),
        (300, 32, 96, 96),
    ],  # fmt: skip
)
def test_search_for_the_largest_micro_batch(limit, start, most, found):
    assert largest_that_fits(lambda size: size <= limit, start, most) == found


FULL = (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"))
BROKEN = RuntimeError("CUDA error: unspecified launch failure")


@pytest.mark.parametrize("error", [*FULL, BROKEN])
def test_the_search_goes_on_after_any_kind_of_full_memory(monkeypatch, error):
    """On a device that has room for micro-batches of 5 with the pairs of a step in which all texts draw one image."""
    probed = []

    def probe(model, image_size, size, pool):
        probed.append((size, pool))
        if size > 5:
            raise error

    monkeypatch.setattr(dry, "run_micro_batch", probe)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(dry.Trial, "gradients", lambda *_: None)
    trial = dry.Trial(tiny_model(), config(), loaded_batch(), SimpleNamespace(step=lambda: None), torch.device("cuda"))
    if error is BROKEN:
        with pytest.raises(RuntimeError, match="launch failure"):
            dry.fitting_micro_batch(trial, 8)
        return
    assert dry.fitting_micro_batch(trial, 8) == (3, "largest batch_size_train that fits: 3 (of 8 samples a step)")
    assert probed == [(3, 4), (6, 4)]  # 4 samples a rank, and negatives of the own rank


def test_synthetic_captions_are_as_long_as_cocos():
    ids, mask = synthetic_captions(20000, 30524)
    lengths = mask.sum(1)
    assert lengths.float().mean() == pytest.approx(13.03, abs=0.1) and lengths.min() >= 8
    assert ids.shape == (20000, MAX_TOKENS) and (ids[:, 0] == CLS).all() and not ids[~mask.bool()].any()
    assert (ids.gather(1, lengths[:, None] - 1) == SEP).all()
    assert (sum(dry.CAPTION_LENGTHS), len(dry.CAPTION_LENGTHS)) == (25000, 28)


def test_kept_graphs_follow_the_memory(monkeypatch):
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    assert auto_keep_graphs(model, 32, 4, 12, optimizer, 12) == 12
    monkeypatch.setattr("training.memory._host_memory", lambda: 0)
    assert auto_keep_graphs(model, 32, 4, 12, optimizer, 12) == 4  # one micro-batch always
    from training.memory import _saved_bytes

    graph = _saved_bytes(model.train(), torch.randn(1, 3, 32, 32))
    monkeypatch.setattr("training.memory._host_memory", lambda: 2 * 7.5 * graph)
    state = torch.get_rng_state()
    assert auto_keep_graphs(model.eval(), 32, 4, 12, optimizer, 12) == 7
    assert torch.equal(torch.get_rng_state(), state) and not model.training  # measuring leaves no trace
    assert _saved_bytes(model.train(), torch.randn(2, 3, 32, 32)) == pytest.approx(2 * graph, rel=0.05)
    checkpointed = tiny_model(vit_grad_ckpt=True, vit_ckpt_layer=6).train()
    assert _saved_bytes(checkpointed, torch.randn(1, 3, 32, 32)) < graph / 3


@pytest.mark.parametrize(("size", "pool"), [(4, 12), (12, 60), (8, 8)])
def test_what_is_probed_is_the_worst_step(monkeypatch, size, pool):
    """No drawing of negatives gives a micro-batch more pairs, or the attention more rows, than what is probed."""

    def rows(image: list[int]) -> int:
        return TrainingTexts([MAX_TOKENS] * len(image), CPU, image, size).crowds[0].size

    worst, rng = worst_pairs(size, pool), np.random.default_rng(0)
    for skew in np.linspace(0, 8, 40):  # from even draws to all of one image
        share = np.exp(skew * rng.standard_normal(pool))
        image = rng.choice(pool, pool, p=share / share.sum())
        pairs = pairs_by_image(0, size, image.tolist(), rng.integers(pool, size=pool).tolist())
        assert len(pairs.image) <= len(worst) and rows(pairs.image) <= rows(worst)
    assert len(worst) == 2 * size + pool
    model = tiny_model().train()
    for name in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 7)
    assert run_micro_batch(model, 32, size, 2, pool) == (5, 5)
    assert all(p.grad is None for p in model.parameters())


def test_room_is_left_for_the_worst_step_or_one_micro_batch_is_kept(monkeypatch, caplog):
    """On a pretended GPU with 30 kB free, images whose graphs take 1 kB, and no moments that are still to come."""
    model = tiny_model(queue_size=1)
    optimizer = SimpleNamespace(param_groups=[])
    monkeypatch.setattr(memory, "free_gpu_memory", lambda device: 30_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    largest = 12

    def probe(model, image_size, size, before, pool):
        if pool > largest:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")
        return 1000 * size, 1000 * (size + pool)

    monkeypatch.setattr(memory, "run_micro_batch", probe)
    for pool, room in ((4, 23_000), (12, 15_000)):  # 27 kB without pixels (0), contrast (128 B) and the pool's kB
        graph, free = memory._measure_gpu(model, 0, 4, 12, optimizer, pool)
        assert graph == 1000 and free == room - 8 * 4 * 4
    assert not caplog.records
    _, free = memory._measure_gpu(model, 0, 4, 12, optimizer, 13)
    assert free < 0 and "not if all texts of a step draw its images" in caplog.text
    largest = 3
    with pytest.raises(ValueError, match="batch_size_train 4 does not fit into 0.0 GB"):
        memory._measure_gpu(model, 0, 4, 12, optimizer, 13)


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointing", "drop_path"), [(False, 0.0), (True, 0.0), (False, 0.5)])
def test_compiled_encoders_compute_the_same(monkeypatch, checkpointing, drop_path):
    argmax_instead_of_sampling(monkeypatch)
    monkeypatch.setitem(__import__("models.vit").vit.VIT_SIZES, "nano", VitSize(48, 2, 2, drop_path))
    sizes = {"vit_grad_ckpt": checkpointing, "vit_ckpt_layer": 1, "negative_all_rank": True}
    eager, compiled = (tiny_model(med_config=tiny_med(num_hidden_layers=2), **sizes).train() for _ in range(2))
    compiled.load_state_dict(eager.state_dict())
    compile_encoders(compiled)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    batch = synthetic_batch(6, 32, 30524)
    for model in (eager, compiled):
        torch.manual_seed(2)
        train_step(model, batch.image, batch.text, batch.idx, 0.3, ranks=2, micro_batch=2)
    for name, parameter in eager.named_parameters():
        if parameter.grad is not None and not name.endswith(NOISE):
            difference = (compiled.get_parameter(name).grad - parameter.grad).norm() / parameter.grad.norm()
            assert difference < 1e-4, f"{name}: {difference:.1e}"
