"""The start of the program: what takes seconds to import waits until the command line and the YAML are right."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SLOW = ("torch", "timm", "transformers", "torchvision")
CODE = f"""
import sys
import train_retrieval
status = None
try:
    if sys.argv[1:]:
        status = train_retrieval.main(sys.argv[1:])
except SystemExit as end:  # argparse's way out
    status = end.code
print("status", status)
print("imported", [name for name in {SLOW} if name in sys.modules])
"""
CONFIG = "dataset: flickr\nimage_root: images\nann_root: annotation\n"

# name: lines that the YAML has besides, arguments after --config, exit status, words of the message
CASES = {
    "an unknown key": ("qeue_size: 24\n", [], 2, ["qeue_size", "did you mean 'queue_size'"]),
    "a wrong value": ("image_size: wide\n", [], 2, ["image_size", "wide"]),
    "a value out of range": ("alpha: 7\n", [], 2, ["alpha", "7"]),
    "a wrong --set": ("", ["--set", "qeue_size=24"], 2, ["--set", "did you mean 'queue_size'"]),
    "a --set without a value": ("", ["--set", "queue_size"], 2, ["queue_size"]),
    "an unknown argument": ("", ["--outputdir", "x"], 2, ["--outputdir"]),
    "--help": ("", ["--help"], 0, ["--config"]),
}


def started(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    command, environment = [sys.executable, "-c", CODE, *argv], {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def test_importing_the_program_imports_nothing_slow():
    done = started()
    assert done.stdout == "status None\nimported []\n", done.stderr


@pytest.mark.parametrize("name", CASES)
def test_help_and_mistakes_in_the_config_do_not_wait_for_torch(tmp_path, name):
    yaml, args, status, words = CASES[name]
    (tmp_path / "config.yaml").write_text(CONFIG + yaml)
    done = started("--config", str(tmp_path / "config.yaml"), *args)
    assert done.stdout.endswith(f"status {status}\nimported []\n"), done.stdout + done.stderr
    assert all(word in done.stdout + done.stderr for word in words), done.stdout + done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_rank_0_says_what_is_wrong_with_the_config(tmp_path, rank):
    (tmp_path / "config.yaml").write_text(CONFIG + "qeue_size: 24\n")
    done = started("--config", str(tmp_path / "config.yaml"), RANK=str(rank), WORLD_SIZE="2")
    assert done.stdout == "status 2\nimported []\n"
    assert done.stderr.count("error: ") == (1 if rank == 0 else 0) and ("queue_size" in done.stderr) == (rank == 0)


@pytest.mark.slow
def test_the_launcher_lets_rank_0_speak(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG + "qeue_size: 24\n")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    command = [*launcher, "train_retrieval.py", "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode and done.stderr.count("error: ") == 1, done.stderr
    assert done.stderr.count("did you mean 'queue_size'") == 2, done.stderr  # by rank 0, and in the launcher's box


def test_the_names_are_those_that_a_run_imports():
    """Should a library leave, the tests above would look for nothing."""
    code = f"import sys, models.blip_retrieval, transform.image; assert all(name in sys.modules for name in {SLOW})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
