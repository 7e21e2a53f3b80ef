"""Interrupted runs: killed, restarted by the launcher, stopped by a signal; each ends with a straight run's numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_retrieval
from checkpoints.runs import RunState, find_runs
from tests.test_train import LAUNCHER, ROOT, lines, run
from training.loop import require_best

# Train like train_retrieval.py, but send this process a signal at the COUNT-th step of the first attempt.
SABOTAGE = """
import os, signal, sys
import train_retrieval
from training import loop
signal_name, count, marker, rank, *argv = sys.argv[1:]
steps, original = 0, loop.average_gradients
def average_gradients(model):
    global steps
    steps += 1
    if steps == int(count) and os.environ.get("RANK", "0") == rank and not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), getattr(signal, signal_name))
    original(model)
loop.average_gradients = average_gradients
sys.exit(train_retrieval.main(argv))
"""
STEPS_PER_EPOCH = 3  # of tiny_run


def sabotaged(folder: Path, signal_name: str, count: int, *launcher: str, rank: int = 0) -> subprocess.CompletedProcess:
    script = folder / "sabotage.py"
    script.write_text(SABOTAGE)
    argv = ["--config", folder / "config.yaml", "--output_dir", folder / "out", "--device", "cpu", "--resume", "auto"]
    argv += ["--set", "save_every_steps=2"]
    command = [*(launcher or [sys.executable]), script, signal_name, count, folder / "marker", rank, *argv]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(
        [str(word) for word in command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def straight(folder: Path) -> tuple[list[dict], dict]:
    """Log and weights of the same run without interruption."""
    argv = ["--config", str(folder / "config.yaml"), "--output_dir", str(folder / "straight"), "--device", "cpu"]
    assert train_retrieval.main([*argv, "--set", "save_every_steps=2"]) == 0
    return outcome(folder / "straight")


def outcome(folder: Path) -> tuple[list[dict], dict]:
    rows = lines(folder / "log.txt", "train_file", "val_file", "test_file")  # runs to compare lie in several folders
    return rows, torch.load(find_runs(folder)[0], weights_only=True)


def assert_equal_outcomes(got: tuple[list[dict], dict], expected: tuple[list[dict], dict]) -> None:
    assert got[0] == expected[0]
    assert got[1]["run"] == expected[1]["run"]
    for name, tensor in expected[1]["model"].items():
        assert torch.equal(got[1]["model"][name], tensor), name
    for key, moments in expected[1]["optimizer"]["state"].items():
        assert all(torch.equal(got[1]["optimizer"]["state"][key][name], value) for name, value in moments.items())


@pytest.mark.parametrize("step_of_epoch_1", [1, 2])
def test_killed_in_the_middle_of_an_epoch_and_resumed_is_bit_equal(tiny_run, step_of_epoch_1):
    """At step 1 the last save is epoch 0's, and a step is computed again; at step 2 it is the save within the epoch."""
    killed = sabotaged(tiny_run, "SIGKILL", STEPS_PER_EPOCH + step_of_epoch_1 + 1)
    assert killed.returncode == -9, killed.stderr[-2000:]
    assert [line["epoch"] for line in lines(tiny_run / "out" / "log.txt")] == [-1, 0]
    assert run(tiny_run, "--resume", "auto", "--set", "save_every_steps=2") == 0
    assert_equal_outcomes(outcome(tiny_run / "out"), straight(tiny_run))


def test_sigterm_saves_at_the_next_step_and_exits_with_75(tiny_run):
    stopped = sabotaged(tiny_run, "SIGTERM", STEPS_PER_EPOCH + 1)
    assert stopped.returncode == 75, stopped.stderr[-2000:]
    assert (tiny_run / "out" / "checkpoint_e001_s000001.pth").exists()
    assert "--resume auto" in stopped.stderr
    assert run(tiny_run, "--resume", "auto", "--set", "save_every_steps=2") == 0
    assert_equal_outcomes(outcome(tiny_run / "out"), straight(tiny_run))


def test_a_damaged_newest_save_costs_only_the_steps_since_the_one_before(tiny_run, capsys):
    assert sabotaged(tiny_run, "SIGKILL", STEPS_PER_EPOCH + 3).returncode == -9
    newest = tiny_run / "out" / "checkpoint_e001_s000002.pth"
    newest.write_bytes(newest.read_bytes()[:5000])
    assert run(tiny_run, "--resume", "auto", "--set", "save_every_steps=2") == 0
    assert newest.name in capsys.readouterr().err
    assert_equal_outcomes(outcome(tiny_run / "out"), straight(tiny_run))


