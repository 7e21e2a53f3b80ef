"""Training from separate encoders: their features are those of the libraries that they come from."""

import json
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from ruamel.yaml import YAML
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

import train_retrieval
from checkpoints import towers
from checkpoints.runs import save_checkpoint
from checkpoints.towers import read_image_tower, read_text_tower
from configs.schema import RetrievalConfig
from configs.sizes import VIT_SIZES, VitSize
from models import load
from models.blip_retrieval import BLIP_Retrieval, build_model
from models.towers import Plan, plan_model, start_from_towers
from tests.conftest import tiny_med, tiny_model
from transform.text import blip_tokenizer, tokenize

REAL = dict(VIT_SIZES)
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def small_clip(monkeypatch):
    """CLIP's entries with nano's size."""
    monkeypatch.setitem(VIT_SIZES, "clip_base", VitSize(96, 6, 3, 0.0, "quick_gelu", True, 1e-5))
    monkeypatch.setitem(VIT_SIZES, "openclip_base", VitSize(96, 6, 3, 0.0, "gelu", True, 1e-5))


def config(tmp_path: Path, **values) -> RetrievalConfig:
    """A config whose text encoder is tiny."""
    med = tmp_path / "med.json"
    med.write_text(json.dumps({k: v for k, v in vars(tiny_med()).items()}))
    kinds = {"dataset": "custom", "image_root": "x", "test_file": "t.json", "patch_size": 8, "image_size": 32,
             "embed_dim": 16, "queue_size": 64, "med_config": str(med)}  # fmt: skip
    return RetrievalConfig(**{**kinds, **values})


def timm_vit(**kwargs) -> nn.Module:
    """timm's, of nano's size, with weights far from their small init."""
    kinds = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3, "num_classes": 0}
    return shaken(timm.models.VisionTransformer(**{**kinds, **kwargs})).eval()


