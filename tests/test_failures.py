"""Failures injected into a run: exit status 2, one paragraph that names the remedy, and the last save still loads."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_retrieval
import utils
from checkpoints import runs
from configs.schema import load_config
from data.images import ImageStore
from data.loaders import Loader, death_of, worker_died
from tests.test_resume import assert_equal_outcomes, outcome
from tests.test_train import LAUNCHER, ROOT, lines, run
from training import failures, loop

SHORT = ("--set", "max_epoch=1", "save_every_steps=1")


def paragraph(captured: str) -> str:
    """What is on stderr after the log: one line, and nothing behind it."""
    *before, last = captured.replace("\0", "").splitlines()  # torch writes one after its words on a bus error
    assert last.startswith("error: ") and "Traceback" not in captured
    assert not any(line.startswith("error: ") for line in before)
    return last


def nothing_half_written(folder: Path) -> None:
    """No temporary file, every line of the log whole, every save loads."""
    assert [path.name for path in folder.rglob("*.part*")] == []
    assert lines(folder / "log.txt")
    for path in folder.glob("*.pth"):
        torch.load(path, weights_only=True)


def at_step(number: int, action, monkeypatch) -> None:
    """Before the gradients of that step of the run, counted over its epochs."""
    original, count = loop.compute_gradients, 0

    def compute_gradients(*args, **kwargs):
        nonlocal count
        count += 1
        if count == number + 1:
            action()
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "compute_gradients", compute_gradients)


def raising(error: BaseException):
    def action(*_, **__):
        raise error

    return action


# ---- the words ------------------------------------------------------------------------------------------------------

OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has 10 GiB {in all}.")
SHM = RuntimeError("unable to write to file </torch_123_456_0>: No space left on device (28)")
WORDS = {
    "GPU memory": (OOM, ["batch_size_train 4", "vit_grad_ckpt", "bf16", "--dry_run", "the method stays the same"]),
    "GPU memory, cuBLAS": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), ["batch_size_train"]),
    "GPU memory, cuDNN": (RuntimeError("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), ["lower it"]),
    "GPU memory, driver": (RuntimeError("Triton Error [CUDA]: out of memory"), ["batch_size_train 4"]),
    "GPU memory, plan": (RuntimeError("GET was unable to find an engine to execute this computation"), ["lower it"]),
    "host memory": (MemoryError(), ["memory is full", "num_workers 0", "batch_size_train 4"]),
    "host memory, torch": (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), ["memory is full"]),
    "host memory, fork": (OSError(errno.ENOMEM, "Cannot allocate memory"), ["memory is full", "num_workers"]),
    "files": (OSError(errno.EMFILE, "Too many open files", "a.png"), ["ulimit -n 65536", "num_workers 0"]),
    "files, torch": (RuntimeError("Too many open files. Communication with the workers is no"), ["ulimit -n 65536"]),
    "files, sent": (RuntimeError("received 0 items of ancdata"), ["ulimit -n 65536"]),
    "shm": (SHM, ["--shm-size=8g", "num_workers"]),
    "shm, path": (OSError(errno.ENOSPC, "No space left on device", "/dev/shm/torch_1"), ["--shm-size=8g"]),
    "shm, bus": (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It"), ["--shm-size=8g"]),
    "worker": (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), ["(pid(s) 7)", "num_workers 0"]),
    "pinned memory": (RuntimeError("Pin memory thread exited unexpectedly"), ["images has died", "num_workers 0"]),
    "disk": (OSError(errno.ENOSPC, "No space left on device", "out/log.txt"), ["out/log.txt", "Make room", "whole"]),
    "driver": (RuntimeError("CUDA error: launch failure\nCompile with"), ["launch failure. ", "not from the config"]),
    "nccl": (torch.distributed.DistBackendError("NCCL error in: x.cpp:1\nlong"), ["NCCL error in: x.cpp:1. "]),
    "peer": (RuntimeError("[pair.cc:544] Connection closed by peer [127.0.0.1]:3"), ["another process", "says why"]),
    "port": (torch.distributed.DistNetworkError("The server socket has failed"), ["MASTER_PORT", "socket has failed."]),
}  # fmt: skip


@pytest.mark.parametrize("name", WORDS)
def test_the_paragraph_names_the_remedy(tiny_run, name):
    error, expected = WORDS[name]
    said = failures.explain(error, load_config(tiny_run / "config.yaml"))
    assert [word for word in expected if word not in said] == [], said
    assert "\n" not in said and "Compile" not in said and "--resume auto" in said
    assert failures.explain(error, None)


def test_full_gpu_memory_is_told_from_other_errors():
    full = {name for name, (error, _) in WORDS.items() if failures.gpu_memory_is_full(error)}
    assert full == {name for name in WORDS if name.startswith("GPU memory")}


def test_what_a_loaders_worker_reports_is_without_its_traceback():
    caught = "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
    caught += '  File "x.py", line 1, in f\n    raise OSError("Error: no")\n'
    assert failures.explain(OSError(f"{caught}OSError: [Errno 5] Input/output error: 'a'\n"), None).startswith(
        "[Errno 5]"
    )
    assert "ulimit" in failures.explain(OSError(f"{caught}OSError: [Errno 24] Too many open files\n"), None)
    assert "memory is full" in failures.explain(MemoryError(f"{caught}MemoryError\n"), None)


def test_a_cause_counts():
    """torch reports a worker's bus error as the cause of its having gone."""
    error = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    error.__cause__ = RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. ")
    assert "--shm-size" in failures.explain(error, None)


