"""The program: train, evaluate, one process or two, with the launcher and without; what bad input gets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

import train_retrieval
import utils
from checkpoints.load import LoadReport
from configs.schema import load_config
from data.findings import Findings
from models.towers import plan_model
from training import loop
from utils import init_distributed

ROOT = Path(__file__).parent.parent
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def run(folder: Path, *args: str, config: str = "config.yaml") -> int:
    argv = ["--config", str(folder / config), "--output_dir", str(folder / "out"), "--device", "cpu", *args]
    return train_retrieval.main(argv)


def launch(folder: Path, processes: int, output: str, *args: str) -> None:
    argv = ["--config", str(folder / "config.yaml"), "--output_dir", str(folder / output), "--device", "cpu", *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*LAUNCHER, str(processes), "train_retrieval.py", *argv]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def lines(path: Path, *apart: str) -> list[dict]:
    """The rows of a file of a run, without `time`, which no two runs share, and without the columns `apart`."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("time", *apart)} for row in rows]


def test_trains_evaluates_and_leaves_a_run_folder(tiny_run, capsys):
    assert run(tiny_run) == 0
    before, *epochs, test = lines(tiny_run / "out" / "log.txt")
    assert before["epoch"] == -1 and [line["epoch"] for line in epochs] == [0, 1]
    for line in epochs:
        assert line["train_lr"] == pytest.approx(1e-4 if line["epoch"] == 0 else 5e-5)
        assert all(np.isfinite(line[f"train_loss_{name}"]) for name in ("ita", "itm"))
    nine = ["txt_r1", "txt_r5", "txt_r10", "txt_r_mean", "img_r1", "img_r5", "img_r10", "img_r_mean", "r_mean"]
    for prefix, line in [("val_", epochs[0]), ("test_", test)]:
        assert {f"{prefix}{kind}{key}" for kind in ("", "itc_", "chance_") for key in nine} <= set(line)
    assert test["test_chance_txt_r1"] == 25  # 2 of 8 captions are right

    checkpoint = torch.load(tiny_run / "out" / "checkpoint_best.pth", weights_only=True)
    assert {"model", "optimizer", "config", "epoch"} <= set(checkpoint)
    assert checkpoint["epoch"] == test["best_epoch"]
    assert load_config(tiny_run / "out" / "config.yaml").max_epoch == 2
    messages = capsys.readouterr().err
    for word in ("eta", "loss_ita", "loss_itm", "lr ", "images/s", "MB", "chance", "k_test 64 is larger"):
        assert word in messages


@pytest.mark.parametrize(("told", "kept"), [(None, "200"), ("50", "50")])
def test_onednn_keeps_the_shapes_of_a_step_unless_told_otherwise(monkeypatch, told, kept):
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", told or "")
    if not told:
        monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    init_distributed("cpu")
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == kept


def test_processes_of_a_machine_do_not_share_one_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--device cuda:1: all processes .* would share it. Use --device cuda"):
        init_distributed("cuda:1")


@pytest.mark.parametrize(
    ("version", "hidden", "said"), [("13.0", False, True), ("13.0", True, False), (None, False, False)]
)
def test_a_driver_that_is_too_old_is_no_silent_run_on_the_cpu(tiny_run, capsys, monkeypatch, version, hidden, said):
    monkeypatch.setattr(utils, "NVIDIA_DRIVER", tiny_run)  # something that exists
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "") if hidden else monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert run(tiny_run, "--check", "--device", "auto") == 0
    words = "this runs on the CPU. There is an NVIDIA driver, but it is too old for this PyTorch's CUDA 13.0"
    assert (words in capsys.readouterr().out) == said


def test_negatives_are_drawn_at_random_in_the_first_steps_alone(tiny_run, monkeypatch):
    """The step says whether they are hard; a resumed run counts on."""
    flags, original = [], loop.train_step

    def spy(*args, hard_negatives: bool, **kwargs):
        flags.append(hard_negatives)
        return original(*args, hard_negatives=hard_negatives, **kwargs)

    monkeypatch.setattr(loop, "train_step", spy)
    some = ["--set", "random_negative_steps=4", "eval_before=false"]
    assert run(tiny_run, *some, "max_epoch=1") == 0
    assert run(tiny_run, *some, "max_epoch=3", "--resume", "auto") == 0
    steps = len(flags) // 3
    assert flags == [False] * 4 + [True] * (3 * steps - 4) and steps < 4  # 24 pairs in batches of 8


