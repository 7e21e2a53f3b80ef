"""Configs: what loads, what a mistake is answered with, and what the shipped files promise."""

import math
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from configs.datasets import DATASETS
from configs.schema import RetrievalConfig, load_config, resolve, save_config
from configs.sizes import load_med_config
from training.preflight import with_precisions

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "tests" / "assets"
SHIPPED = sorted((ROOT / "configs").glob("retrieval_*.yaml"))
BLIP_KEYS = """image_root ann_root dataset pretrained vit batch_size_train batch_size_test vit_grad_ckpt vit_ckpt_layer
    init_lr image_size queue_size alpha k_test negative_all_rank weight_decay min_lr max_epoch""".split()
OWN_KEYS = """finetuned med_config train_file val_file test_file patch_size pos_embed_std embed_dim momentum
    global_batch_size ranks_emulated warmup_steps temp_lr_scale augment num_workers precision eval_precision
    rerank_tokens keep_graphs compile save_every_steps keep_last on_bad_sample grey_bits flatten_alpha cache_dir
    patience eval_before log_every tensorboard image_tower text_tower image_mean image_std tokenizer max_words
    max_tokens vit_init_std freeze layer_decay lora fetch cache_gb
    random_negative_steps""".split()


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def coco(**values) -> RetrievalConfig:
    return RetrievalConfig(dataset="coco", image_root="images", **values)


# --- what loads


@pytest.mark.parametrize("name, k_test, all_rank", [("coco", 256, True), ("flickr", 128, False)])
def test_blip_yaml_loads_unchanged(name, k_test, all_rank):
    cfg = load_config(ASSETS / f"blip_retrieval_{name}.yaml", world_size=8)
    assert (cfg.dataset, cfg.k_test, cfg.negative_all_rank) == (name, k_test, all_rank)
    assert (cfg.init_lr, cfg.min_lr, cfg.vit_ckpt_layer) == (1e-5, 0.0, 4) and isinstance(cfg.min_lr, float)
    assert (cfg.global_batch_size, cfg.ranks_emulated, cfg.momentum, cfg.embed_dim) == (256, 8, 0.995, 256)
    assert cfg.pretrained.endswith(f"model_base_retrieval_{name}.pth") and cfg.finetuned == ""


LAVIS = """
model: {arch: blip_retrieval, model_type: coco, queue_size: 57600, vit_type: large, image_size: 384}
datasets: {flickr30k: {vis_processor: {}}}
run: {task: retrieval, init_lr: 1e-5, max_epoch: 6, batch_size_eval: 64, k_test: 256, seed: 42}
"""


def test_a_lavis_config_is_answered_with_what_to_use(tmp_path):
    (tmp_path / "ret.yaml").write_text(LAVIS)
    with pytest.raises(ValueError, match="ret.yaml: a LAVIS config.*Use configs/retrieval_flickr.yaml with") as error:
        load_config(tmp_path / "ret.yaml")
    assert "vit: large, image_size: 384, queue_size: 57600, init_lr: 1e-05, max_epoch: 6" in str(error.value)


def test_every_documented_key_exists_and_has_one_line_of_documentation():
    assert sorted(knob.name for knob in fields(RetrievalConfig)) == sorted(BLIP_KEYS + OWN_KEYS)
    for knob in fields(RetrievalConfig):
        assert len(knob.metadata["doc"]) > 10 and "\n" not in knob.metadata["doc"], knob.name
        if knob.type in (int, float, int | str):
            assert knob.metadata["low"] is not None, f"{knob.name} has no limits"


@pytest.mark.parametrize("written", ["1e-5", "'1e-5'", "1.0e-5", "0.00001"])
def test_learning_rate_is_a_number_however_it_is_written(tmp_path, written):
    assert load_config(write(tmp_path, f"dataset: coco\nimage_root: i\ninit_lr: {written}\n")).init_lr == 1e-5


def test_config_is_frozen_and_empty_text_may_be_left_blank(tmp_path):
    cfg = load_config(write(tmp_path, "dataset: coco\nimage_root: i\npretrained:\n"))
    assert cfg.pretrained == ""
    with pytest.raises(AttributeError):
        cfg.k_test = 3