@pytest.mark.parametrize("error", [
    KeyError("x"), RuntimeError("shapes"), AssertionError(), RuntimeError("CUDA error: device-side assert triggered"),
])  # fmt: skip
def test_faults_of_the_program_keep_their_traceback(error):
    assert failures.explain(error, None) == ""


def test_nothing_heavy_is_imported_before_the_config_is_read():
    code = "import sys, train_retrieval; assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---- in a run -------------------------------------------------------------------------------------------------------

IN_A_STEP = {
    "GPU memory": (OOM, "lower it"),
    "host memory": (MemoryError(), "memory is full"),
    "files": (OSError(errno.EMFILE, "Too many open files"), "ulimit -n 65536"),
    "shm": (SHM, "--shm-size=8g"),
}


@pytest.mark.parametrize("name", IN_A_STEP)
def test_in_a_step(tiny_run, monkeypatch, capsys, name):
    """What is left costs the steps since the last save only."""
    error, expected = IN_A_STEP[name]
    with monkeypatch.context() as patch:
        at_step(2, raising(error), patch)
        assert run(tiny_run, *SHORT) == 2
    assert expected in paragraph(capsys.readouterr().err)
    nothing_half_written(tiny_run / "out")
    assert runs.find_runs(tiny_run / "out")[0].name == "checkpoint_e000_s000002.pth"
    if name == "GPU memory":
        assert run(tiny_run, *SHORT, "batch_size_train=2", "--resume", "auto") == 0
        assert [line.get("epoch") for line in lines(tiny_run / "out" / "log.txt")] == [-1, 0, None]


def test_a_full_disk_during_a_save(tiny_run, monkeypatch, capsys):
    original = torch.save

    def full(data, path, *args):
        if "e000_s000003" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(data, path, *args)

    monkeypatch.setattr(torch, "save", full)
    assert run(tiny_run, *SHORT) == 2
    said = paragraph(capsys.readouterr().err)
    assert "checkpoint_e000_s000003.pth could not be saved" in said and "Make room" in said
    nothing_half_written(tiny_run / "out")


