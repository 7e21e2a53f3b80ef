"""The report of a CUDA card, at toy sizes on the CPU: it runs, and keeps what it has when it is stopped."""

import json
import subprocess
import sys
from argparse import Namespace

import pytest
import torch

from benchmarks import gpu_parts, gpu_report
from tests import test_docs

TOY = ["--device", "cpu", "--toy"]


def report(folder) -> dict:
    (path,) = folder.glob("gpu_*.json")
    for check in (test_docs.test_tables_are_well_formed, test_docs.test_lines_are_not_too_wide):
        check(path.with_suffix(".md"))
    assert sorted(file.suffix for file in folder.iterdir()) == [".json", ".md"]
    return json.loads(path.read_text())


def in_this_process(name, args, seconds):
    """In place of the process of a part; a row comes when it is measured."""
    rows = []
    gpu_report.run_part(name, args, rows.append)
    yield from (gpu_report.ROW + json.dumps(row, default=float) for row in rows)


def test_a_toy_report(tmp_path, monkeypatch):
    """The checks are left out: tests/test_device.py runs by itself. Nothing is compiled, as that takes minutes."""
    monkeypatch.setattr("benchmarks.bench_train_step.compile_encoders", lambda model: None)
    monkeypatch.setattr(gpu_report, "part_lines", in_this_process)
    parts = ["training", "limits", "evaluation", "compiled"]
    assert gpu_report.main([*TOY, "--out", str(tmp_path), "--parts", *parts]) == 0
    got = report(tmp_path)
    for key in ("command", "code", "card", "date", "torch"):
        assert got[key], key
    rows = {name: part["rows"] for name, part in got["parts"].items()}
    assert list(rows) == parts and all(part["status"] == "done" for part in got["parts"].values())
    whole = rows["evaluation"][-1]
    assert (whole["images"], whole["captions"]) == (30, 90) and whole["pairs_per_second"] > 0
    (recall,) = [row for row in rows["evaluation"] if "equal" in row]
    assert recall["equal"]
    said = [row["what"] for row in rows["evaluation"] if row["what"].startswith("this repository:")]
    assert len(said) == 1 and "Recall equal" in said[0]
    steps = {(row["step"], row["precision"]): row for row in rows["training"] if "seconds" in row}
    assert {("published", "bf16"), ("this repository", "bf16"), ("this repository", "fp32")} <= steps.keys()
    apart = {row["precision"]: row["differs"] for row in rows["training"] if "differs" in row}
    assert apart.keys() == {"bf16", "fp32"} and apart["fp32"] < 1e-4 < apart["bf16"] < 0.2
    row = steps["this repository", "fp32"]
    assert row["images_per_second"] == pytest.approx(8 / row["seconds"])
    assert any("keep_graphs auto: 8 of 8" in row["limit"] for row in rows["limits"])
    assert [row["step"] for row in rows["compiled"]] == ["this repository, compiled"]
    page = next(tmp_path.glob("*.md")).read_text()
    assert "toy sizes" in page and "| this repository | bf16 |" in page and got["command"] in page


def test_a_part_whose_results_are_wrong_has_failed(monkeypatch):
    """The rows are there nevertheless."""
    rows, right = [], gpu_parts.bench_train_step.compare_gradients
    monkeypatch.setattr(gpu_parts.bench_train_step, "measure", lambda *_: None)
    monkeypatch.setattr(gpu_parts.bench_train_step, "compare_gradients", lambda *a: right(*a) | {"fp32": (0.01, 0.5)})
    with pytest.raises(RuntimeError, match="a gradient differs, see the rows"):
        gpu_report.run_part("training", gpu_report.parse_args(TOY), rows.append)
    assert [row["worst_parameter"] for row in rows if row.get("differs") == 0.01] == [0.5]
    sets = iter([{"txt_r1": 1.0}, {"txt_r1": 2.0}, {"txt_r1": 1.0}])
    monkeypatch.setattr(gpu_parts, "rank_split", lambda *_: ({"what": "encode and rank"}, next(sets, {})))
    with pytest.raises(RuntimeError, match="a Recall differs, see the rows"):
        gpu_report.run_part("evaluation", gpu_report.parse_args(TOY), rows.append)
    assert [row["equal"] for row in rows if "equal" in row] == [False]


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), ["bf16", "tf32", "fp32"]), ((7, 5), ["tf32", "fp32"])])
def test_a_card_without_bfloat16_is_not_measured_in_it(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda")
    assert gpu_parts.precisions_of(gpu_parts.Sizes(), device) == expected
    assert gpu_parts.default_precision(device) == ("bf16" if "bf16" in expected else "fp32")


@pytest.mark.parametrize("chosen", [None, "3"])
def test_the_checks_see_the_card_that_was_named(monkeypatch, chosen):
    started = []

    class Done:
        stdout, returncode = (), 0

        def __init__(self, command, env, **_):
            started.append((env["CUDA_VISIBLE_DEVICES"], env["TEST_DEVICE"]))

        __enter__ = __exit__ = lambda self, *_: self

    monkeypatch.setattr(subprocess, "Popen", Done)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if chosen:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    gpu_parts.checks(gpu_parts.Sizes(), torch.device("cuda:1"), lambda **_: None)
    assert started == [("3", "cuda:1") if chosen else ("1", "cuda:0")]


def processes(monkeypatch, **code: str):
    """Python code in place of the parts."""
    monkeypatch.setattr(gpu_report, "part_command", lambda name, args: [sys.executable, "-c", code[name]])


PRINTS = 'print(\'row: {"check": "a", "outcome": "passed"}\', flush=True);'


def test_what_was_measured_stays_when_time_runs_out_and_when_a_part_fails(tmp_path, monkeypatch, capsys):
    hangs, fails = PRINTS + "import time; time.sleep(60)", PRINTS + "raise ValueError('a reason')"
    processes(monkeypatch, checks=fails, training=hangs, limits=PRINTS)
    args = [*TOY, "--out", str(tmp_path), "--minutes", "0.1", "--parts", "checks", "training", "limits"]
    assert gpu_report.main(args) == 1
    parts = report(tmp_path)["parts"]
    assert parts["checks"]["status"] == "failed: ValueError: a reason"
    assert parts["training"]["status"] == "stopped, as the 0.1 minutes were over"
    assert [part["rows"] for part in parts.values()][:2] == [[{"check": "a", "outcome": "passed"}]] * 2
    assert "== training, " in capsys.readouterr().out and parts["training"]["seconds"] < 30


def test_a_part_that_is_stopped_leaves_no_process(monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    processes(monkeypatch, limits="import time; time.sleep(60)")
    with pytest.raises(TimeoutError):
        list(gpu_report.part_lines("limits", Namespace(), 0.3))
    assert started[0].poll() is not None


def test_without_a_card_it_says_so(capsys):
    assert gpu_report.main([]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


@pytest.mark.slow
def test_the_checks_are_run_on_the_device(tmp_path):
    assert gpu_report.main([*TOY, "--out", str(tmp_path), "--parts", "checks"]) == 0
    (row,) = report(tmp_path)["parts"]["checks"]["rows"]
    assert row == {"check": "test_any_micro_batch_gives_the_same_gradients[True]", "outcome": "passed"}