def shaken(model: nn.Module) -> nn.Module:
    """Weights such that activations are of order one, and none is special."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(0, 0.5 if "pos" in name or "cls" in name or "class" in name else p[0].numel() ** -0.5)
            else:
                p.add_(0.3 * torch.randn_like(p))
    return model


def started(cfg: RetrievalConfig) -> tuple[BLIP_Retrieval, object, Plan]:
    plan = plan_model(cfg)
    model = build_model(plan.cfg, plan.med, plan.tokenizer)
    report = start_from_towers(model, plan)
    return model.eval(), report, plan


# ---- image ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def assert_image_features(model: BLIP_Retrieval, expected: torch.Tensor, image: torch.Tensor) -> None:
    got = model.visual_encoder(image)
    torch.testing.assert_close(got, expected, **CLOSE)
    torch.testing.assert_close(model.visual_encoder(image, cls_only=True), expected[:, :1], **CLOSE)
    torch.testing.assert_close(model.visual_encoder_m(image), expected, **CLOSE)
    assert expected.std() > 0.3  # the comparison is of something


@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_timm_names_and_layer_scale(tmp_path, layer_scale):
    theirs = timm_vit(init_values=layer_scale)
    torch.save({"model": theirs.state_dict() | {"head.weight": torch.zeros(5, 96)}}, tmp_path / "vit.pth")
    model, report, plan = started(config(tmp_path, image_tower=str(tmp_path / "vit.pth"), vit="auto", **IMAGENET))
    image = torch.randn(2, 3, 32, 32)
    assert_image_features(model, theirs.forward_features(image), image)
    assert plan.cfg.vit == "nano" and plan.cfg.image_mean == IMAGENET["image_mean"]
    assert len(report.folded) == (12 if layer_scale else 0) and report.ignored == ["head.weight"]
    text = [key for key in report.random if key.startswith("text_encoder.")]
    assert len(text) == len(model.text_encoder.state_dict()) and "itm_head.weight" in report.random
    online = [key for key in model.visual_encoder.state_dict()]
    assert len(report.loaded) == len(online) and report.resampled == []


def test_clip_as_timm_has_it(tmp_path, monkeypatch):
    """With a norm before the blocks, no bias of the patches, and an activation that weights do not show."""
    kinds = {"pre_norm": True, "norm_layer": partial(nn.LayerNorm, eps=1e-5)}
    theirs = timm_vit(**kinds, act_layer=timm.layers.get_act_layer("quick_gelu"))
    assert theirs.patch_embed.proj.bias is None
    theirs.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    monkeypatch.setattr(towers.timm, "create_model", lambda name, pretrained: theirs)
    model, _, plan = started(config(tmp_path, image_tower="timm:vit_nano_clip", vit="auto"))
    image = torch.randn(2, 3, 32, 32)
    assert_image_features(model, theirs.forward_features(image), image)
    assert (plan.cfg.vit, plan.cfg.image_mean, plan.cfg.image_std) == ("clip_base", [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])

    torch.save(theirs.state_dict(), tmp_path / "clip.pth")
    with pytest.raises(ValueError, match="may be clip_base or openclip_base.*set vit to the right one"):
        plan_model(config(tmp_path, image_tower=str(tmp_path / "clip.pth"), vit="auto", **IMAGENET))
    model, _, _ = started(config(tmp_path, image_tower=str(tmp_path / "clip.pth"), vit="clip_base", **IMAGENET))
    assert_image_features(model, theirs.forward_features(image), image)


SMALL = {"hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}


@pytest.mark.parametrize("family", ["vit", "dinov2", "clip"])
def test_hugging_face_folders(tmp_path, family):
    if family == "vit":
        theirs = ViTModel(ViTConfig(**SMALL, intermediate_size=384, layer_norm_eps=1e-6), add_pooling_layer=False)
    elif family == "dinov2":
        theirs = Dinov2Model(Dinov2Config(**SMALL, mlp_ratio=4, layerscale_value=0.5))
    else:
        theirs = CLIPVisionModel(CLIPVisionConfig(**SMALL, intermediate_size=384))
    theirs = shaken(theirs).eval()
    theirs.save_pretrained(tmp_path / "hf")
    normal = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(normal))
    model, report, plan = started(config(tmp_path, image_tower=str(tmp_path / "hf"), vit="auto"))
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs(image).last_hidden_state
        if family == "clip":  # it normalises [CLS] alone
            layer = getattr(theirs, "vision_model", theirs).post_layernorm
            expected = layer(expected)
    assert_image_features(model, expected, image)
    assert plan.cfg.vit == ("clip_base" if family == "clip" else "nano") and plan.cfg.image_mean == [0.5] * 3
    assert all("mask_token" in key or "pool" in key or "position_ids" in key for key in report.ignored)


def test_a_blip_files_image_half(tmp_path):
    blip = tiny_model(patch_size=8)
    torch.save({"model": blip.state_dict()}, tmp_path / "blip.pth")
    model, report, plan = started(config(tmp_path, image_tower=str(tmp_path / "blip.pth")
                                         , vit="nano"))  # fmt: skip
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.visual_encoder(image), blip.visual_encoder(image))
    assert plan.cfg.image_mean[0] == pytest.approx(0.48145466) and "temp" in report.ignored


def test_another_grid_and_another_patch_are_resampled(tmp_path):
    theirs = timm_vit(img_size=64)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    model, report, _ = started(config(tmp_path, image_tower=str(tmp_path / "vit.pth"), vit="nano", **IMAGENET))
    assert report.resampled == ["visual_encoder.pos_embed"]
    assert model.visual_encoder.pos_embed.shape == (1, 17, 96)
    torch.testing.assert_close(model.visual_encoder.pos_embed[:, 0], theirs.pos_embed[:, 0])
    other = config(tmp_path, image_tower=str(tmp_path / "vit.pth"), vit="nano", patch_size=16, **IMAGENET)
    model, report, _ = started(other)
    assert report.resampled == ["visual_encoder.pos_embed", "visual_encoder.patch_embed.proj.weight"]
    smooth = torch.ones(1, 3, 32, 32) * torch.tensor([0.3, -0.7, 1.1])[:, None, None]  # of one colour
    with torch.no_grad():  # a patch twice as large sees the same in a picture twice as large
        half = theirs.patch_embed.proj(smooth[..., :8, :8]).flatten()
        torch.testing.assert_close(
            model.visual_encoder.patch_embed.proj(smooth)[0, :, 0, 0], half, rtol=1e-3, atol=1e-3
        )


REFUSED = {
    "registers": ({"reg_tokens": 4}, "register tokens"),
    "no class token": ({"class_token": False, "global_pool": "map"}, r"no \[CLS\] token"),
    "average pooling": ({"class_token": False, "global_pool": "avg"}, "no cls_token"),
    "qk_norm": ({"qk_norm": True}, "no place for: blocks.0.attn.q_norm"),
    "another width": ({"embed_dim": 48}, "48 wide and 6 deep.*is not in the table"),
    "another mlp": ({"mlp_ratio": 2}, "its MLP is 192 wide; only 4 x 96"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_vit_that_would_compute_something_else_is_refused(tmp_path, name):
    kwargs, said = REFUSED[name]
    torch.save(timm_vit(**kwargs).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=f"vit.pth.*{said}"):
        read_image_tower(str(tmp_path / "vit.pth"))


def test_what_the_config_must_say(tmp_path):
    torch.save(timm_vit().state_dict(), tmp_path / "vit.pth")
    tower = {"image_tower": str(tmp_path / "vit.pth")}
    with pytest.raises(ValueError, match=r"does not say how its images were normalised. Set image_mean and image_std"):
        plan_model(config(tmp_path, vit="auto", **tower))
    with pytest.raises(ValueError, match="is vit nano, the config asks for tiny: set vit: auto"):
        plan_model(config(tmp_path, vit="tiny", **tower, **IMAGENET))
    with pytest.raises(ValueError, match="pretrained holds both encoders, and image_tower would replace"):
        config(tmp_path, pretrained="x.pth", **tower)
    for key in ("vit", "med_config"):
        with pytest.raises(ValueError, match=f"{key}: auto takes the sizes from .*_tower or a checkpoint"):
            plan_model(config(tmp_path, **{key: "auto"}, finetuned="x.pth"))
    with pytest.raises(ValueError, match="image_tower nowhere.pth: there is no such file or folder. Give a ViT's"):
        plan_model(config(tmp_path, image_tower="nowhere.pth", vit="auto"))
    with pytest.raises(ValueError, match="image_mean must be three numbers"):
        config(tmp_path, image_mean=[0.5, 0.5], image_std=[0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match="image_tower timm:no_such_model: timm cannot give it"):
        plan_model(config(tmp_path, image_tower="timm:no_such_model", vit="auto"))


# ---- text -----------------------------------------------------------------------------------------------------------


def bert_folder(folder: Path, **kwargs) -> BertModel:
    """A BERT whose vocabulary is BLIP's, with two rows more than words."""
    kinds = {"vocab_size": 30524, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
             "intermediate_size": 96, "max_position_embeddings": 64}  # fmt: skip
    model = shaken(BertModel(BertConfig(**{**kinds, **kwargs}))).eval()
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(blip_tokenizer().words) + "\n")
    return model


