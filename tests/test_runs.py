"""Saves of a run: exact restoring, what a changed config does, and faults: kill, full disk, damaged files."""

import errno
import logging
import multiprocessing
import os
import resource
import signal
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from checkpoints import runs
from checkpoints.files import DamagedFile
from checkpoints.load import load_pretrained
from checkpoints.runs import RunState, find_runs, load_run, resume, save_checkpoint, save_run
from configs.schema import RetrievalConfig
from models.blip_retrieval import BLIP_Retrieval
from tests.conftest import tiny_med, tiny_model
from training.step import train_step
from transform.text import TokenizedText

CONFIG = asdict(RetrievalConfig(dataset="scenes", vit="nano", image_size=32, global_batch_size=4, ranks_emulated=1))
Pair = tuple[BLIP_Retrieval, torch.optim.Optimizer]
fork = multiprocessing.get_context("fork")


def small(seed: int = 0, **overrides) -> Pair:
    torch.manual_seed(seed)
    med = tiny_med(vocab_size=30524, max_position_embeddings=40, hidden_size=16, num_hidden_layers=1)
    model = tiny_model(**{"med_config": med, "queue_size": 12, **overrides})
    rest = [p for p in model.parameters() if p.requires_grad and p is not model.temp]
    return model, torch.optim.AdamW([{"params": rest}, {"params": [model.temp]}], lr=1e-3, weight_decay=0.05)


