"""The benchmark of the evaluation at a tiny size: it runs, compares, and prints its table."""

import json
import re

import pytest

from benchmarks.bench_evaluate import main


@pytest.fixture
def options(tmp_path) -> list[str]:
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    (tmp_path / "med.json").write_text(json.dumps(sizes))
    text = ["--vit", "nano", "--image_size", "32", "--med_config", str(tmp_path / "med.json")]
    return [*text, "--gallery", "30", "90", "--k", "8", "--small", "4", "12", "--ablation_pairs", "16"]


@pytest.mark.parametrize("extra", ["--images 3", "--images 30 --precision bf16 --exact --repeats 2"])
def test_scores_and_recall_are_equal(options, extra, capsys):
    main([*options, *extra.split()])
    out = capsys.readouterr().out
    assert len(re.findall(r"^\| [^|]+\|( [^|]+\|){5}$", out, re.MULTILINE)) == 9, out
    lines = {line.split(":")[0]: line for line in out.splitlines() if "largest score difference" in line}
    assert set(lines) == {"published", "transformers", "this repository"}
    assert "Recall equal" in lines["this repository"]
    if "bf16" in extra:
        assert "Recall of the whole gallery is equal to float32's" in out
    else:
        for line in lines.values():
            assert float(re.search(r"float32 (\S+),", line)[1]) < 1e-5
            assert "Recall equal" in line