@pytest.mark.parametrize("path", [*SHIPPED, *sorted(ASSETS.glob("*.yaml"))], ids=lambda path: path.stem)
def test_saved_config_loads_back_equal(path, tmp_path):
    cfg = load_config(path, ["weight_decay=3.5e-6", "keep_graphs=12", "cache_dir='a: b # c'"])
    save_config(cfg, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == cfg
    unresolved = replace(cfg, global_batch_size=None, ranks_emulated=None, keep_graphs="auto")
    save_config(unresolved, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == resolve(unresolved, 1)


def test_a_config_that_cannot_be_written_leaves_the_former_one(tmp_path, monkeypatch):
    def full(self, values, file):
        file.write("dataset: co")
        raise OSError(28, "No space left on device")

    save_config(coco(), tmp_path / "config.yaml")
    monkeypatch.setattr("configs.schema.YAML.dump", full)
    with pytest.raises(OSError, match="No space left"):
        save_config(coco(k_test=3), tmp_path / "config.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert load_config(tmp_path / "config.yaml") == resolve(coco(), 1)


# --- overrides


def test_overrides_are_yaml_scalars_and_the_last_one_wins():
    cfg = load_config(
        ASSETS / "blip_retrieval_coco.yaml",
        [
            "k_test=64",
            "init_lr=5e-6",
            "pretrained=",
            "negative_all_rank=false",
            "global_batch_size=null",
            "keep_graphs=auto",
            "max_epoch=2",
            "max_epoch=3",
            "image_root=a=b",
        ],
    )
    assert (cfg.k_test, cfg.init_lr, cfg.pretrained, cfg.negative_all_rank) == (64, 5e-6, "", False)
    assert (cfg.global_batch_size, cfg.keep_graphs, cfg.max_epoch, cfg.image_root) == (32, "auto", 3, "a=b")


def test_overrides_may_be_a_mapping_and_supply_what_the_file_lacks(tmp_path):
    path = write(tmp_path, "k_test: 16\n")
    cfg = load_config(path, {"dataset": "coco", "image_root": "i", "vit": "large", "batch_size_train": "8"})
    assert (cfg.dataset, cfg.k_test, cfg.vit, cfg.batch_size_train) == ("coco", 16, "large", 8)


@pytest.mark.parametrize(
    "override, said",
    [
        ("k_tset=64", "--set: unknown key 'k_tset', did you mean 'k_test'?"),
        ("k_test", "--set k_test: write --set key=value"),
        ("k_test=[1", "--set k_test=[1, line 1: not valid YAML"),
        ("k_test=many", "coco.yaml with --set k_test=many: k_test must be a whole number, got 'many'"),
        ("k_test=0", "coco.yaml with --set k_test=0: k_test must be at least 1"),
    ],
)
def test_bad_override_names_itself(override, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        load_config(ASSETS / "blip_retrieval_coco.yaml", [override])


# --- mistakes in a file


@pytest.mark.parametrize(
    "text, said",
    [
        ("dataset: coco\nlr_init: 1e-5\n", ": unknown key 'lr_init', did you mean 'init_lr'?"),
        ("zzzz: 1\n", ": unknown key 'zzzz': remove it"),
        ("1: 2\n", ": unknown key '1'"),
        ("dataset: coco\nk_test: 1\nk_test: 2\n", ", line 3: not valid YAML: found duplicate key"),
        ("dataset: coco\nvit: [base\nk_test: 1\n", ", line 3: not valid YAML"),
        ("dataset: coco\n\tvit: base\n", ", line 2: not valid YAML"),
        ("dataset: coco\nvit: @base\n", ", line 2: not valid YAML"),
        ("a: 1\n---\nb: 2\n", ", line 2: not valid YAML"),
        ("dataset: !!python/object:os.system x\n", ": not valid YAML"),
        ("dataset: 2024-13-01\n", ": not valid YAML"),
        ("dataset: \0\n", ": not valid YAML"),
        ("", ": the file is empty"),
        ("# only a comment\n", ": the file is empty"),
        ("- coco\n", ": holds a list, not keys"),
        ("coco\n", ": holds a str, not keys"),
        ("image_root: i\n", ": the key 'dataset' is missing"),
        ("dataset: coco\n", ": the key 'image_root' is missing"),
        ("dataset: coco\nimage_root: i\nk_test: 0\n", ": k_test must be at least 1"),
    ],
)
def test_bad_file_is_named_with_its_fault(tmp_path, text, said):
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as error:
        load_config(path)
    assert str(path) in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


def test_unreadable_file_is_named(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"dataset: \xff\xfe\xe9\n")
    for name, said in [("absent.yaml", "No such file"), ("latin.yaml", "UTF-8"), ("", "directory")]:
        with pytest.raises(ValueError, match=said):
            load_config(tmp_path / name)


# --- mistakes in a value


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("k_test", "256", "k_test must be a whole number, got '256'"),
        ("k_test", 25.6, "k_test must be a whole number"),
        ("k_test", True, "k_test must be a whole number, got True"),
        ("k_test", None, "k_test must be a whole number, got None"),
        ("init_lr", "fast", "init_lr must be a number, got 'fast'"),
        ("init_lr", True, "init_lr must be a number"),
        ("init_lr", 10**400, "init_lr must be a number"),
        ("init_lr", math.nan, "init_lr must be from 0 to 1"),
        ("init_lr", math.inf, "init_lr must be from 0 to 1"),
        ("init_lr", -1e-5, "init_lr must be from 0 to 1"),
        ("alpha", 1.5, "alpha must be from 0 to 1"),
        ("momentum", 1.01, "momentum must be from 0 to 1"),
        ("vit_grad_ckpt", "yes", "vit_grad_ckpt must be true or false"),
        ("vit_grad_ckpt", 1, "vit_grad_ckpt must be true or false"),
        ("ann_root", 2014, "ann_root must be text"),
        ("ann_root", ["a"], "ann_root must be text"),
        ("vit", "bse", "vit must be one of base, large, huge, small, tiny, nano, clip_base"),
        ("precision", "fp16", "precision must be one of auto, fp32, tf32, bf16"),
        ("eval_precision", "bf61", "eval_precision must be one of auto, fp32, tf32, bf16"),
        ("on_bad_sample", "ignore", "on_bad_sample must be one of error, skip"),
        (
            "dataset",
            "coco2014",
            "dataset must be one of coco, flickr, scenes, emoji, custom, got 'coco2014', did you mean",
        ),
        ("global_batch_size", "all", "global_batch_size must be a whole number or null"),
        ("global_batch_size", 0, "global_batch_size must be at least 1"),
        ("keep_graphs", "all", "keep_graphs must be 'auto' or a whole number"),
        ("keep_graphs", -1, "keep_graphs must be at least 0"),
        ("keep_graphs", True, "keep_graphs must be 'auto' or a whole number"),
        ("batch_size_train", 0, "batch_size_train must be at least 1"),
        ("max_epoch", 0, "max_epoch must be at least 1"),
        ("num_workers", -1, "num_workers must be at least 0"),
    ],
)
def test_bad_value_names_its_key_and_what_it_should_be(key, value, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        RetrievalConfig(**{"dataset": "coco", "image_root": "i", key: value})


@pytest.mark.parametrize(
    "values, said",
    [
        (dict(image_size=390), "image_size 390 is not a multiple of patch_size 16: set image_size to 384"),
        (dict(min_lr=1e-4), "min_lr 0.0001 is above init_lr 1e-05"),
        (dict(dataset="custom"), "set train_file, val_file and test_file"),
        (dict(train_file="t.json"), "train_file would be ignored, as dataset 'coco' names its own files"),
        (dict(global_batch_size=100, ranks_emulated=8), "multiple of ranks_emulated 8: set global_batch_size to 96"),
        (dict(global_batch_size=8, ranks_emulated=8), "set global_batch_size to at least 16"),
        (dict(queue_size=31), "queue_size 31 is smaller than the global batch of 32: set queue_size to at least 32"),
        (dict(queue_size=255, global_batch_size=256), "set queue_size to at least 256, or lower global_batch_size"),
    ],
)
def test_impossible_combination_says_what_to_set(values, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        RetrievalConfig(**{"dataset": "coco", "image_root": "i"} | values)


# --- resolve


@pytest.mark.parametrize(
    "values, world_size, batch, ranks",
    [
        (dict(), 1, 32, 1),
        (dict(), 8, 256, 8),
        (dict(global_batch_size=256), 2, 256, 2),
        (dict(ranks_emulated=8), 2, 64, 8),
        (dict(global_batch_size=256, ranks_emulated=8, batch_size_train=1), 4, 256, 8),
        (dict(batch_size_train=24, queue_size=25), 1, 24, 1),  # no multiple needed: the queue wraps around
    ],
)
def test_resolve_fills_in_the_batch(values, world_size, batch, ranks):
    cfg = resolve(coco(**values), world_size)
    assert (cfg.global_batch_size, cfg.ranks_emulated) == (batch, ranks)
    assert resolve(cfg, world_size) == cfg


@pytest.mark.parametrize(
    "values, world_size, said",
    [
        (dict(global_batch_size=256, ranks_emulated=8), 3, "set ranks_emulated to a multiple of 3"),
        (dict(ranks_emulated=4), 8, "set ranks_emulated to a multiple of 8"),
        (dict(global_batch_size=100), 8, "is not a multiple of ranks_emulated 8: set global_batch_size to 96"),
        (dict(batch_size_train=1), 1, "set global_batch_size to at least 2"),
        (dict(batch_size_train=1), 4, "set global_batch_size to at least 8"),
        (
            dict(queue_size=100),
            8,
            "queue_size 100 is smaller than the global batch of 256: set queue_size to at least 256",
        ),
    ],
)
def test_resolve_refuses_a_batch_that_the_processes_cannot_share(values, world_size, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        resolve(coco(**values), world_size)


# --- the shipped files


def test_every_data_set_has_a_config_to_start_from():
    assert {load_config(path).dataset for path in SHIPPED} == set(DATASETS)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_loads_resolves_and_opens_with_its_own_command(path):
    cfg = load_config(path)
    head = path.read_text().split("\ndataset:")[0]
    assert f"#   python train_retrieval.py --config configs/{path.name} --output_dir output/{path.stem}\n" in head
    small = cfg.dataset in ("scenes", "emoji")  # one process is enough for them
    assert small or "python -m torch.distributed.run --nproc_per_node=2` " in head
    assert "Adjusted from the published recipe" in head
    assert cfg.dataset == path.stem.removeprefix("retrieval_") or path.stem == "retrieval_flickr8k"
    assert cfg.vit != "auto" or cfg.image_tower
    on_two = load_config(path, ["ranks_emulated=2"] if "and set ranks_emulated: 2.\n" in head else [], world_size=2)
    assert on_two.ranks_emulated % 2 == 0 and (small or on_two.global_batch_size == cfg.global_batch_size)
    text_encoder = load_med_config(ROOT / cfg.med_config)
    assert text_encoder.vocab_size == 30524
    assert text_encoder.hidden_size % text_encoder.num_attention_heads == 0


@pytest.mark.parametrize("name", ["coco", "flickr"])
def test_shipped_recipe_is_the_published_one_on_eight_gpus_or_one(name):
    ours, on_eight = (load_config(ROOT / "configs" / f"retrieval_{name}.yaml", world_size=size) for size in (1, 8))
    blip = load_config(ASSETS / f"blip_retrieval_{name}.yaml", world_size=8)
    assert ours.pretrained.endswith("/model_base.pth") and ours.finetuned == blip.pretrained
    same = dict(image_root=blip.image_root, pretrained=blip.pretrained, finetuned="", save_every_steps=0)
    assert replace(ours, **same) == replace(on_eight, **same) == blip


@pytest.mark.parametrize("name", ["coco", "flickr"])
def test_cheap_alternative_in_the_header_follows_its_rules(name):
    path = ROOT / "configs" / f"retrieval_{name}.yaml"
    lines = re.findall(r"^# (\w+): (\S+)", path.read_text(), flags=re.MULTILINE)
    keys = ("global_batch_size", "ranks_emulated", "init_lr", "momentum")
    cfg = load_config(path, {key: value for key, value in lines if key in keys})
    assert {key for key, _ in lines} >= set(keys) and (cfg.global_batch_size, cfg.ranks_emulated) == (32, 1)
    assert cfg.init_lr == pytest.approx(1e-5 * math.sqrt(32 / 256), rel=0.02)
    assert 1 - cfg.momentum == pytest.approx(1 - 0.995 ** (32 / 256), rel=0.01)


# --- what `auto` comes to


@pytest.mark.parametrize(
    ("device", "capability", "training", "evaluation"),
    [("cpu", None, "fp32", "fp32"), ("cuda", (9, 0), "tf32", "bf16"), ("cuda:1", (8, 0), "tf32", "bf16"),
     ("cuda", (7, 5), "tf32", "fp32")],
)  # fmt: skip
def test_auto_is_float32_on_a_cpu_and_the_published_arithmetic_on_a_gpu(
    monkeypatch, device, capability, training, evaluation
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cfg = with_precisions(coco(), torch.device(device))
    assert (cfg.precision, cfg.eval_precision) == (training, evaluation)
    chosen = coco(precision="bf16", eval_precision="tf32")
    assert with_precisions(chosen, torch.device(device)) == chosen


def test_shipped_configs_leave_the_precision_to_the_device():
    for path in SHIPPED:
        cfg = load_config(path)
        assert (cfg.precision, cfg.eval_precision) == ("auto", "auto"), path