def train(model: BLIP_Retrieval, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Steps whose every draw is a function of their number."""
    for step in range(first, last):
        g = torch.Generator().manual_seed(step)
        ids = torch.randint(200, 300, (4, 5), generator=g)
        image, text = torch.randn(4, 3, 32, 32, generator=g), TokenizedText(ids, torch.ones_like(ids))
        optimizer.zero_grad()
        train_step(model, image, text, torch.arange(4) + 4 * step, 0.4, generators=[g])
        optimizer.step()


def assert_same(a: Pair, b: Pair) -> None:
    for key, value in a[0].state_dict().items():
        assert torch.equal(value, b[0].state_dict()[key]), key
    mine, theirs = a[1].state_dict()["state"], b[1].state_dict()["state"]
    assert mine.keys() == theirs.keys()
    for i in mine:
        assert all(torch.equal(mine[i][key], theirs[i][key]) for key in mine[i])


# ---- exact continuation ---------------------------------------------------------------------------------------------


def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    straight = small()
    train(*straight, 0, 5)
    first = small()
    train(*first, 0, 3)
    state = RunState(epoch=1, step=3, best=41.5, best_epoch=0, meters={"loss": [0.5, 3], "lr": 1e-5})
    save_run(tmp_path, *first, CONFIG, state, keep_last=2)
    second = small(seed=9)
    assert resume("auto", tmp_path, *second, CONFIG) == state
    assert_same(first, second)
    assert second[0].ptr_queue == first[0].ptr_queue == 0 and (second[0].idx_queue >= 0).all()
    train(*second, 3, 5)
    assert_same(straight, second)


def test_resumed_optimizer_does_not_hold_the_file(tmp_path):
    first, second = small(), small(seed=1)
    train(*first, 0, 1)
    path = save_run(tmp_path, *first, CONFIG, RunState(), keep_last=1)
    load_run(path, *second, CONFIG)
    path.write_bytes(bytes(path.stat().st_size))
    assert_same(first, second)


def test_learning_rate_is_restored_and_other_options_follow_the_config(tmp_path, caplog):
    first, second = small(), small()
    train(*first, 0, 1)
    first[1].param_groups[1]["lr"] = 0.25
    path = save_run(tmp_path, *first, CONFIG, RunState(), keep_last=1)
    second[1].param_groups[0]["weight_decay"] = 0.01
    load_run(path, *second, CONFIG | {"weight_decay": 0.01})
    assert [group["lr"] for group in second[1].param_groups] == [1e-3, 0.25]
    assert [group["weight_decay"] for group in second[1].param_groups] == [0.01, 0.05]
    assert "weight_decay is 0.01, was 0.05" in caplog.text


def test_save_of_a_run_is_also_a_pretrained_checkpoint(tmp_path):
    first, model = small(), small(seed=1)[0]
    report = load_pretrained(model, str(save_run(tmp_path, *first, CONFIG, RunState(), keep_last=1)))
    assert torch.equal(model.vision_proj.weight, first[0].vision_proj.weight) and "run" in report.kind
    assert not torch.equal(model.image_queue, first[0].image_queue)


def test_official_layout(tmp_path):
    save_checkpoint(tmp_path / "new" / "checkpoint_best.pth", *small(), CONFIG, 4, val_r_mean=33.3)
    data = torch.load(tmp_path / "new" / "checkpoint_best.pth", weights_only=True)
    assert list(data) == ["model", "optimizer", "config", "epoch", "text_config", "code", "val_r_mean", "tokenizer"]
    assert data["config"] == CONFIG and data["epoch"] == 4 and os.listdir(tmp_path / "new") == ["checkpoint_best.pth"]


def test_objects_that_could_not_be_read_back_are_not_saved(tmp_path):
    with pytest.raises(TypeError, match=r"checkpoint\['run'\]\['meters'\]\['path'\] is a PosixPath"):
        save_run(tmp_path, *small(), CONFIG, RunState(meters={"path": tmp_path}), keep_last=1)
    assert find_runs(tmp_path) == []


# ---- which file -----------------------------------------------------------------------------------------------------


def test_keep_last_and_order(tmp_path):
    pair = small()
    (tmp_path / "checkpoint_best.pth").write_text("not a save of a run")
    for epoch, step in [(0, 9), (0, 10), (1, 0), (9, 5), (10, 0), (1000, 0)]:
        path = save_run(tmp_path, *pair, CONFIG, RunState(epoch=epoch, step=step), keep_last=3)
    assert path.name == "checkpoint_e1000_s000000.pth"
    assert [p.name for p in find_runs(tmp_path)] == [
        "checkpoint_e1000_s000000.pth", "checkpoint_e010_s000000.pth", "checkpoint_e009_s000005.pth"
    ]  # fmt: skip
    assert (tmp_path / "checkpoint_best.pth").exists()


def test_resuming_an_earlier_save_sets_the_later_ones_aside(tmp_path, caplog):
    pair = small()
    for step in (1, 2, 3):
        save_run(tmp_path, *pair, CONFIG, RunState(step=step), keep_last=5)
    state = resume(str(tmp_path / "checkpoint_e000_s000001.pth"), tmp_path, *pair, CONFIG)
    assert state.step == 1
    save_run(tmp_path, *pair, CONFIG, RunState(step=2), keep_last=1)
    assert [p.name for p in find_runs(tmp_path)] == ["checkpoint_e000_s000002.pth"]
    assert (tmp_path / "checkpoint_e000_s000003.pth.aside").exists() and "ahead of this run" in caplog.text


def test_nothing_to_resume(tmp_path):
    assert resume("auto", tmp_path / "new", *small(), CONFIG) is None
    with pytest.raises(ValueError, match="no such file"):
        resume(str(tmp_path / "a.pth"), tmp_path, *small(), CONFIG)


def test_weights_alone_are_no_run(tmp_path):
    save_checkpoint(tmp_path / "best.pth", *small(), CONFIG, 0)
    with pytest.raises(ValueError, match="lacks run.*`pretrained`"):
        resume(str(tmp_path / "best.pth"), tmp_path, *small(), CONFIG)


# ---- a changed config -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "new"), [
    ("dataset", "coco"), ("vit", "tiny"), ("patch_size", 8), ("image_size", 48), ("embed_dim", 64),
    ("queue_size", 24), ("global_batch_size", 8), ("ranks_emulated", 2),
])  # fmt: skip
def test_another_experiment_is_refused_with_old_and_new(tmp_path, key, new):
    save_run(tmp_path, *small(), CONFIG, RunState(), keep_last=1)
    other = small(seed=1)
    before = other[0].vision_proj.weight.clone()
    with pytest.raises(ValueError) as error:
        resume("auto", tmp_path, *other, CONFIG | {key: new})
    assert f"{key} is {new!r}, was {CONFIG[key]!r}" in str(error.value)
    assert torch.equal(other[0].vision_proj.weight, before)


def test_another_text_encoder_is_refused_but_dropout_may_change(tmp_path, caplog):
    med = {"vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 1}
    save_run(tmp_path, *small(med_config=tiny_med(**med)), CONFIG, RunState(), keep_last=1)
    with pytest.raises(ValueError, match="med_config's num_attention_heads is 2, was 4"):
        resume("auto", tmp_path, *small(med_config=tiny_med(num_attention_heads=2, **med)), CONFIG)
    assert resume("auto", tmp_path, *small(med_config=tiny_med(**med | {"hidden_dropout_prob": 0.3})), CONFIG)
    assert "med_config's hidden_dropout_prob is 0.3, was 0.0" in caplog.text


def test_other_changes_are_logged_and_training_goes_on(tmp_path, caplog):
    saved = {key: value for key, value in CONFIG.items() if key != "rerank_tokens"} | {"gone": 1}
    save_run(tmp_path, *small(), saved, RunState(step=7), keep_last=1)
    state = resume("auto", tmp_path, *small(), CONFIG | {"max_epoch": 9, "init_lr": 3e-5})
    assert state.step == 7
    for text in (
        "max_epoch is 9, was 6",
        "init_lr is 3e-05, was 1e-05",
        "gone is 'unset', was 1",
    ):
        assert text in caplog.text
    assert sum(record.levelno == logging.WARNING for record in caplog.records) == 3


def test_another_number_of_processes_is_logged(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(runs, "get_world_size", lambda: 2)
    save_run(tmp_path, *small(), CONFIG, RunState(), keep_last=1)
    monkeypatch.undo()
    with caplog.at_level(logging.INFO):
        assert resume("auto", tmp_path, *small(), CONFIG)
    assert "2 processes have saved this run, 1 resume it" in caplog.text


def test_optimizer_of_other_groups_is_refused(tmp_path):
    save_run(tmp_path, *small(), CONFIG, RunState(), keep_last=1)
    model, _ = small()
    with pytest.raises(ValueError, match="optimizer does not fit"):
        resume("auto", tmp_path, model, torch.optim.AdamW(model.parameters()), CONFIG)


def test_optimizer_of_another_order_is_refused(tmp_path):
    first = small()
    train(*first, 0, 1)
    save_run(tmp_path, *first, CONFIG, RunState(), keep_last=1)
    model, optimizer = small()
    optimizer.param_groups[0]["params"].reverse()
    with pytest.raises(ValueError, match="optimizer does not fit"):
        resume("auto", tmp_path, model, optimizer, CONFIG)


# ---- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "zeros", "pickle"])
def test_damaged_newest_save_falls_back_to_the_one_before(tmp_path, caplog, damage):
    pair = small()
    for step in (1, 2):
        path = save_run(tmp_path, *pair, CONFIG, RunState(step=step), keep_last=3)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[-1000:]
    elif damage == "empty":
        content.clear()
    elif damage == "bit":  # in a tensor: unpickling alone does not notice
        content[len(content) // 2] ^= 4
    elif damage == "zeros":
        content[:] = bytes(len(content))
    else:  # in the pickled structure
        content[content.index(b"optimizer")] ^= 0xFF
    path.write_bytes(content)
    assert resume("auto", tmp_path, *small(seed=1), CONFIG).step == 1
    assert path.name in caplog.text and "Falling back" in caplog.text
    with pytest.raises(DamagedFile, match=path.name):  # named itself, it is an error
        resume(str(path), tmp_path, *pair, CONFIG)
    save_run(tmp_path, *pair, CONFIG, RunState(step=2), keep_last=3)
    assert resume("auto", tmp_path, *small(seed=1), CONFIG).step == 2


def test_damaged_save_ahead_never_pushes_out_readable_ones(tmp_path):
    pair = small()
    for step in (10, 20):
        path = save_run(tmp_path, *pair, CONFIG, RunState(step=step), keep_last=2)
    path.write_bytes(b"")
    assert resume("auto", tmp_path, *pair, CONFIG).step == 10
    save_run(tmp_path, *pair, CONFIG, RunState(step=15), keep_last=1)
    assert [p.name for p in find_runs(tmp_path)] == ["checkpoint_e000_s000015.pth"]
    assert resume("auto", tmp_path, *pair, CONFIG).step == 15


def test_only_damaged_saves_are_an_error_not_a_fresh_start(tmp_path):
    path = save_run(tmp_path, *small(), CONFIG, RunState(), keep_last=1)
    path.write_bytes(b"PK")
    model = small(seed=1)
    before = model[0].vision_proj.weight.clone()
    with pytest.raises(ValueError, match="none of 1 saves can be read"):
        resume("auto", tmp_path, *model, CONFIG)
    assert torch.equal(model[0].vision_proj.weight, before)


def fail(function: str, error: Exception, monkeypatch) -> None:
    def raise_error(*args, **kwargs):
        if function == "torch.save":
            Path(args[1]).write_bytes(b"half")
        raise error

    monkeypatch.setattr(function, raise_error)


@pytest.mark.parametrize(("function", "error"), [
    ("torch.save", OSError(errno.ENOSPC, "No space left on device")),
    ("torch.save", RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")),
    ("os.fsync", OSError(errno.EIO, "Input/output error")),
    ("os.replace", OSError(errno.EDQUOT, "Disk quota exceeded")),
    ("torch.save", KeyboardInterrupt()),
])  # fmt: skip
def test_failing_disk_leaves_the_previous_save_and_no_litter(tmp_path, monkeypatch, function, error):
    pair = small()
    train(*pair, 0, 1)
    path = save_run(tmp_path, *pair, CONFIG, RunState(step=1), keep_last=1)
    content = path.read_bytes()
    for step in (1, 2):  # over the same name, and beside it
        with monkeypatch.context() as patch:
            fail(function, error, patch)
            with pytest.raises((OSError, KeyboardInterrupt)):
                save_run(tmp_path, *pair, CONFIG, RunState(step=step), keep_last=1)
        assert os.listdir(tmp_path) == [path.name] and path.read_bytes() == content
    assert resume("auto", tmp_path, *small(seed=1), CONFIG).step == 1


def test_disk_that_really_refuses_bytes(tmp_path):
    """The system's own limit on a file's size stands in for a full disk."""
    pair = small()
    path = save_run(tmp_path, *pair, CONFIG, RunState(step=1), keep_last=1)

    def child(queue):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2,) * 2)
        try:
            save_run(tmp_path, *pair, CONFIG, RunState(step=2), keep_last=1)
            queue.put("saved")
        except OSError as error:
            queue.put(str(error))

    queue = fork.SimpleQueue()
    process = fork.Process(target=child, args=(queue,))
    process.start()
    process.join(60)
    assert "checkpoint_e000_s000002.pth could not be saved" in queue.get()
    assert os.listdir(tmp_path) == [path.name]
    assert resume("auto", tmp_path, *small(seed=1), CONFIG).step == 1


def test_sigkill_while_the_file_is_half_written(tmp_path):
    pair = small()
    save_run(tmp_path, *pair, CONFIG, RunState(step=1), keep_last=1)
    half = fork.Event()

    def child():
        def slow_sync(path):
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])
            half.set()
            time.sleep(60)

        runs._sync = slow_sync
        save_run(tmp_path, *pair, CONFIG, RunState(step=2), keep_last=1)

    process = fork.Process(target=child)
    process.start()
    assert half.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_e000_s000001.pth", "checkpoint_e000_s000002.pth.part"]
    assert resume("auto", tmp_path, *small(seed=1), CONFIG).step == 1
    save_run(tmp_path, *pair, CONFIG, RunState(step=3), keep_last=1)
    assert os.listdir(tmp_path) == ["checkpoint_e000_s000003.pth"]  # the torn one's remains are gone


def test_sigkill_at_any_moment_loses_no_more_than_the_last_save(tmp_path):
    pair = small()

    def child(start, done):
        for step in range(start, 1000):
            save_run(tmp_path, *pair, CONFIG, RunState(step=step), keep_last=2)
            done.value = step

    step = 0
    for attempt in range(6):
        done = fork.Value("i", 0)
        process = fork.Process(target=child, args=(step + 1, done))
        process.start()
        while not done.value and process.is_alive():
            time.sleep(0.001)
        time.sleep(0.013 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        step = resume("auto", tmp_path, *small(seed=1), CONFIG).step
        assert step in (done.value, done.value + 1)  # + 1: killed between its rename and its report
        assert len(find_runs(tmp_path)) <= 3
