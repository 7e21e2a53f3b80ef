"""Low-rank updates against the dense gradient, in twins, files and a run."""

import json

import pytest
import torch
from ruamel.yaml import YAML

import train_retrieval
from checkpoints.load import load_pretrained
from checkpoints.weights import merge_lora
from configs.schema import LORA_TARGETS, RetrievalConfig
from models import load
from models.freezing import train_less
from models.lora import TARGETS, LowRank
from tests.conftest import tiny_model
from tests.golden import argmax_instead_of_sampling
from tests.test_train_step import inputs
from training.schedule import build_optimizer
from training.step import train_step

EVERYTHING = {"rank": 3, "alpha": 6.0, "targets": list(LORA_TARGETS)}


def config(**values) -> RetrievalConfig:
    return RetrievalConfig(dataset="custom", image_root="x", test_file="t.json", **values)


def model_of(lora=None, freeze=None, dtype=torch.float64):
    torch.manual_seed(0)
    model = tiny_model(dtype)
    train_less(model, config(lora=lora, freeze=freeze))
    return model.train()


def updates(model) -> dict[str, LowRank]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRank)}


def shake(model) -> None:
    with torch.no_grad():
        for update in updates(model).values():
            update.B.normal_(0, 0.05)


def test_the_two_lists_of_targets_are_one():
    assert list(TARGETS) == list(LORA_TARGETS)
    assert len(updates(model_of(EVERYTHING))) == 6 * 4 + len(tiny_model().text_encoder.encoder.layer) * 10


@pytest.mark.parametrize(("micro_batch", "keep"), [(None, 0), (3, 0)])
def test_b_of_zero_is_the_base_and_gradients_are_the_chain_rules(monkeypatch, micro_batch, keep):
    """W' = W + s B A, so dB = s dW' A^T and dA = s B^T dW', where dW' is the gradient of a dense model at W'."""
    argmax_instead_of_sampling(monkeypatch)
    image, text, idx = inputs()
    dense, low = model_of(), model_of(EVERYTHING)
    with torch.no_grad():
        torch.testing.assert_close(low.encode_image(image), dense.encode_image(image), rtol=0, atol=0)
    shake(low)
    dense.load_state_dict(merge_lora(low.state_dict()))
    low.copy_params()
    dense.copy_params()
    for model in (low, dense):
        report = train_step(model, image, text, idx, 0.4, 2, micro_batch, keep)
        losses = {name: value.sum().item() for name, value in report.by_rank.items()}
    assert losses["loss_itm"] > 0
    gradients = {name: p.grad for name, p in dense.named_parameters()}
    checked = 0
    for name, update in updates(low).items():
        weight = gradients[name.replace(".parametrizations.weight.0", ".weight")]
        if weight is None:
            continue
        torch.testing.assert_close(update.B.grad, 2.0 * weight @ update.A.T, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(update.A.grad, 2.0 * update.B.T @ weight, rtol=1e-9, atol=1e-12)
        checked += 1
    assert checked == len(updates(low))
    for name, p in low.named_parameters():
        if name.endswith("original"):
            assert p.grad is None and not p.requires_grad


def test_twins_follow_the_sum():
    low, dense = model_of(EVERYTHING), model_of()
    shake(low)
    dense.load_state_dict(merge_lora(low.state_dict()))
    for model in (low, dense):
        model.momentum = 0.75
        model.update_momentum()
    for key, value in dense.state_dict().items():
        torch.testing.assert_close(merge_lora(low.state_dict())[key], value, rtol=1e-12, atol=1e-12)
    assert not any("_m." in name for name in updates(low))
    assert list(merge_lora(low.state_dict())) == list(dense.state_dict())


def test_a_stem_ends_below_the_lowest_update():
    lora = {"rank": 2, "alpha": 2, "targets": ["image.qkv"]}
    model = model_of(lora, ["image", "text"])
    assert model.visual_encoder.stem_depth == 0 and model.visual_encoder.stem_frozen
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-1] for name in trained if name.startswith("visual_encoder.")} == {"A", "B"}
    assert any("crossattention" in name for name in trained) and "vision_proj.weight" in trained
    assert model.visual_encoder_m.blocks[0] is not model.visual_encoder.blocks[0]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = build_optimizer(model, config(init_lr=1e-2))
    for _ in range(2):
        optimizer.zero_grad()
        train_step(model, *inputs(), 0.4, 2, 3)
        optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert not any(key.endswith("original") for key in moved)
    assert "visual_encoder.blocks.0.attn.qkv.parametrizations.weight.0.B" in moved
    assert "visual_encoder_m.blocks.0.attn.qkv.weight" in moved  # it follows
    assert "visual_encoder_m.blocks.0.mlp.fc1.weight" not in moved


