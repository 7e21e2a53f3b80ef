"""A stop signal at every place it can fall: exit status 75, and after --resume auto the numbers of a straight run."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import utils
from tests.test_resume import assert_equal_outcomes, outcome
from tests.test_train import ROOT, lines, run


class SignalAt:
    """Counts the polls of a run, and sends this process a signal just before the one of that number."""

    def __init__(self, monkeypatch, number: int = -1, name: str = "SIGTERM"):
        self.count, self.places = 0, []
        original = utils.StopSignal.poll

        def poll(stop: utils.StopSignal) -> None:
            if self.count == number:
                os.kill(os.getpid(), getattr(signal, name))
            self.count += 1
            self.places.append(place_of_caller())
            original(stop)

        monkeypatch.setattr(utils.StopSignal, "poll", poll)


def place_of_caller() -> str:
    """Which part of the run polls: a method of TrainingRun, and the function within it."""
    frame, names = sys._getframe(2), []
    while frame is not None:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    for method in ("validate_start", "validate", "test", "gradients", "train_steps"):
        if method in names:
            return f"{method}: {names[1] if method == 'gradients' else names[0]}"
    return names[0]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Outcome of an undisturbed run, and where it polls. One step an epoch has several micro-batches."""
    from tests.conftest import make_tiny_run

    folder = make_tiny_run(tmp_path_factory.mktemp("straight"))
    with pytest.MonkeyPatch.context() as patch:
        counter = SignalAt(patch)
        assert run(folder) == 0
    return outcome(folder / "out"), counter.places


def stop_and_resume(folder, monkeypatch, number: int, name: str = "SIGTERM") -> None:
    with monkeypatch.context() as patch:
        SignalAt(patch, number, name)
        assert run(folder) == utils.StopSignal.EXIT_STOPPED
    assert run(folder, "--resume", "auto") == 0


def chosen(places: list[str]) -> list[int]:
    """The first and last poll of each kind, and every one between two steps."""
    numbers = set()
    for kind in set(places):
        same = [i for i, place in enumerate(places) if place == kind]
        numbers |= {same[0], same[len(same) // 2], same[-1]}
        numbers |= set(same) if kind.startswith("train_steps") else set()
    return sorted(numbers)


def test_a_run_polls_everywhere(straight):
    kinds = {place.partition(":")[0] for place in straight[1]}
    assert kinds == {"validate_start", "train_steps", "gradients", "validate", "test"}
    assert sum(place.startswith("train_steps") for place in straight[1]) == 6  # before each step of two epochs


@pytest.mark.parametrize("kind", ["validate_start", "train_steps", "gradients", "validate", "test"])
def test_stopped_in_the_middle_of_each_part(tiny_run, straight, monkeypatch, capfd, kind):
    same = [i for i, place in enumerate(straight[1]) if place.startswith(kind)]
    stop_and_resume(tiny_run, monkeypatch, same[len(same) // 2])
    said = capfd.readouterr().err
    assert said.count("go on with the same command and --resume auto") == 1 and "SIGTERM: leaving" in said
    assert_equal_outcomes(outcome(tiny_run / "out"), straight[0])


@pytest.mark.slow
def test_stopped_at_every_place(tmp_path, straight, monkeypatch):
    from tests.conftest import make_tiny_run

    numbers = chosen(straight[1])
    assert len(numbers) > 20
    for number in numbers:
        (tmp_path / str(number)).mkdir()
        folder = make_tiny_run(tmp_path / str(number))
        stop_and_resume(folder, monkeypatch, number, name=("SIGTERM", "SIGINT", "SIGUSR1")[number % 3])
        assert_equal_outcomes(outcome(folder / "out"), straight[0])


def test_stopped_twice_in_one_step_and_then_in_its_validation(tiny_run, straight, monkeypatch):
    """A step that was left with its momentum twins moved is left again, and taken once in the end."""
    gradients = [i for i, place in enumerate(straight[1]) if place.startswith("gradients")]
    with monkeypatch.context() as patch:
        SignalAt(patch, gradients[3])
        assert run(tiny_run) == 75
    saved = torch.load(tiny_run / "out" / "checkpoint_e000_s000000.pth", weights_only=True)
    assert saved["run"]["momentum_moved"] is True
    for polls in (2, 0):
        with monkeypatch.context() as patch:
            SignalAt(patch, polls)
            assert run(tiny_run, "--resume", "auto") == 75
    assert run(tiny_run, "--resume", "auto") == 0
    assert_equal_outcomes(outcome(tiny_run / "out"), straight[0])


def test_evaluate_stops_without_a_result(tiny_run, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        SignalAt(patch, 3, "SIGINT")
        assert run(tiny_run, "--evaluate", "--random_weights") == 75
    assert not (tiny_run / "out").exists() and "give the same command again" in capsys.readouterr().err


def test_handlers_are_put_back(tiny_run):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    assert run(tiny_run, "--evaluate", "--random_weights") == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_a_second_interrupt_aborts_but_not_the_echo_of_the_first(monkeypatch):
    with utils.StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the launcher passes a terminal's Ctrl-C on
        assert stop.received == "SIGINT"
        monkeypatch.setattr(stop, "_since", time.monotonic() - 2)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_interrupted_before_the_run_starts_is_one_line(tiny_run, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.preflight.preflight", interrupted)
    assert run(tiny_run) == 130
    assert capsys.readouterr().err == "aborted: nothing more was saved\n" and not (tiny_run / "out").exists()


@pytest.mark.slow
def test_the_whole_group_of_processes_gets_the_signal(tiny_run):
    """Ctrl-C in a terminal, or a cluster's notice: loader workers get it too, and must neither die nor complain."""
    argv = ["--config", tiny_run / "config.yaml", "--output_dir", tiny_run / "out", "--device", "cpu"]
    argv += ["--set", "num_workers=2", "max_epoch=200"]
    command = [sys.executable, ROOT / "train_retrieval.py", *argv]
    for name in ("SIGINT", "SIGTERM"):
        process = subprocess.Popen(
            [str(word) for word in [*command, "--resume", "auto"]],
            stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=tiny_run,
        )  # fmt: skip
        log, rows = tiny_run / "out" / "log.txt", 0
        deadline = time.monotonic() + 120
        start = len(lines(log)) if log.exists() else 0
        while rows < start + 2 and time.monotonic() < deadline:
            time.sleep(0.1)
            rows = len(lines(log)) if log.exists() else 0
        sent = time.monotonic()
        os.killpg(process.pid, getattr(signal, name))
        _, error = process.communicate(timeout=60)
        assert process.returncode == 75, error[-3000:]
        assert time.monotonic() - sent < 20 and "Traceback" not in error and "all saved in" in error