@torch.no_grad()
def test_a_bert_computes_the_same(tmp_path):
    theirs = bert_folder(tmp_path / "bert", layer_norm_eps=1e-6)
    cfg = config(tmp_path, text_tower=str(tmp_path / "bert"), med_config="auto", vit="nano")
    model, report, plan = started(cfg)
    text = tokenize(["a red ball", "two small dogs under a large table"])
    expected = theirs(text.input_ids, text.attention_mask).last_hidden_state * text.attention_mask[..., None]
    torch.testing.assert_close(model.text_encoder(text) * text.attention_mask[..., None], expected, **CLOSE)
    assert expected.std() > 0.3
    assert (plan.med.num_hidden_layers, plan.med.layer_norm_eps, plan.med.vocab_size) == (3, 1e-6, 30524)
    assert plan.med.max_position_embeddings == 64
    words = model.text_encoder.embeddings.word_embeddings.weight
    assert torch.equal(words[30523], words[101]) and torch.equal(words[30522], words[101])
    assert report.folded == ["text_encoder.embeddings.token_type_embeddings.weight"]
    cross = [key for key in model.state_dict() if key.startswith("text_encoder.") and "crossattention" in key]
    assert set(cross) < set(report.random) and not any("word_embeddings" in key for key in report.random)
    assert torch.equal(model.text_encoder_m.encoder.layer[2].output.dense.weight,
                       theirs.encoder.layer[2].output.dense.weight)  # fmt: skip