@pytest.mark.parametrize(("lora", "said"), [
    ({"rank": 0, "alpha": 1, "targets": ["image.qkv"]}, "lora: rank must be a whole number from 1, got 0"),
    ({"rank": 4, "alpha": -1, "targets": ["image.qkv"]}, "lora: alpha must be a number above 0"),
    ({"rank": 4, "alpha": 1, "targets": ["image.q"]}, "lora: targets must be a list of image.qkv"),
    ({"rank": 4, "alpha": 1, "targets": 3}, "lora: targets must be a list of image.qkv"),
    ({"rank": 4, "targets": ["image.qkv"]}, "lora needs the keys rank, alpha, targets, got rank, targets"),
])  # fmt: skip
def test_a_wrong_value_is_named(lora, said):
    with pytest.raises(ValueError, match=said):
        config(lora=lora)


def test_a_rank_above_the_weights_own():
    with pytest.raises(
        ValueError, match=r"lora: rank 97 is above the 96 of visual_encoder.blocks.0.attn.qkv: lower it"
    ):
        model_of({"rank": 97, "alpha": 1, "targets": ["image.qkv"]})


def test_a_run_resumes_exports_and_evaluates_as_the_sum(tiny_run, capsys):
    values = YAML().load(tiny_run / "config.yaml") | {
        "lora": {"rank": 2, "alpha": 4, "targets": ["image.qkv", "text.mlp"]}, "init_lr": 1e-2, "eval_before": False,
        "freeze": ["image"], "save_every_steps": 1, "keep_last": 10,
    }  # fmt: skip
    YAML().dump(values, tiny_run / "lora.yaml")
    args = ["--config", str(tiny_run / "lora.yaml"), "--device", "cpu", "--output_dir"]
    assert train_retrieval.main([*args, str(tiny_run / "a")]) == 0
    (tiny_run / "b").mkdir()
    save = tiny_run / "a" / "checkpoint_e000_s000001.pth"
    (tiny_run / "b" / save.name).write_bytes(save.read_bytes())
    assert train_retrieval.main([*args, str(tiny_run / "b"), "--resume", "auto"]) == 0
    a, b = (torch.load(tiny_run / x / "checkpoint_e002_s000000.pth", weights_only=True)["model"] for x in "ab")
    assert all(torch.equal(value, b[key]) for key, value in a.items())
    assert any(key.endswith("0.B") and value.abs().sum() > 0 for key, value in a.items())

    best = torch.load(tiny_run / "a" / "checkpoint_best.pth", weights_only=True)["model"]
    assert not any("parametrizations" in key for key in best)  # the published layout
    rows = [json.loads(line) for line in (tiny_run / "a" / "log.txt").read_text().splitlines()]
    assert train_retrieval.main([*args, str(tiny_run / "a"), "--evaluate"]) == 0
    row = json.loads((tiny_run / "a" / "evaluate.txt").read_text())
    assert row["test_r_mean"] == rows[-1]["test_r_mean"]
    assert row["checkpoint_sha256"] == rows[-1]["checkpoint_sha256"]

    last = sorted((tiny_run / "a").glob("checkpoint_e0*.pth"))[-1]
    blip, merged = load(last), merge_lora(torch.load(last, weights_only=True)["model"])
    torch.testing.assert_close(blip.model.state_dict()["visual_encoder.blocks.0.attn.qkv.weight"],
                               merged["visual_encoder.blocks.0.attn.qkv.weight"])  # fmt: skip
    assert "error" not in capsys.readouterr().err


def test_a_run_with_updates_starts_from_a_checkpoint(tiny_run):
    args = ["--config", str(tiny_run / "config.yaml"), "--device", "cpu", "--output_dir"]
    assert train_retrieval.main([*args, str(tiny_run / "a"), "--set", "max_epoch=1"]) == 0
    best = tiny_run / "a" / "checkpoint_best.pth"
    less = [f"pretrained={best}", "lora={rank: 2, alpha: 2, targets: [image.qkv]}", "freeze=[image:2]", "max_epoch=1"]
    for more in (["--check"], []):
        assert train_retrieval.main([*args, str(tiny_run / "b"), *more, "--set", *less]) == 0
    first, last = (torch.load(x, weights_only=True)["model"] for x in (best, tiny_run / "b" / "checkpoint_best.pth"))
    assert torch.equal(first["visual_encoder.blocks.0.mlp.fc1.weight"], last["visual_encoder.blocks.0.mlp.fc1.weight"])
    assert not torch.equal(first["vision_proj.weight"], last["vision_proj.weight"])


def test_plain_weights_load_into_a_model_with_updates(tmp_path):
    plain = model_of(dtype=torch.float32)
    torch.save({"model": plain.state_dict()}, tmp_path / "plain.pth")
    low = model_of(EVERYTHING, dtype=torch.float32)
    shake(low)
    load_pretrained(low, str(tmp_path / "plain.pth"))
    merged = merge_lora(low.state_dict())
    for key, value in plain.state_dict().items():
        if "queue" not in key:
            assert torch.equal(merged[key], value), key
    assert all(update.B.abs().sum() == 0 and update.A.abs().sum() > 0 for update in updates(low).values())
