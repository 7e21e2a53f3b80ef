"""Several machines: what a step sends over the network, and a machine that dies and comes back."""

import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.conftest import random_captions, tiny_model
from tests.test_train import LAUNCHER, ROOT, lines
from training.preflight import launcher_warnings
from training.step import train_step
from transform.text import MAX_TOKENS, tokenize
from utils import average_gradients

WIDTH = 32  # of tiny_model's features

# ---------------------------------------------------------------- traffic


@pytest.fixture
def sent(monkeypatch):
    """Bytes that this process hands to each collective; the others, of which there are none, answer with the same."""
    counted: Counter[str] = Counter()

    def all_gather(parts, x):
        counted["gathered"] += x.nbytes
        for part in parts:
            part.copy_(x)

    def all_reduce(x):
        counted["averaged"] += x.nbytes

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)  # any other collective would miss the process group
    return counted


def bytes_of_a_step(sent, samples: int, side: int, all_rank: bool) -> tuple[dict[str, int], int]:
    """What one process hands over in a step of so many samples of its own, and the bytes of all gradients."""
    model = tiny_model(negative_all_rank=all_rank, image_size=side).train()
    idx = torch.arange(samples)
    sent.clear()
    train_step(model, torch.randn(samples, 3, side, side), tokenize(random_captions(samples)), idx, 0.4, micro_batch=2)
    average_gradients(model)
    return dict(sent), sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("all_rank", [True, False])
@pytest.mark.parametrize("processes", [2, 4, 8])
def test_a_step_sends_features_ids_and_gradients_only(sent, monkeypatch, processes, all_rank):
    """docs/training.md has the same sum: nothing in it depends on the image's size or the number of processes."""
    monkeypatch.setattr(dist, "get_world_size", lambda: processes)
    for samples in (2, 6):
        features, ids = 2 * WIDTH * 4, 8  # of image and text, momentum encoders
        pool = 2 * WIDTH * 4 + 8 + 2 * MAX_TOKENS * 8 + 2 * 8  # online features, id, tokens and mask, two draws
        found = {side: bytes_of_a_step(sent, samples, side, all_rank) for side in (32, 64)}
        for counted, gradients in found.values():
            assert counted == {"gathered": samples * (features + ids + pool * all_rank), "averaged": gradients}


# ---------------------------------------------------------------- a machine that dies

# Train like train_retrieval.py, but at one step a machine loses power: its launcher and all its processes are gone.
NODE = """
import os, signal, sys
from pathlib import Path
import train_retrieval
from training import loop
rank, count, marker, *argv = sys.argv[1:]
steps, original = 0, loop.average_gradients
def average_gradients(model):
    global steps
    steps += 1
    if steps == int(count) and os.environ["RANK"] == rank and not os.path.exists(marker):
        open(marker, "w").close()
        launcher = os.getppid()
        processes = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        for process in [launcher, *(int(p) for p in processes if int(p) != os.getpid()), os.getpid()]:
            os.kill(process, signal.SIGKILL)
    original(model)
loop.average_gradients = average_gradients
sys.exit(train_retrieval.main(argv))
"""
STEPS = ["save_every_steps=1", "ranks_emulated=4", "batch_size_train=2", "max_epoch=1"]


def start(folder: Path, output: str, launcher: list[str], rank: int, count: int) -> subprocess.Popen:
    argv = ["--config", folder / "config.yaml", "--output_dir", folder / output, "--device", "cpu", "--resume", "auto"]
    command = [*launcher, folder / "node.py", rank, count, folder / "marker", *argv, "--set", *STEPS]
    shared = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(
        [str(word) for word in command], cwd=folder, env={**os.environ, **shared}, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen) -> int:
    _, words = process.communicate(timeout=240)
    print(words[-3000:])
    return process.returncode


def test_a_launcher_that_could_not_take_a_machine_back_is_warned_of(monkeypatch):
    assert launcher_warnings() == []
    several = {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for key, value in several.items():
        monkeypatch.setenv(key, value)
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in launcher_warnings()[0]
    for key, other in (("GROUP_WORLD_SIZE", "1"), ("TORCHELASTIC_MAX_RESTARTS", "0")):
        with monkeypatch.context() as patch:
            patch.setenv(key, other)
            assert launcher_warnings() == []
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert launcher_warnings() == []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the processes of a launcher are Linux's to tell")
def test_a_machine_that_dies_and_comes_back_costs_nothing_but_time(tiny_run):
    """Two launchers of two processes; the one without the meeting point dies. One launcher of four is undisturbed."""
    (tiny_run / "node.py").write_text(NODE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", "--max_restarts=3"),
        *("--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test", "--local_addr=127.0.0.1"),
    ]
    quick = "keep_alive_interval=1,last_call_timeout=1"
    hosts, other = ([*launcher, f"--rdzv_conf=is_host={number},{quick}"] for number in (1, 0))
    machines = [start(tiny_run, "out", hosts, 3, 2), start(tiny_run, "out", other, 3, 2)]
    try:
        assert ended(machines[1]) == -9 and (tiny_run / "marker").exists()
        assert machines[0].poll() is None
        machines[1] = start(tiny_run, "out", other, 3, 2)
        assert [ended(machine) for machine in machines] == [0, 0]
    finally:
        for machine in machines:
            machine.kill()
    assert ended(start(tiny_run, "undisturbed", [*LAUNCHER, "4"], 3, 10**6)) == 0
    disturbed, undisturbed = (lines(tiny_run / name / "log.txt") for name in ("out", "undisturbed"))
    assert disturbed == undisturbed and len(undisturbed) == 3
    weights = [torch.load(tiny_run / name / "checkpoint_best.pth")["model"] for name in ("out", "undisturbed")]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