def test_old_names_and_a_file_of_a_larger_model(tmp_path):
    """`bert.` before the names and gamma and beta in them, with a head of another task."""
    theirs = bert_folder(tmp_path / "bert")
    state = {f"bert.{key}": value for key, value in theirs.state_dict().items()}
    state = {key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
             for key, value in state.items()} | {"cls.predictions.bias": torch.zeros(9)}  # fmt: skip
    (tmp_path / "bert" / "model.safetensors").unlink()
    save_file(state, tmp_path / "bert" / "old.safetensors")
    tower = read_text_tower(str(tmp_path / "bert" / "old.safetensors"))
    torch.testing.assert_close(
        tower.state["encoder.layer.1.output.LayerNorm.weight"], theirs.encoder.layer[1].output.LayerNorm.weight
    )
    assert tower.ignored[0] == "cls.predictions.bias" and any("pooler" in key for key in tower.ignored)


@pytest.mark.parametrize(("family", "said"), [
    ("roberta", "is a roberta, not a BERT: its positions start at 2"),
    ("distilbert", "is a distilbert, not a BERT"),
    ("gpt2", "is a gpt2, not a BERT: only BERT's architecture is known"),
])  # fmt: skip
def test_other_families_are_refused_with_the_reason(tmp_path, family, said):
    bert_folder(tmp_path / "bert")
    path = tmp_path / "bert" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": family}))
    with pytest.raises(ValueError, match=said):
        read_text_tower(str(tmp_path / "bert"))


def test_a_text_tower_of_other_sizes_than_the_config(tmp_path):
    bert_folder(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"has hidden_size 48 \(config: 64\).*: set med_config: auto"):
        plan_model(config(tmp_path, text_tower=str(tmp_path / "bert"), vit="nano"))
    with pytest.raises(ValueError, match="text_tower nowhere: there is no such file or folder. Give a BERT's"):
        plan_model(config(tmp_path, text_tower="nowhere", med_config="auto", vit="nano"))
    (tmp_path / "bert" / "vocab.txt").unlink()
    with pytest.raises(ValueError, match="text_tower .*has neither vocab.txt nor tokenizer.json"):
        plan_model(config(tmp_path, text_tower=str(tmp_path / "bert"), med_config="auto", vit="nano"))


def test_a_named_text_encoder_is_planned_the_same_from_tower_and_checkpoint(tmp_path):
    """The tower decides positions and epsilon, also once its weights come out of a checkpoint."""
    bert_folder(tmp_path / "bert", hidden_size=64, intermediate_size=128, layer_norm_eps=1e-5)
    cfg = config(tmp_path, text_tower=str(tmp_path / "bert"), vit="nano")
    plan = plan_model(cfg)
    assert (plan.med.max_position_embeddings, plan.med.layer_norm_eps) == (64, 1e-5)
    assert plan.med != tiny_med() and plan.med.hidden_dropout_prob == tiny_med().hidden_dropout_prob
    model = build_model(plan.cfg, plan.med, plan.tokenizer)
    save_checkpoint(tmp_path / "a.pth", model, torch.optim.SGD([model.temp]), {"vit": "nano"}, 0)
    assert plan_model(cfg, str(tmp_path / "a.pth")).med == plan.med


