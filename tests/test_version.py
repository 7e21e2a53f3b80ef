"""Which code runs, as utils.code_version says it: in a checkout and outside one; in every save."""

import subprocess

import pytest
import torch

import utils
from checkpoints.__main__ import export_folder, main
from checkpoints.load import load_pretrained
from checkpoints.runs import save_checkpoint
from checkpoints.weights import weights_sha256
from tests.conftest import tiny_med, tiny_model


def git(folder, *args: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    command = ["git", "-C", str(folder), *identity, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def version(tmp_path, monkeypatch):
    """code_version() as it would be with utils.py in `tmp_path`."""
    monkeypatch.setattr(utils, "REPOSITORY", tmp_path.resolve())
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "blip-retrieval"\nversion = "0.9.0"\n')
    return utils.code_version.__wrapped__


def test_outside_a_checkout_it_is_the_version_alone(tmp_path, version, monkeypatch):
    assert version() == "0.9.0"
    monkeypatch.setenv("PATH", "")  # no git either
    assert version() == "0.9.0"
    (tmp_path / "pyproject.toml").write_text("not [ TOML")
    monkeypatch.setattr(utils.importlib.metadata, "version", lambda name: {"blip-retrieval": "1.2"}[name])
    assert version() == "1.2"


def test_nothing_is_known_without_a_project_file_and_an_installation(tmp_path, version, monkeypatch):
    def absent(name):
        raise utils.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(utils.importlib.metadata, "version", absent)
    (tmp_path / "pyproject.toml").unlink()
    assert version() == "unknown"


def test_in_a_checkout_it_names_the_commit_and_changed_files(tmp_path, version):
    git(tmp_path, "init")
    assert version() == "0.9.0"  # no commit yet
    git(tmp_path, "add", "pyproject.toml")
    git(tmp_path, "commit", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")[:10]
    (tmp_path / "notes.txt").write_text("untracked files do not count")
    assert version() == f"0.9.0 ({commit})"
    with open(tmp_path / "pyproject.toml", "a") as file:
        file.write("# changed\n")
    assert version() == f"0.9.0 ({commit}, modified)"


def test_a_folder_in_somebody_elses_checkout_has_no_commit(tmp_path, version, monkeypatch):
    git(tmp_path, "init")
    git(tmp_path, "add", "pyproject.toml")
    git(tmp_path, "commit", "-m", "first")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "pyproject.toml").write_text('[project]\nversion = "3"\n')
    monkeypatch.setattr(utils, "REPOSITORY", tmp_path.resolve() / "inside")
    assert version() == "3"


def test_saves_say_which_code_wrote_them(tmp_path, capsys):
    model = tiny_model()
    path = tmp_path / "a.pth"
    save_checkpoint(path, model, torch.optim.AdamW(model.parameters()), {"vit": "nano"}, 0)
    assert torch.load(path, weights_only=True)["code"] == utils.code_version()
    assert main(["inspect", str(path)]) == 0
    assert f"code: {utils.code_version()}\n" in capsys.readouterr().out


def test_the_hash_of_weights_is_that_of_the_online_model_in_every_format(tmp_path):
    med = tiny_med()
    model = tiny_model(med_config=med)
    save_checkpoint(
        tmp_path / "a.pth",
        model,
        torch.optim.AdamW(model.parameters()),
        {"vit": "nano", "image_size": 32, "patch_size": 16, "embed_dim": 32},
        0,
    )
    export_folder(str(tmp_path / "a.pth"), tmp_path / "hf")
    expected = weights_sha256(model)
    for source in ("a.pth", "hf"):
        other = tiny_model(med_config=med, queue_size=8)  # weights of its own
        assert weights_sha256(other) != expected
        load_pretrained(other, str(tmp_path / source))
        assert weights_sha256(other) == expected
    with torch.no_grad():
        model.vision_proj_m.bias.add_(1)
        model.image_queue.add_(1)
    assert weights_sha256(model) == expected
    assert weights_sha256(model.to(torch.float64)) == expected
    with torch.no_grad():
        model.temp.add_(0.001)
    assert weights_sha256(model) != expected
