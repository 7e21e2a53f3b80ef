"""Training less of the model: what is frozen does not move, and the rest trains as if nothing were frozen."""

import re

import pytest
import torch

import train_retrieval
from checkpoints.load import load_pretrained
from checkpoints.weights import QUEUES
from configs.schema import RetrievalConfig
from models.blip_retrieval import BLIP_Retrieval
from models.freezing import depths_below_heads, freeze, training_table
from tests.conftest import tiny_model
from tests.golden import argmax_instead_of_sampling
from tests.test_train_step import inputs
from training.loop import compute_gradients
from training.schedule import build_optimizer
from training.step import train_step

PARTS = [["image"], ["text"], ["image:3"], ["image:0"], ["text:1"], ["image:4", "text:1"], ["image", "text"]]


def config(**values) -> RetrievalConfig:
    return RetrievalConfig(dataset="custom", image_root="x", test_file="t.json", **values)


def model_of(parts: list[str], dtype: torch.dtype = torch.float64) -> BLIP_Retrieval:
    torch.manual_seed(0)
    model = tiny_model(dtype)
    freeze(model, parts)
    return model.train()


def is_frozen(name: str, parts: list[str]) -> bool:
    """By the words of the documentation, not by the code."""
    for part in parts:
        side, _, count = part.partition(":")
        count = int(count or 99)
        if side == "image" and name.startswith("visual_encoder."):
            block = re.match(r"visual_encoder\.blocks\.(\d+)\.", name)
            if block and int(block[1]) < count or not block and (count == 99 or "encoder.norm." not in name):
                return True
        if side == "text" and name.startswith("text_encoder.") and "crossattention" not in name:
            layer = re.match(r"text_encoder\.encoder\.layer\.(\d+)\.", name)
            if not layer or int(layer[1]) < count:
                return True
    return False


@pytest.mark.parametrize("parts", PARTS, ids="+".join)
@pytest.mark.parametrize(("micro_batch", "keep"), [(None, 0), (3, 0), (3, 6)])
def test_the_others_gradients_are_unchanged(monkeypatch, parts, micro_batch, keep):
    argmax_instead_of_sampling(monkeypatch)
    image, text, idx = inputs()
    whole, part = model_of([]), model_of(parts)
    for model in (whole, part):
        train_step(model, image, text, idx, 0.4, 2, micro_batch, keep)
    expected = dict(whole.named_parameters())
    for name, p in part.named_parameters():
        if "_m." in name:
            continue
        assert p.requires_grad is not is_frozen(name, parts), name
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-9, atol=1e-12)
        else:
            assert p.grad is None
    for name in ("image_queue", "text_queue", "idx_queue"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name))


@pytest.mark.parametrize("parts", PARTS, ids="+".join)
def test_frozen_tensors_do_not_move_and_twins_share_them(parts):
    image, text, idx = inputs()
    model = model_of(parts)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = build_optimizer(model, config(init_lr=1e-2, weight_decay=0.1, layer_decay=0.5))
    for _ in range(2):
        optimizer.zero_grad()
        train_step(model, image, text, idx, 0.4, 2, 4)
        optimizer.step()
    after = model.state_dict()
    for key, value in before.items():
        online = key.replace("_m.", ".", 1)
        if online.startswith(("visual_encoder.", "text_encoder.")):
            moved = not torch.equal(value, after[key])
            frozen = is_frozen(online, parts)
            # BERT's padding row and biases of keys have no gradient, but weight decay moves all
            assert moved is not frozen, key
            shared = after[key].data_ptr() == after[online].data_ptr()
            assert key == online or shared is frozen, key


