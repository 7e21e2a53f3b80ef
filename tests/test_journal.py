"""The record of a run: where numbers come from, rows of steps, the console file, TensorBoard, published numbers."""

import hashlib
import io
import json
import logging
import re
import time
from dataclasses import replace

import pytest

import utils
from checkpoints.download import RELEASED, RELEASES
from checkpoints.weights import weights_sha256
from configs.datasets import DATASETS
from configs.schema import RetrievalConfig
from models import load
from retrieval import published
from retrieval.provenance import rounded
from tests.test_resume import STEPS_PER_EPOCH, outcome, sabotaged
from tests.test_stop import SignalAt
from tests.test_train import lines, run
from training import journal, monitor

COLUMNS = """split checkpoint checkpoint_kind checkpoint_sha256 dataset seed precision eval_precision device processes
    code torch time""".split()
CLOCKS = ("images_per_second", "memory_mb")


def steps_of(folder) -> list[dict]:
    """Rows of steps.jsonl without what the machine decides."""
    rows = lines(folder / "steps.jsonl")
    assert all(row[key] > 0 for row in rows for key in CLOCKS)
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows]


# ---------------------------------------------------------------- rows


def test_every_row_says_where_its_numbers_come_from(tiny_run):
    assert run(tiny_run) == 0
    best = tiny_run / "out" / "checkpoint_best.pth"
    for _ in range(2):
        assert run(tiny_run, "--evaluate", "--set", f"finetuned={best}") == 0
    rows, evaluated = (
        [json.loads(line) for line in (tiny_run / "out" / name).read_text().splitlines()]
        for name in ("log.txt", "evaluate.txt")
    )
    assert [row["kind"] for row in [*rows, *evaluated]] == ["start", "epoch", "epoch", "test", "evaluate", "evaluate"]
    by_kind: dict[str, list[str]] = {}
    for row in [*rows, *evaluated]:
        assert next(iter(row)) == "kind" and set(COLUMNS) <= set(row)
        assert by_kind.setdefault(row["kind"], list(row)) == list(row)  # the same columns, in the same order
        assert all(isinstance(value, str | int | float) for value in row.values())  # flat
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["time"])
        assert (row["dataset"], row["seed"], row["processes"]) == ("custom", 42, 1)
        assert row["code"] == utils.code_version() and row["device"].endswith("(CPU)")
        for split in row["split"].split(","):
            file = tiny_run / f"{split}.json"
            assert row[f"{split}_file"] == str(file)
            assert row[f"{split}_file_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
            assert (row[f"{split}_images"], row[f"{split}_captions"]) == (4, 8)
    start, first, _, test = rows
    assert (start["split"], start["checkpoint"], start["checkpoint_kind"]) == ("val", "", "random weights")
    assert (first["split"], first["checkpoint"], first["checkpoint_kind"]) == ("val", "", "this run")
    assert (first["train_images"], first["train_captions"]) == (12, 24)
    assert (test["split"], test["checkpoint"], test["checkpoint_kind"]) == ("test", "checkpoint_best.pth", "this run")
    assert evaluated[0]["split"] == "val,test" and evaluated[0]["checkpoint"] == str(best)
    assert evaluated[0]["checkpoint_kind"] == "BLIP already fine-tuned for retrieval"
    assert len({row["checkpoint_sha256"] for row in rows[:3]}) == 3
    (again,) = {row["checkpoint_sha256"] for row in [test, *evaluated, rows[1 + test["best_epoch"]]]}
    assert again == weights_sha256(load(best).model)


def test_numbers_are_rounded_where_their_digits_end():
    row = rounded({"val_r_mean": 200 / 3, "train_loss_ita": 1 / 3, "train_lr": 1e-5 / 3, "epoch": 3, "file": "a"})
    assert json.dumps(row) == (
        '{"val_r_mean": 66.6667, "train_loss_ita": 0.333333, "train_lr": 3.33333e-06, "epoch": 3, "file": "a"}'
    )


def test_pretrained_weights_are_named_in_the_first_row_also_after_a_stop(tiny_run, monkeypatch):
    assert run(tiny_run, "--set", "max_epoch=1") == 0
    source = tiny_run / "start.pth"
    (tiny_run / "out" / "checkpoint_best.pth").rename(source)
    (tiny_run / "out").rename(tiny_run / "former")
    args = ["--set", f"pretrained={source}", "max_epoch=1"]
    with monkeypatch.context() as patch:
        SignalAt(patch, 2)  # within the first validation
        assert run(tiny_run, *args) == 75
    assert run(tiny_run, *args, "--resume", "auto") == 0
    start = lines(tiny_run / "out" / "log.txt")[0]
    assert start["checkpoint"] == str(source)
    assert start["checkpoint_kind"] == "BLIP already fine-tuned for retrieval"
    assert start["checkpoint_sha256"] == weights_sha256(load(source).model)


# ---------------------------------------------------------------- steps and console


def test_steps_are_written_every_log_every_and_at_the_end_of_an_epoch(tiny_run):
    assert run(tiny_run, "--set", "log_every=2") == 0
    rows = lines(tiny_run / "out" / "steps.jsonl")
    assert [(row["step"], row["epoch"]) for row in rows] == [(2, 0), (3, 0), (4, 1), (6, 1)]
    assert list(rows[0]) == [
        "step", "epoch", "loss_ita", "loss_itm", "itm_acc", "grad_norm", "temp", "lr", *CLOCKS
    ]  # fmt: skip


def test_a_resumed_run_leaves_the_files_of_an_undisturbed_one(tiny_run):
    """Killed after steps that no save has: their rows are there, and go when the run resumes before them."""
    every = ["--set", "save_every_steps=2", "log_every=1"]
    config = tiny_run / "config.yaml"
    config.write_text(config.read_text() + "log_every: 1\n")
    killed = sabotaged(tiny_run, "SIGKILL", STEPS_PER_EPOCH + 2)  # within step 1 of epoch 1; saved: end of epoch 0
    assert killed.returncode == -9, killed.stderr[-2000:]
    path = tiny_run / "out" / "steps.jsonl"
    assert [row["step"] for row in lines(path)] == [1, 2, 3, 4]
    with open(path, "a") as file:
        file.write('{"step": 5, "epo')  # cut short
    before = (tiny_run / "out" / "console.log").read_text()
    assert run(tiny_run, "--resume", "auto", *every) == 0
    resumed, steps = lines(tiny_run / "out" / "log.txt"), steps_of(tiny_run / "out")
    console = (tiny_run / "out" / "console.log").read_text()
    assert console.startswith(before) and "resumed" in console[len(before) :]
    (tiny_run / "out").rename(tiny_run / "resumed")
    assert run(tiny_run, *every) == 0
    assert steps == steps_of(tiny_run / "out") and [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert resumed == lines(tiny_run / "out" / "log.txt")
    assert outcome(tiny_run / "out")[1]["run"] == outcome(tiny_run / "resumed")[1]["run"]


def test_rows_before_the_last_must_be_whole(tmp_path):
    (tmp_path / "log.txt").write_text('{"epoch"\n{"epoch": 1}\n')
    with pytest.raises(ValueError, match="log.txt, line 1"):
        journal.read_log(tmp_path / "log.txt")
    assert journal.read_log(tmp_path / "absent.txt") == []


def test_the_console_file_has_the_screens_lines_and_ends_with_the_run(tiny_run, capsys):
    handlers = list(logging.getLogger().handlers)
    assert run(tiny_run) == 0
    written = (tiny_run / "out" / "console.log").read_text().splitlines()
    assert not [h for h in logging.getLogger().handlers if isinstance(h, journal.ConsoleLog)], handlers
    screen = [line[9:] for line in capsys.readouterr().err.splitlines()]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in written)
    assert [line[20:] for line in written] == screen[-len(written) :]
    text = "\n".join(written)
    for words in (f"code {utils.code_version()}; Python ", "1 process, ", "M with momentum twins", "ViT-nano"):
        assert words in text
    assert "training starts from random weights" in text and "2 epochs of 3 steps, each of 8 pairs" in text
    assert re.search(r"new best: val_r_mean [\d.]+, saved as checkpoint_best.pth", text)
    assert re.search(r"epoch 1 \[3/3\] eta 0:00:00, run 0:00:0\d  loss_ita", text)
    second = re.search(r"val_r_mean [\d.]+; the best is still [\d.]+ of epoch 0", text)
    assert second or re.search(r"new best: val_r_mean [\d.]+ \(before [\d.]+\)", text)


def test_a_terminal_gets_a_live_line_and_a_file_does_not(tiny_run, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    bar = re.compile(r"epoch 1: +\d+%.*/3 \[")
    for screen in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stderr", screen)
        assert run(tiny_run, "--set", "eval_before=false") == 0
        assert bool(bar.search(screen.getvalue())) == screen.isatty()
        assert not bar.search((tiny_run / "out" / "console.log").read_text())
        (tiny_run / "out").rename(tiny_run / f"out {screen.isatty()}")


def test_an_error_is_the_last_line_of_the_console_file(tiny_run, monkeypatch):
    monkeypatch.setattr(monitor.math, "isfinite", lambda value: False)
    assert run(tiny_run) == 2
    last = (tiny_run / "out" / "console.log").read_text().splitlines()[-1]
    assert "epoch 0, step 0" in last and "not all finite" in last


def test_the_console_file_says_how_the_run_ended_as_the_screen_does():
    cfg = RetrievalConfig(dataset="scenes", vit="nano")
    assert journal.last_words(utils.Stopped("stopped by SIGTERM: all saved"), cfg) == "stopped by SIGTERM: all saved"
    full = journal.last_words(OSError(28, "No space left on device"), cfg)
    assert full.startswith("error: [Errno 28] No space left on device. Make room on that disk")
    assert journal.last_words(KeyError("x"), cfg).endswith("KeyError: 'x'")  # a fault of the program: its traceback


def test_evaluate_opens_with_the_same_head_and_writes_no_console_file(tiny_run, capsys):
    assert run(tiny_run, "--evaluate", "--random_weights") == 0
    assert f"code {utils.code_version()}; Python " in capsys.readouterr().err
    names = sorted(path.name for path in (tiny_run / "out").iterdir())
    assert names == ["config.yaml", "evaluate.txt", "ranking_test.npz", "ranking_val.npz"]


# ---------------------------------------------------------------- time


def test_the_clock_forecasts_once_after_twenty_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now[0])
    clock = monitor.RunClock(steps=100, epochs=2, test_share=0.5)
    clock.validation = 600.0
    said = []
    for step in range(1, 101):
        now[0] += 50.0 if step < 4 else 2.0  # the first steps are slow
        said += [(step, text) for text in [clock.forecast(0, step, step)] if text]
    minutes = (180 * 2 + 2.5 * 600) / 60
    ((step, text),) = said
    assert step == 20 and f"about {minutes:.0f} minutes: 180 steps of 2 s, and 3 evaluations, 0:10:00" in text
    assert clock.forecast(1, 20, 20) == ""
    assert clock.left(1, 40, 2.0) == 60 * 2 + 1.5 * 600


def test_durations_have_the_unit_people_plan_in():
    said = [monitor.duration(seconds) for seconds in (40, 119, 120, 3600, 7200, 16200, 111600)]
    assert said == ["40 seconds", "119 seconds", "2 minutes", "60 minutes", "2.0 hours", "4.5 hours", "31 hours"]


def test_a_clock_without_an_evaluation_says_that_it_counts_none(monkeypatch):
    clock = monitor.RunClock(steps=10, epochs=1, test_share=1)
    said = [clock.forecast(0, step, step) for step in range(1, 11)]
    assert "not counted" in said[-1] and not any(said[:-1])
    assert not any(monitor.RunClock(3, 2, 1).forecast(0, step, step) for step in (1, 2, 3))


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_gets_the_same_numbers_once(tiny_run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = tiny_run / "config.yaml"
    config.write_text(config.read_text() + "log_every: 1\ntensorboard: true\n")
    assert sabotaged(tiny_run, "SIGKILL", STEPS_PER_EPOCH + 2).returncode == -9
    time.sleep(1)  # files of events are ordered by the second in their names
    assert run(tiny_run, "--resume", "auto") == 0
    events = accumulator.EventAccumulator(str(tiny_run / "out" / "tensorboard")).Reload()
    rows = lines(tiny_run / "out" / "steps.jsonl")
    for key in ("loss_ita", "loss_itm", "itm_acc", "lr", "temp", "grad_norm"):
        found = [(event.step, event.value) for event in events.Scalars(f"train/{key}")]
        assert found == [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in rows], key
    start, *epochs, test = lines(tiny_run / "out" / "log.txt")
    for key, expected in (("val", [start, *epochs]), ("test", [test])):
        found = [event.value for event in events.Scalars(f"{key}/r_mean")]
        assert found == pytest.approx([row[f"{key}_r_mean"] for row in expected])
    assert [event.step for event in events.Scalars("val/r_mean")] == [0, 3, 6]


def test_tensorboard_missing_is_said_before_anything_is_written(tiny_run, monkeypatch, capsys):
    monkeypatch.setattr("training.preflight.find_spec", lambda name: None)
    assert run(tiny_run, "--set", "tensorboard=true") == 2
    assert "pip install -r requirements-tensorboard.txt" in capsys.readouterr().err
    assert not (tiny_run / "out").exists()
    assert run(tiny_run, "--evaluate", "--random_weights", "--set", "tensorboard=true") == 0  # evaluation has no curves


# ---------------------------------------------------------------- published numbers


def test_a_released_file_is_compared_with_its_published_numbers(tiny_run, capsys, monkeypatch):
    assert run(tiny_run, "--set", "max_epoch=1") == 0
    got = lines(tiny_run / "out" / "log.txt")[-1]
    source = tiny_run / "model_invented.pth"
    (tiny_run / "out" / "checkpoint_best.pth").rename(source)
    keys = [f"test_{way}_r{k}" for way in ("txt", "img") for k in (1, 5, 10)]
    values = [got[key] for key in keys]
    values[0] += 0.4
    values[3] -= 12
    monkeypatch.setitem(published.PUBLISHED, "model_invented.pth", ("custom", tuple(values)))
    info = DATASETS["custom"]
    args = ["--evaluate", "--set", f"finetuned={source}"]
    capsys.readouterr()
    assert run(tiny_run, *args) == 0
    assert "published" not in capsys.readouterr().err  # no published counts: another test set
    monkeypatch.setitem(DATASETS, "custom", replace(info, counts={"test": (4, 8)}))
    assert run(tiny_run, *args) == 0
    said = capsys.readouterr().err
    row = next(line for line in said.splitlines() if " published  " in line)
    assert [float(word) for word in row.split()[2:8]] == pytest.approx(values, abs=0.006)
    assert "TR@1 -0.40 (within 0.5), IR@1 +12.00 (NOT within 0.5), mean +1.93 (NOT within 0.5)" in said
    assert said.count("against the published numbers") == 1  # of test, not of val


def test_published_numbers_are_those_of_the_documentation():
    page = (utils.REPOSITORY / "docs" / "evaluation.md").read_text()
    for name, (dataset, values) in published.PUBLISHED.items():
        row = next(line for line in page.splitlines() if name.replace(dataset, "{coco,flickr}") in line)
        cells = [cell.strip() for cell in row.split("|")][5:9]
        texts, images = cells[:2] if dataset == "coco" else cells[2:]
        assert tuple(float(x) for cell in (texts, images) for x in cell.split(" / ")) == values
        assert name in RELEASED
    address = RELEASES + "model_base_retrieval_coco.pth"
    assert published.published_metrics(address, "coco", "test", 5000, 25010)["txt_r1"] == 81.9
    assert published.published_metrics(address, "coco", "val", 5000, 25010) == {}
    assert published.published_metrics(address, "flickr", "test", 5000, 25010) == {}
    assert published.published_metrics("", "coco", "test", 5000, 25010) == {}
