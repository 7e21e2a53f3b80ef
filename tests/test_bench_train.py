"""The benchmark of the training step at a tiny size: it runs, compares gradients, counts, and prints its table."""

import json
import re

import pytest

from benchmarks.bench_train_step import main


@pytest.fixture
def options(tmp_path) -> list[str]:
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    (tmp_path / "med.json").write_text(json.dumps(sizes))
    size = ["--vit", "nano", "--image_size", "32", "--queue_size", "64", "--med_config", str(tmp_path / "med.json")]
    return [*size, "--batch", "8", "--steps", "1", "--warm_up", "1"]


@pytest.mark.parametrize(
    ("extra", "differs"),
    [(["--ranks", "2", "--micro_batch", "3"], 1e-5), (["--local_negatives", "--precision", "bf16"], 0.05)],
)
def test_gradients_are_equal(options, extra, differs, capsys):
    main([*options, *extra])
    out = capsys.readouterr().out
    rows = [row for row in re.findall(r"^\| .+ \|$", out, re.MULTILINE) if "| precision |" not in row]
    words = [row.split("|")[1].strip(" *") for row in rows]
    bfloat16 = ["this repository, attention in bfloat16"] * ("bf16" in extra)
    assert words == ["published", "published, fused attention", "this repository", *bfloat16]
    assert 0 < float(rows[2].split("|")[-2]) < differs
    assert float(re.search(r"worst parameter: \w+ (\S+)", out)[1]) < 10 * differs


def test_the_recipes_arithmetic_falls_by_the_stated_factor(capsys):
    """Counted on shapes at the published size, ViT-B/16 at 384 pixels: no GPU, no memory."""
    main(["--count_only", "--batch", "32"])
    found = re.search(r"published (\S+) GFLOP; ours with all graphs kept (\S+) \((\S+)x less", capsys.readouterr().out)
    assert float(found[1]) == pytest.approx(721, abs=2)
    assert float(found[3]) >= 1.35