def test_freezing_nothing_is_the_same_step_bit_for_bit():
    image, text, idx = inputs()
    results = []
    for frozen in (None, []):
        torch.manual_seed(0)
        model = tiny_model().train()
        if frozen is not None:
            freeze(model, frozen)
        optimizer = build_optimizer(model, config(init_lr=1e-3, layer_decay=1.0))
        assert [group["scale"] for group in optimizer.param_groups] == [1.0, 1.0]
        torch.manual_seed(1)
        train_step(model, image.float(), text, idx, 0.4, 2, 4)
        optimizer.step()
        results.append(model.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.parametrize("parts", PARTS, ids="+".join)
def test_a_files_own_momentum_twins_do_not_overwrite_frozen_layers(tmp_path, parts):
    torch.manual_seed(5)
    file = tiny_model()
    with torch.no_grad():
        for _, twin in file.twins():
            for p in twin.parameters():
                p.add_(1.0)
    torch.save({"model": file.state_dict()}, tmp_path / "own_twins.pth")
    model = model_of(parts, torch.float32)
    load_pretrained(model, str(tmp_path / "own_twins.pth"))
    expected = file.state_dict()
    for key, value in model.state_dict().items():
        online = key.replace("_m.", ".", 1)
        if key not in QUEUES:
            assert torch.equal(value, expected[online if is_frozen(online, parts) else key]), key


def test_a_frozen_stem_runs_once_and_without_graph(monkeypatch):
    image, text, idx = inputs()
    model = model_of(["image:4"])
    calls = []
    for i, block in enumerate(model.visual_encoder.blocks):
        monkeypatch.setattr(block, "forward", spy(block.forward, i, calls))
    train_step(model, image, text, idx, 0.4, 2, 3, 0)
    micro_batches = -(-len(image) // 3)
    assert [calls.count((i, False)) for i in range(4)] == [micro_batches] * 4
    assert [calls.count((i, True)) for i in range(4)] == [0] * 4
    assert calls.count((4, True)) >= micro_batches - 1  # an image block that trains has a graph
    assert model.visual_encoder_m.blocks[3] is model.visual_encoder.blocks[3]


def spy(forward, number: int, calls: list):
    def noted(*args, **kwargs):
        result = forward(*args, **kwargs)
        calls.append((number, result.requires_grad))
        return result

    return noted


def test_a_stem_with_drop_path_is_not_shared_as_it_is_random(monkeypatch):
    from configs.sizes import VIT_SIZES, VitSize

    monkeypatch.setitem(VIT_SIZES, "nano", VitSize(96, 6, 3, 0.5))
    model = model_of(["image:4"])
    assert model.visual_encoder.stem_depth == 4 and not model.visual_encoder.stem_frozen
    assert model_of(["image:1"]).visual_encoder.stem_frozen  # the first block has none
    train_step(model, *inputs(), 0.4, 2, 3)
    assert model.visual_encoder.blocks[3].attn.qkv.weight.grad is None


def test_layer_decay_is_by_depth_below_the_heads():
    model = model_of(["text:1"])
    depths = depths_below_heads(model)
    assert depths["visual_encoder.blocks.5.attn.qkv.weight"] == 1 and depths["visual_encoder.blocks.0.norm1.bias"] == 6
    assert depths["visual_encoder.pos_embed"] == depths["visual_encoder.patch_embed.proj.weight"] == 7
    layers = len(model.text_encoder.encoder.layer)
    top = f"text_encoder.encoder.layer.{layers - 1}."
    assert depths[top + "output.dense.weight"] == 1 and depths[top + "crossattention.self.key.weight"] == 0
    assert depths["vision_proj.weight"] == depths["itm_head.bias"] == depths["visual_encoder.norm.weight"] == 0
    assert not any("embeddings" in name and name.startswith("text") for name in depths)  # frozen

    optimizer = build_optimizer(model, config(init_lr=1e-3, layer_decay=0.5, temp_lr_scale=3.0))
    scales = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"]}
    for name, depth in depths.items():
        p = model.get_parameter(name)
        assert scales[id(p)] == (3.0 if name == "temp" else 0.5**depth), name
    assert len(scales) == len(depths) == sum(len(group["params"]) for group in optimizer.param_groups)


def test_the_table_counts_every_parameter_once():
    model = model_of(["image:2", "text:1"])
    rows = training_table(model, 0.5)
    numbers = [re.match(r"  (.+?) +([\d.]+) M train +([\d.]+) M frozen +rate x (\S+)", row).groups() for row in rows]
    online = [p for name, p in model.named_parameters() if "_m." not in name]
    assert sum(float(n[1]) for n in numbers) == pytest.approx(
        sum(p.numel() for p in online if p.requires_grad) / 1e6, abs=0.1
    )
    assert sum(float(n[2]) for n in numbers) == pytest.approx(
        sum(p.numel() for p in online if not p.requires_grad) / 1e6, abs=0.1
    )
    by_name = {n[0]: float(n[3]) for n in numbers}
    assert list(by_name)[-2:] == ["cross-attention", "heads"] and float(numbers[-1][2]) == 0
    assert by_name["image block 1"] == 0 and by_name["image block 5"] == 0.5 and by_name["heads"] == 1


def test_more_layers_than_there_are(tiny_run, capsys):
    args = ["--config", str(tiny_run / "config.yaml"), "--output_dir", str(tiny_run / "out"), "--device", "cpu"]
    assert train_retrieval.main([*args, "--set", "freeze=[image:7]"]) == 2
    assert "freeze: image:7, but that encoder has 6 layers: lower the number" in capsys.readouterr().err
    assert train_retrieval.main([*args, "--set", "freeze=[picture]"]) == 2
    assert "freeze: 'picture' is not image, text, image:N or text:N" in capsys.readouterr().err


def test_a_run_with_less_to_train_resumes_to_the_bit_and_dry_run_says_what_is_saved(tiny_run, capsys):
    less = ["--set", "freeze=[image:4, text:1]", "layer_decay=0.7", "eval_before=false", "save_every_steps=1"]
    common = ["--config", str(tiny_run / "config.yaml"), "--device", "cpu"]
    assert train_retrieval.main([*common, "--output_dir", str(tiny_run / "a"), *less, "keep_last=10"]) == 0
    (tiny_run / "b").mkdir()
    save = next((tiny_run / "a").glob("checkpoint_e000_s000001.pth"))
    (tiny_run / "b" / save.name).write_bytes(save.read_bytes())
    rest = ["--output_dir", str(tiny_run / "b"), *less, "--resume", "auto"]
    assert train_retrieval.main([*common, *rest]) == 0
    a, b = (torch.load(tiny_run / x / "checkpoint_e002_s000000.pth", weights_only=True) for x in "ab")
    assert all(torch.equal(value, b["model"][key]) for key, value in a["model"].items())
    assert not torch.equal(a["model"]["vision_proj.weight"], torch.load(save)["model"]["vision_proj.weight"])
    assert (tiny_run / "a" / "console.log").read_text().count("image block") == 6
    capsys.readouterr()
    assert train_retrieval.main([*common, *rest[:-2], "--resume", "auto", "--set", "freeze=[image]"]) == 2
    assert "freeze is ['image'], was ['image:4', 'text:1']" in capsys.readouterr().err
    assert train_retrieval.main([*common, "--output_dir", str(tiny_run / "c"), "--dry_run", *less]) == 0
    said = capsys.readouterr().out
    assert re.search(r"frozen: \d\.\d M parameters.*twins share \d+ MB of weights, and .* saves a second one", said)


@pytest.mark.parametrize("key", ["freeze", "layer_decay"])
def test_both_work_in_compute_gradients_under_bf16(key):
    model = model_of(["image:3"] if key == "freeze" else [], torch.float32)
    from data.retrieval import TrainBatch

    image, text, idx = inputs()
    cfg = config(batch_size_train=4, global_batch_size=len(image), ranks_emulated=2, precision="bf16", queue_size=64)
    compute_gradients(model, TrainBatch(image.float(), text, idx, []), cfg, 0, range(2), 0, 0, 0, 4)
    assert torch.isfinite(model.vision_proj.weight.grad).all()