def test_evaluate_writes_its_result_and_nothing_else(tiny_run):
    assert run(tiny_run) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tiny_run / "out").iterdir()}
    assert run(tiny_run, "--evaluate") == 0
    after = {path.name: path.stat().st_mtime_ns for path in (tiny_run / "out").iterdir()}
    assert set(after) - set(before) == {"evaluate.txt"}
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"ranking_val.npz", "ranking_test.npz"}
    (result,) = lines(tiny_run / "out" / "evaluate.txt")
    trained = lines(tiny_run / "out" / "log.txt")[-1]
    other = {"kind", "best_epoch", "split", "checkpoint", "checkpoint_kind"}
    assert {key: result[key] for key in trained.keys() - other} == {key: trained[key] for key in trained.keys() - other}


def test_an_evaluation_writes_its_config_unless_the_folder_is_a_runs(tiny_run):
    """It goes with the newest rankings, and names the folder; a training run writes its own, which then stays."""
    config = tiny_run / "out" / "config.yaml"
    for k_test in (3, 4):
        assert run(tiny_run, "--evaluate", "--random_weights", "--set", f"k_test={k_test}") == 0
        assert load_config(config).k_test == k_test
    assert train_retrieval.parse_args(["--config", str(config)]).output_dir == tiny_run / "out"
    assert run(tiny_run, "--set", "max_epoch=1") == 0
    assert run(tiny_run, "--evaluate", "--set", "k_test=5") == 0
    assert (load_config(config).k_test, load_config(config).max_epoch) == (64, 1)


def test_evaluate_loads_finetuned_before_pretrained(tiny_run, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        "retrieval.evaluate.load_pretrained", lambda model, source, cache_dir: loaded.append(source) or LoadReport()
    )
    monkeypatch.setattr("training.preflight.check_checkpoint", lambda *_: Findings())
    monkeypatch.setattr("training.preflight.plan_model", lambda cfg, source: plan_model(cfg))
    run(tiny_run, "--evaluate", "--set", "pretrained=p.pth")
    run(tiny_run, "--evaluate", "--set", "pretrained=p.pth", "finetuned=f.pth")
    assert loaded == ["p.pth", "f.pth"]