def test_a_finished_run_only_repeats_its_test_line(tiny_run):
    log, state = straight(tiny_run)
    argv = ["--config", str(tiny_run / "config.yaml"), "--output_dir", str(tiny_run / "straight"), "--device", "cpu"]
    assert train_retrieval.main([*argv, "--resume", "auto"]) == 0
    assert_equal_outcomes(outcome(tiny_run / "straight"), (log, state))


def test_a_changed_config_is_named(tiny_run, capsys):
    straight(tiny_run)
    argv = ["--config", str(tiny_run / "config.yaml"), "--output_dir", str(tiny_run / "straight"), "--device", "cpu"]
    assert train_retrieval.main([*argv, "--resume", "auto", "--set", "queue_size=32"]) == 2
    assert "queue_size" in capsys.readouterr().err
    assert train_retrieval.main([*argv, "--resume", "auto", "--set", "max_epoch=3"]) == 0
    assert "max_epoch" in capsys.readouterr().err
    assert [line.get("epoch") for line in lines(tiny_run / "straight" / "log.txt")] == [-1, 0, 1, 2, None]


@pytest.mark.parametrize(
    ("found", "step", "patience", "best"),
    [
        (2, 0, 0, 2),
        (4, 3, 0, 2),  # kept, and killed before the save: epoch 4 is validated again
        (4, 1, 0, -1),  # of epochs that came after a save which is now resumed
        ("missing", 0, 0, -1),
        ("missing", 0, 1, "put that file there"),  # patience has ended the run
    ],
)
def test_the_best_weights_are_those_that_the_state_tells_of(tmp_path, caplog, found, step, patience, best):
    if isinstance(found, int):
        torch.save({"model": {}, "epoch": found}, tmp_path / "checkpoint_best.pth")
    cfg = SimpleNamespace(max_epoch=6, patience=patience)
    state = RunState(epoch=4, step=step, best=31.5, best_epoch=2)
    if isinstance(best, str):
        with pytest.raises(ValueError, match=f"checkpoint_best.pth is missing, .* those of epoch 2: {best}"):
            require_best(state, cfg, tmp_path, 3)
        return
    require_best(state, cfg, tmp_path, 3)
    assert (state.best_epoch, state.best) == (best, 31.5 if best == 2 else 0.0)
    assert ("the best of epoch 4 and later is kept" in caplog.text) == (best == -1)


def test_a_run_that_lost_its_best_weights_keeps_the_next_and_a_finished_one_says_so(tiny_run, capsys):
    """As where a save is resumed in another folder. The next epoch changes nothing, so it is no better than before."""
    assert run(tiny_run, "--set", "max_epoch=1") == 0
    best = tiny_run / "out" / "checkpoint_best.pth"
    best.unlink()
    capsys.readouterr()
    assert run(tiny_run, "--resume", "auto", "--set", "max_epoch=1") == 2
    assert "put that file there, or go on from an earlier save" in capsys.readouterr().err
    assert run(tiny_run, "--resume", "auto", "--set", "init_lr=1e-12", "max_epoch=2") == 0
    assert "checkpoint_best.pth is missing, and the best weights of the resumed run" in capsys.readouterr().err
    assert torch.load(best, weights_only=True)["epoch"] == 1
    assert lines(tiny_run / "out" / "log.txt")[-1]["best_epoch"] == 1


def test_processes_that_find_different_saves_do_not_train_together(tiny_run, capsys, monkeypatch):
    """As where two machines do not share the folder."""
    assert run(tiny_run, "--set", "max_epoch=1") == 0
    before = {path: path.read_bytes() for path in (tiny_run / "out").iterdir()}
    monkeypatch.setattr("training.loop.gather_names", lambda names: [*names, "None"])
    assert run(tiny_run, "--resume", "auto", "--set", "max_epoch=2") == 2
    assert "not every process finds the same save: all must see" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tiny_run / "out").iterdir()} == before


@pytest.mark.slow
def test_the_launcher_restarts_a_killed_rank_and_the_job_recovers(tiny_run):
    text = json.loads((tiny_run / "med.json").read_text())
    (tiny_run / "med.json").write_text(json.dumps(text))
    restarted = sabotaged(tiny_run, "SIGKILL", STEPS_PER_EPOCH + 3, *LAUNCHER, "2", "--max_restarts=3", rank=1)
    assert restarted.returncode == 0, restarted.stderr[-3000:]
    assert (tiny_run / "marker").exists()
    for name in ("log.txt", "checkpoint_best.pth"):
        (tiny_run / "out" / name).rename(tiny_run / name)
    interrupted = lines(tiny_run / "log.txt")
    for path in (tiny_run / "out").glob("checkpoint_*"):
        path.unlink()
    undisturbed = sabotaged(tiny_run, "SIGKILL", 10**6, *LAUNCHER, "2", rank=1)
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]
    assert interrupted == lines(tiny_run / "out" / "log.txt")