def test_a_file_table_that_is_full_is_not_taken_for_a_broken_image(tiny_run, monkeypatch, capsys):
    """on_bad_sample skip would leave out good images."""
    for error, expected in [
        (OSError(errno.EMFILE, "Too many open files"), "ulimit"),
        (MemoryError(), "memory is full"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(ImageStore, "_open", raising(error))
            assert run(tiny_run, "--set", "on_bad_sample=skip") == 2
        assert expected in paragraph(capsys.readouterr().err)


@pytest.fixture(autouse=True)
def gradients_as_before():
    """torch tells of a dead worker by an exception between any two instructions, perhaps those that end a no_grad."""
    yield
    torch.set_grad_enabled(True)


# ---- workers of the loader ------------------------------------------------------------------------------------------


def broken_worker(action, monkeypatch, after: int = 12) -> None:
    """`action` in a worker process instead of an image, after so many images."""
    original, main, count = ImageStore.load, os.getpid(), 0

    def load(store, name):
        nonlocal count
        count += os.getpid() != main and name.startswith("train")
        if count > after:
            action()
        return original(store, name)

    monkeypatch.setattr(ImageStore, "load", load)


DEATHS = {
    "exits": (lambda: os._exit(1), "has died"),
    "killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), "has died"),
    "bus error": (lambda: os.kill(os.getpid(), signal.SIGBUS), "--shm-size=8g"),
    "memory": (raising(MemoryError()), "memory is full"),
    "shm": (raising(SHM), "--shm-size=8g"),
    "disk": (raising(OSError(errno.EIO, "Input/output error")), "Input/output error"),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers inherit the sabotage")
@pytest.mark.parametrize("name", DEATHS)
def test_a_worker_that_dies(tiny_run, monkeypatch, capfd, name):
    action, expected = DEATHS[name]
    with monkeypatch.context() as patch:
        broken_worker(action, patch)
        assert run(tiny_run, *SHORT, "num_workers=1") == 2
    assert expected in paragraph(capfd.readouterr().err)
    nothing_half_written(tiny_run / "out")
    if name == "killed":
        assert run(tiny_run, *SHORT, "--resume", "auto") == 0


def test_a_lost_connection_to_a_worker_is_its_death():
    """Where the pipe breaks before torch has noticed that the process is gone."""
    said = death_of([SimpleNamespace(exitcode=None), SimpleNamespace(exitcode=-signal.SIGBUS, pid=7)])
    assert worker_died(RuntimeError(said)) and "--shm-size" in failures.explain(RuntimeError(said), None)
    assert "has died" in failures.explain(RuntimeError(death_of([SimpleNamespace(exitcode=1, pid=7)])), None)
    assert death_of([SimpleNamespace(exitcode=None)], patience=0.1) == "" == death_of([])


def test_a_worker_that_a_stop_signal_ends_is_a_stop(tiny_run, monkeypatch, capfd):
    """Between steps it is saved, like any stop; the run then ends with a straight run's numbers."""
    original = Loader.__iter__

    def dying(loader):
        for number, batch in enumerate(original(loader)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. ")
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "__iter__", dying)
        patch.setattr(utils.StopSignal, "poll", lambda stop: None)  # the worker's death comes first
        assert run(tiny_run) == 75
    said = capfd.readouterr().err
    assert "all saved in" in said and "Traceback" not in said and "error: " not in said
    assert (tiny_run / "out" / "checkpoint_e000_s000002.pth").exists()
    assert run(tiny_run, "--resume", "auto") == 0
    (tiny_run / "out").rename(tiny_run / "stopped")
    assert run(tiny_run) == 0
    assert_equal_outcomes(outcome(tiny_run / "stopped"), outcome(tiny_run / "out"))


def test_a_worker_that_a_stop_signal_ends_within_a_step_costs_the_steps_since_the_last_save(
    tiny_run, monkeypatch, capfd
):
    def stopped() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. ")

    at_step(2, stopped, monkeypatch)
    assert run(tiny_run, *SHORT) == 75
    assert "SIGTERM" in capfd.readouterr().err
    assert runs.find_runs(tiny_run / "out")[0].name == "checkpoint_e000_s000002.pth"


# ---- devices --------------------------------------------------------------------------------------------------------


def test_more_processes_than_gpus(tiny_run, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert run(tiny_run, "--device", "cuda") == 2
    said = paragraph(capsys.readouterr().err)
    for word in ("LOCAL_RANK is 3", "needs 4 GPUs", "sees 2", "--nproc_per_node=2", "CUDA_VISIBLE_DEVICES"):
        assert word in said
    assert not (tiny_run / "out").exists()


@pytest.mark.parametrize(("option", "environment", "expected"), [
    (["--local-rank", "5"], None, "LOCAL_RANK is 5"),
    (["--local_rank=6"], None, "LOCAL_RANK is 6"),
    (["--local_rank=6"], "7", "LOCAL_RANK is 7"),
])  # fmt: skip
def test_the_old_launchers_option(tiny_run, monkeypatch, capsys, option, environment, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", environment or "0")
    if environment is None:
        monkeypatch.delenv("LOCAL_RANK")
    assert run(tiny_run, *option, "--device", "cuda") == 2
    assert expected in paragraph(capsys.readouterr().err)
    with pytest.raises(SystemExit):
        train_retrieval.main(["--help"])
    assert "local" not in capsys.readouterr().out


def test_apples_gpu(tiny_run, capsys):
    assert run(tiny_run, "--device", "mps") == 2
    said = paragraph(capsys.readouterr().err)
    assert "--device mps" in said and "not supported" in said and "--device cpu" in said


# ---- under the launcher ---------------------------------------------------------------------------------------------


def test_a_mistake_in_the_config_is_said_once(tiny_run, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tiny_run / "error.json"))
    monkeypatch.setenv("RANK", "1")
    assert run(tiny_run, "--set", "qeue_size=3") == 2
    assert capsys.readouterr().err == "" and not (tiny_run / "error.json").exists()
    monkeypatch.setenv("RANK", "0")
    assert run(tiny_run, "--set", "qeue_size=3") == 2
    said = paragraph(capsys.readouterr().err).removeprefix("error: ")
    data = json.loads((tiny_run / "error.json").read_text())["message"]
    assert data["message"] == said and int(data["extraInfo"]["timestamp"]) > 0


def test_what_only_follows_from_another_process_is_not_the_launchers_last_word(tiny_run, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tiny_run / "error.json"))
    at_step(0, raising(RuntimeError("[pair.cc:544] Connection closed by peer [127.0.0.1]:3")), monkeypatch)
    assert run(tiny_run) == 2
    assert "another process" in paragraph(capsys.readouterr().err) and not (tiny_run / "error.json").exists()


def test_a_stop_is_told_to_the_launcher(tiny_run, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tiny_run / "error.json"))
    at_step(1, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    assert run(tiny_run) == 75
    assert "--resume auto" in json.loads((tiny_run / "error.json").read_text())["message"]["message"]


# Like train_retrieval.py, but RANK runs out of the GPU's memory in its first step.
SABOTAGE = """
import os, sys, torch, train_retrieval
from training import loop
rank, *argv = sys.argv[1:]
original = loop.compute_gradients
def compute_gradients(*args):
    if os.environ["RANK"] == rank:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return original(*args)
loop.compute_gradients = compute_gradients
sys.exit(train_retrieval.main(argv))
"""


def launched(folder: Path, rank: int, *args: str) -> subprocess.CompletedProcess:
    (folder / "sabotage.py").write_text(SABOTAGE)
    argv = ["--config", folder / "config.yaml", "--output_dir", folder / "out", "--device", "cpu", *args]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [str(word) for word in [*LAUNCHER, "2", folder / "sabotage.py", rank, *argv]]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize(("args", "rank", "expected"), [
    (["--set", "qeue_size=3"], -1, "qeue_size"),
    (["--set", "pretrained=absent.pth"], -1, "absent.pth"),
    ([], 0, "the GPU's memory is full"),
    ([], 1, "the GPU's memory is full"),
])  # fmt: skip
def test_the_launchers_last_box_holds_the_paragraph(tiny_run, args, rank, expected):
    ended = launched(tiny_run, rank, *args)
    assert ended.returncode == 1  # the launcher's own, whatever its processes return
    assert sum(line.startswith("error: ") and expected in line for line in ended.stderr.splitlines()) == 1
    box = ended.stderr.rpartition("Root Cause (first observed failure)")[2]
    assert expected in box, ended.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_end_without_a_word_about_their_group(tiny_run):
    ended = launched(tiny_run, -1)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "destroy_process_group" not in ended.stderr


# ---- other systems --------------------------------------------------------------------------------------------------

# Like train_retrieval.py, on a system without what Unix has.
ELSEWHERE = """
import errno, multiprocessing, os, pathlib, signal, sys
METHOD, *argv = sys.argv[1:]

def take_away():
    sys.modules["resource"] = None
    for module, names in {signal: ("SIGUSR1", "SIGALRM", "SIGKILL", "alarm", "pthread_sigmask"),
                          os: ("getuid", "sched_getaffinity", "sysconf", "killpg")}.items():
        for name in names:
            delattr(module, name)
    real_open, real_fsync, is_file = os.open, os.fsync, pathlib.Path.is_file
    writable = set()
    def open_no_folder(path, flags, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        handle = real_open(path, flags, *args, **kwargs)
        (writable.add if flags & (os.O_RDWR | os.O_WRONLY) else writable.discard)(handle)
        return handle
    def fsync(handle):
        if handle not in writable:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real_fsync(handle)
    os.open, os.fsync = open_no_folder, fsync
    hidden = ("/proc", "/sys")
    pathlib.Path.is_file = lambda path, **kwargs: not str(path).startswith(hidden) and is_file(path, **kwargs)

if __name__ == "__main__":
    if METHOD == "bare":
        import torch  # torch itself is another build there
        take_away()
    else:
        multiprocessing.set_start_method(METHOD)
    import train_retrieval
    sys.exit(train_retrieval.main(argv))
"""


def elsewhere(folder: Path, method: str, *args: str) -> subprocess.CompletedProcess:
    (folder / "elsewhere.py").write_text(ELSEWHERE)
    argv = ["--config", folder / "config.yaml", "--output_dir", folder / "out", "--device", "cpu", *args]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [str(word) for word in [sys.executable, folder / "elsewhere.py", method, *argv]]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_without_what_only_unix_has(tiny_run):
    for args in (["--check"], SHORT, ["--evaluate"]):
        ended = elsewhere(tiny_run, "bare", *args)
        assert ended.returncode == 0, ended.stderr[-3000:]
    assert {"log.txt", "checkpoint_best.pth", "evaluate.txt"} <= {path.name for path in (tiny_run / "out").iterdir()}


def test_workers_that_are_spawned(tiny_run):
    """As on Windows and macOS, where a worker inherits nothing."""
    ended = elsewhere(tiny_run, "spawn", *SHORT, "num_workers=1")
    assert ended.returncode == 0, ended.stderr[-3000:]


def test_memory_is_in_megabytes_or_0(monkeypatch):
    assert 20 < utils.memory_mb(torch.device("cpu")) < 1e6
    monkeypatch.setitem(sys.modules, "resource", None)
    assert utils.memory_mb(torch.device("cpu")) == 0