@pytest.mark.slow
def test_launcher_and_number_of_processes_do_not_change_results(tiny_run):
    """In-process, launched as one, launched as two (each playing one of the two emulated ranks)."""
    torch.set_num_threads(1)
    YAML().dump({**YAML().load(tiny_run / "config.yaml"), "negative_all_rank": True}, tiny_run / "config.yaml")
    text = json.loads((tiny_run / "med.json").read_text())
    (tiny_run / "med.json").write_text(
        json.dumps({**text, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    )
    assert run(tiny_run) == 0
    launch(tiny_run, 1, "one")
    launch(tiny_run, 2, "two")
    alone, one = (lines(tiny_run / name / "log.txt") for name in ("out", "one"))
    assert one == alone
    one, two = (lines(tiny_run / name / "log.txt", "processes", "checkpoint_sha256") for name in ("one", "two"))
    assert len(two) == len(one)
    for a, b in zip(one, two, strict=True):
        words = {key for key, value in a.items() if isinstance(value, str)}
        assert {key: a[key] for key in words} == {key: b[key] for key in words}
        numbers_a, numbers_b = ({key: row[key] for key in row.keys() - words} for row in (a, b))
        assert numbers_b == pytest.approx(numbers_a, rel=1e-4, abs=1e-4)

    best = tiny_run / "one" / "checkpoint_best.pth"
    for processes in (1, 2):
        launch(tiny_run, processes, f"eval{processes}", "--evaluate", "--set", f"pretrained={best}")
    one, two = (lines(tiny_run / name / "evaluate.txt", "processes") for name in ("eval1", "eval2"))
    assert one == two


@pytest.mark.slow
def test_what_only_another_process_finds_is_said_and_no_process_goes_on(tiny_run):
    """As on two machines, of which the second lacks a file."""
    script = tiny_run / "second.py"
    script.write_text(ELSEWHERE)
    argv = ["--config", tiny_run / "config.yaml", "--output_dir", tiny_run / "out", "--device", "cpu"]
    done = subprocess.run(
        [str(word) for word in [*LAUNCHER, "2", script, *argv]],
        cwd=tiny_run, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode and "KeyError" not in done.stderr, done.stderr
    assert done.stderr.count("error: on ") == 1, done.stderr
    assert "rank 1: " in done.stderr and "train_gone.json" in done.stderr
    assert not (tiny_run / "out").exists()


# Train like train_retrieval.py, but rank 1 does not have the training annotations.
ELSEWHERE = """
import os, sys
from dataclasses import replace
import train_retrieval
from training import preflight
original = preflight.load_annotations
def load_annotations(cfg, split, *args):
    gone = os.environ["RANK"] == "1" and split == "train"
    return original(replace(cfg, train_file="train_gone.json") if gone else cfg, split, *args)
preflight.load_annotations = load_annotations
sys.exit(train_retrieval.main(sys.argv[1:]))
"""


BAD = {
    "unknown key": (["--set", "qeue_size=24"], ["qeue_size", "queue_size"]),
    "queue smaller than a batch": (["--set", "queue_size=6"], ["queue_size", "8"]),
    "no image root": (["--set", "image_root=/nowhere/images"], ["image_root", "/nowhere/images"]),
    "no annotations": (["--set", "train_file=absent.json"], ["absent.json"]),
    "no checkpoint": (["--set", "pretrained=absent.pth"], ["absent.pth"]),
    "no text config": (["--set", "med_config=absent.json"], ["med_config", "absent.json"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_paragraph_and_exit_status_2(tiny_run, capsys, name):
    args, expected = BAD[name]
    assert run(tiny_run, *args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    for word in expected:
        assert word in error
    assert not list((tiny_run / "out").glob("*.pth"))


def test_missing_images_are_counted_and_the_first_is_named(tiny_run, capsys):
    for i in (3, 5):
        (tiny_run / "images" / f"train_{i}.png").unlink()
    assert run(tiny_run) == 2
    error = capsys.readouterr().err
    assert "train_3.png" in error and "2 of 12" in error


def test_an_unreadable_image_is_named(tiny_run, capsys):
    (tiny_run / "images" / "train_3.png").write_bytes(b"not a picture")
    assert run(tiny_run) == 2
    assert "train_3.png" in capsys.readouterr().err


def test_a_batch_of_one_image_is_an_error_before_the_step(tiny_run, capsys):
    rows = json.loads((tiny_run / "train.json").read_text())
    for row in rows:
        row["image_id"] = "the same"
    (tiny_run / "train.json").write_text(json.dumps(rows))
    assert run(tiny_run) == 2
    error = capsys.readouterr().err
    assert "epoch 0, step 0" in error and "same image" in error


def test_a_non_finite_loss_stops_the_run_and_names_step_images_and_last_save(tiny_run, capsys, monkeypatch):
    original = loop.compute_gradients

    def broken(model, *args):
        report = original(model, *args)
        if args[5] == 1:  # epoch 1
            report.by_rank["loss_ita"].fill_(float("nan"))
        return report

    monkeypatch.setattr(loop, "compute_gradients", broken)
    assert run(tiny_run) == 2
    error = capsys.readouterr().err
    assert "epoch 1, step 0" in error and "train_" in error and "checkpoint_e001_s000000.pth" in error


def test_a_second_run_into_the_same_folder_is_refused(tiny_run, capsys):
    (tiny_run / "out").mkdir()
    (tiny_run / "out" / "log.txt").write_text('{"epoch": 0}\n')
    assert run(tiny_run) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert (tiny_run / "out" / "log.txt").read_text() == '{"epoch": 0}\n'


def test_nor_into_a_folder_with_a_save_before_its_first_evaluation(tiny_run, capsys):
    (tiny_run / "out").mkdir()
    (tiny_run / "out" / "checkpoint_e000_s000002.pth").write_bytes(b"")
    assert run(tiny_run) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert [path.name for path in (tiny_run / "out").iterdir()] == ["checkpoint_e000_s000002.pth"]


def test_dry_run_measures_and_writes_nothing(tiny_run, capsys):
    assert run(tiny_run, "--dry_run") == 0
    printed = capsys.readouterr().out
    assert "images/s" in printed and "epoch" in printed and "evaluation" in printed
    assert not (tiny_run / "out").exists()