def test_a_tokenizer_that_is_not_the_towers(tmp_path):
    bert_folder(tmp_path / "bert")
    words = list(blip_tokenizer().words)
    for name, other, said in (
        ("shuffled", [*words[:1000], *words[:999:-1]], "is another vocabulary than that of the text_tower"),
        ("short", words[:30000], "is another vocabulary than that of the text_tower"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.txt").write_text("\n".join(other) + "\n")
        keys = {"text_tower": str(tmp_path / "bert"), "tokenizer": str(tmp_path / name), "med_config": "auto"}
        with pytest.raises(ValueError, match=said):
            plan_model(config(tmp_path, vit="nano", **keys))
    (tmp_path / "bert" / "vocab.txt").unlink()
    with pytest.raises(ValueError, match="has embeddings of 30524 word pieces, but the vocabulary of .* has 30000"):
        plan_model(config(tmp_path, vit="nano", **keys))
    with pytest.raises(ValueError, match="tokenizer .*nowhere: there is no such folder"):
        plan_model(config(tmp_path, tokenizer=str(tmp_path / "nowhere")))


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_from_towers_needs_them_only_once(tiny_run, capsys):
    """Training, resuming, evaluating and using: afterwards the checkpoint says all that the config leaves open."""
    torch.save(timm_vit(patch_size=16).state_dict(), tiny_run / "vit.pth")
    bert_folder(tiny_run / "bert")
    values = YAML().load(tiny_run / "config.yaml") | {
        "image_tower": str(tiny_run / "vit.pth"), "text_tower": str(tiny_run / "bert"), "vit": "auto",
        "med_config": "auto", "max_epoch": 1, **IMAGENET,
    }  # fmt: skip
    YAML().dump(values, tiny_run / "towers.yaml")
    args = ["--config", str(tiny_run / "towers.yaml"), "--output_dir", str(tiny_run / "out"), "--device", "cpu"]
    assert train_retrieval.main([*args, "--check"]) == 0
    said = capsys.readouterr().out
    assert "towers" in said and "loaded" in said and "init_lr 1e-05" not in said
    assert train_retrieval.main([*args, "--check", "--set", "init_lr=1e-5"]) == 0
    assert "from towers, cross-attention and heads start at random" in capsys.readouterr().out
    assert train_retrieval.main([*args, "--check", "--set", "freeze=[image:9]"]) == 2
    assert train_retrieval.main([*args, "--check", "--set", "image_tower="]) == 2
    assert train_retrieval.main(args) == 0
    rows = [json.loads(line) for line in (tiny_run / "out" / "log.txt").read_text().splitlines()]
    assert rows[0]["checkpoint"] == f"{tiny_run / 'vit.pth'} and {tiny_run / 'bert'}"
    assert rows[0]["checkpoint_kind"].startswith("towers ")
    for name in ("vit.pth", "bert"):
        (tiny_run / name).rename(tiny_run / f"{name}.gone")
    kept = ["--config", str(tiny_run / "out" / "config.yaml"), "--device", "cpu"]
    assert train_retrieval.main([*kept, "--evaluate"]) == 0
    row = json.loads((tiny_run / "out" / "evaluate.txt").read_text())
    assert row["test_txt_r1"] == rows[-1]["test_txt_r1"] and row["test_img_r10"] == rows[-1]["test_img_r10"]
    assert train_retrieval.main([*kept, "--resume", "auto", "--set", "max_epoch=2"]) == 0
    blip = load(tiny_run / "out")
    assert blip.transform.transforms[-1].mean == IMAGENET["image_mean"]


def test_the_table_of_sizes_names_timms_models():
    """Sizes of the table that carry a usual name have that model's shapes."""
    for ours, theirs in (("tiny", "deit_tiny_patch16_224"), ("huge", "vit_huge_patch14_clip_224")):
        with torch.device("meta"):
            model = timm.create_model(theirs)
        size = REAL[ours]
        assert (size.width, size.depth) == (model.embed_dim, len(model.blocks))
        assert size.heads == model.blocks[0].attn.num_heads
    for name, act in (("vit_base_patch16_clip_quickgelu_224", "QuickGELU"), ("vit_base_patch16_clip_224", "GELU")):
        with torch.device("meta"):
            model = timm.create_model(name)
        size = REAL["clip_base" if act == "QuickGELU" else "openclip_base"]
        assert (size.width, size.depth, size.heads) == (768, 12, model.blocks[0].attn.num_heads)
        assert type(model.blocks[0].mlp.act).__name__ == act and model.blocks[0].norm1.eps == size.norm_eps
        assert isinstance(model.norm_pre, nn.LayerNorm) == size.norm_pre
