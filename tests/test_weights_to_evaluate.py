"""Which weights --evaluate loads, and what it says about them; early stopping; a resume without a save."""

import pytest

import train_retrieval
from checkpoints import download
from checkpoints.runs import find_runs
from tests.test_train import lines, run

pytestmark = pytest.mark.usefixtures("tiny_run")


def said(capsys) -> str:
    return capsys.readouterr().err


def test_the_order_of_what_is_loaded(tiny_run, capsys, tmp_path):
    assert run(tiny_run, "--evaluate") == 2  # neither a run nor a key: not random weights in silence
    error = said(capsys).splitlines()[-1]
    assert "nothing to evaluate" in error and "--checkpoint" in error and "--random_weights" in error
    assert run(tiny_run, "--set", "max_epoch=1") == 0
    best, other = tiny_run / "out" / "checkpoint_best.pth", tmp_path / "other.pth"
    other.write_bytes(best.read_bytes())
    named = ("--set", f"finetuned={other}", f"pretrained={other}")
    for args, source, why in (
        (("--checkpoint", str(other)), other, "--checkpoint names it"),
        (named, best, "the best weights of this run folder"),
        ((*named, "--random_weights"), "random", "--random_weights asks for it"),
    ):
        capsys.readouterr()
        assert run(tiny_run, "--evaluate", *args) == 0
        err = said(capsys)
        assert f"weights: {source} ({why})" in err and err.count(why) == 2  # at the head and under the tables
    best.unlink()
    assert run(tiny_run, "--evaluate") == 2  # the run was stopped before its first validation
    save = tiny_run / "out" / "checkpoint_e001_s000000.pth"
    assert f"--checkpoint {save} evaluates its last save" in said(capsys)
    for key, why in (("finetuned", "the config's `finetuned`"), ("pretrained", "the config's `pretrained`")):
        assert run(tiny_run, "--evaluate", "--set", f"{key}={other}") == 0
        assert f"weights: {other} ({why}" in said(capsys)


def test_ones_own_run_scores_as_its_test_row_did(tiny_run):
    assert run(tiny_run, "--set", "max_epoch=1") == 0
    trained = lines(tiny_run / "out" / "log.txt")[-1]
    # the config that lies in the run folder implies that folder
    config = str(tiny_run / "out" / "config.yaml")
    assert train_retrieval.main(["--config", config, "--device", "cpu", "--evaluate"]) == 0
    (result,) = lines(tiny_run / "out" / "evaluate.txt")
    assert {k: v for k, v in result.items() if "_r" in k and k.startswith("test_")} == {
        k: v for k, v in trained.items() if "_r" in k and k.startswith("test_")
    }


def test_a_config_elsewhere_names_its_folder_after_itself(tiny_run):
    args = train_retrieval.parse_args(["--config", str(tiny_run / "config.yaml")])
    assert str(args.output_dir) == "output/config"


@pytest.mark.parametrize("args", [["--checkpoint", "x.pth"], ["--random_weights"]])
def test_options_of_evaluation_are_refused_in_training(tiny_run, capsys, args):
    with pytest.raises(SystemExit) as end:
        run(tiny_run, *args)
    assert end.value.code == 2 and "go with --evaluate" in said(capsys)


def test_resume_without_a_save_says_that_it_starts_anew(tiny_run, capsys):
    assert run(tiny_run, "--resume", "auto", "--set", "max_epoch=1") == 0
    assert "holds no save of a run, so this run STARTS ANEW" in said(capsys)


def test_a_finished_run_whose_saves_are_gone_is_not_started_anew(tiny_run, capsys):
    assert run(tiny_run, "--set", "max_epoch=1") == 0
    for path in find_runs(tiny_run / "out"):
        path.unlink()
    before = {path: path.read_bytes() for path in (tiny_run / "out").iterdir()}
    assert run(tiny_run, "--resume", "auto") == 2
    assert "holds checkpoint_best.pth, but no save to go on from" in said(capsys)
    assert run(tiny_run, "--resume", str(tiny_run / "out")) == 2
    assert "out: is a folder. Name a save in it" in said(capsys)
    assert {path: path.read_bytes() for path in (tiny_run / "out").iterdir()} == before


def test_a_checkpoint_that_is_not_here_yet_is_told_from_one_that_is(tiny_run, capsys, monkeypatch):
    """An address's own file name is not its name in the cache."""
    monkeypatch.setenv("BLIP_CACHE", str(tiny_run))
    address = "https://example.org/a/mine.pth"
    (tiny_run / "mine.pth").write_bytes(b"somebody else's")
    check = ["--check", "--evaluate", "--set", f"finetuned={address}", "vit=auto"]
    assert run(tiny_run, *check) == 0
    assert f"{address}: not here yet, so neither its sizes" in capsys.readouterr().out
    monkeypatch.setattr(download, "_file_name", lambda address: "mine.pth")
    assert run(tiny_run, *check) == 2
    assert "mine.pth" in said(capsys)


def test_validation_before_the_first_step_can_be_left_out(tiny_run):
    assert run(tiny_run, "--set", "eval_before=false") == 0
    assert [row.get("epoch") for row in lines(tiny_run / "out" / "log.txt")] == [0, 1, None]


def test_patience_ends_training_and_tests_the_best(tiny_run, capsys, monkeypatch):
    values = iter([50.0, 40.0, 30.0, 20.0])

    def falling(model, cfg, annotations, split, poll):
        return {f"{split}_r_mean": next(values) if split == "val" else 1.0}, None

    monkeypatch.setattr("training.loop.evaluate", falling)
    monkeypatch.setattr("training.loop.chance_warning", lambda *_: "")
    monkeypatch.setattr("training.loop.save_rankings", lambda *_: None)
    more = ("--set", "max_epoch=9", "patience=2", "eval_before=false")
    assert run(tiny_run, *more) == 0
    rows = lines(tiny_run / "out" / "log.txt")
    assert [row.get("epoch") for row in rows] == [0, 1, 2, None] and rows[-1]["best_epoch"] == 0
    assert "no better val r_mean for 2 epochs" in said(capsys)
    assert run(tiny_run, *more, "--resume", "auto") == 0  # it does not go on by itself
    assert [row.get("epoch") for row in lines(tiny_run / "out" / "log.txt")] == [0, 1, 2, None]


def test_more_epochs_on_resume_say_what_becomes_of_the_learning_rate(tiny_run, capsys):
    assert run(tiny_run, "--set", "max_epoch=1") == 0
    assert run(tiny_run, "--resume", "auto", "--set", "max_epoch=2") == 0
    assert "max_epoch is 2, was 1: from here on the learning rate follows the cosine" in said(capsys)
