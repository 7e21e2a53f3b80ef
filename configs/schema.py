"""Every knob of the program: one documented field each, read from YAML, checked before anything is loaded.

Source of the key names: BLIP (Li et al., ICML 2022, https://arxiv.org/abs/2201.12086), whose own YAML files load
unchanged. What cannot work, in a file or in `--set`, is a `ValueError` that names the file, the key and the remedy.
"""

import difflib
import os
import re
from collections import ChainMap, Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from configs.datasets import DATASETS
from configs.sizes import VIT_SIZES

TEMP_RANGE = (0.001, 0.5)  # no knob: BLIP clamps the learned temperature to this before every step
BAD_SAMPLE = ("error", "skip")
ALPHA = ("", "white")
RENAMED = {"on_bad_image": "on_bad_sample"}  # keys of before, which still work
PRECISIONS = ("fp32", "tf32", "bf16")
AUTO_PRECISION = ("auto", *PRECISIONS)
# Keys of LAVIS's sections that mean the same here, some under another name.
LAVIS_KEYS = (
    "vit", "image_size", "queue_size", "momentum", "alpha", "negative_all_rank", "vit_grad_ckpt", "vit_ckpt_layer",
    "init_lr", "min_lr", "weight_decay", "max_epoch", "batch_size_train", "batch_size_test", "k_test",
)  # fmt: skip
KIND_NAMES = {
    str: "text (put quotes around it)",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    int | str: "'auto' or a whole number",
    str | list: "a file or a list of files",
    list: "a list in brackets",
    dict: "keys and values",
}
AUTO = "auto"  # of `vit` and `med_config`: what the weights that are loaded say
VITS = ChainMap[str, Any]({AUTO: None}, VIT_SIZES)  # what `vit` may be
FREEZE = re.compile(r"(image|text)(:\d+)?")
LORA_KEYS = ("rank", "alpha", "targets")
LORA_TARGETS = (
    "image.qkv", "image.proj", "image.mlp", "text.query", "text.key", "text.value", "text.output", "text.mlp",
    "cross.query", "cross.key", "cross.value", "cross.output",
)  # fmt: skip


def knob(
    default: Any, doc: str, low: float | None = None, high: float | None = None, choices: Collection[str] = ()
) -> Any:
    """A field with its documentation, its inclusive limits and its choices: a list, or the keys of a table."""
    return field(default=default, metadata={"doc": doc, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class RetrievalConfig:
    """The reference of the knobs; building one raises `ValueError` for a value or a combination that cannot work."""

    # --- data
    dataset: str = knob(MISSING, "what to train and evaluate on", choices=DATASETS)
    image_root: str = knob("", "folder, .zip, .tar, or shards name-{000..099}.tar, that image paths are relative to")
    fetch: str = knob("", "command that brings one shard of image_root: 'aws s3 cp {source} {target}'")
    cache_gb: float = knob(0.0, "with fetch: gigabytes of shards under cache_dir at a time", 0)
    ann_root: str = knob("annotation", "folder of the annotation files")
    train_file: str | list = knob("", "custom only: training annotations under ann_root; a list = one set of several")
    val_file: str | list = knob("", "custom only: validation annotations, evaluated after each epoch")
    test_file: str | list = knob("", "custom only: test annotations, evaluated at the end and by --evaluate")
    augment: bool = knob(True, "true: BLIP's random crop, flip and RandAugment; false: train on the test transform")
    num_workers: int = knob(4, "loader processes per training process; 0: it loads the data itself", 0)
    on_bad_sample: str = knob(
        "error", "an unreadable training image, or a caption without words, stops the run or is skipped",
        choices=BAD_SAMPLE,
    )  # fmt: skip

    grey_bits: int = knob(0, "bits of content in 16-bit greyscale that does not state it; 0 = 16", 0, 32)
    flatten_alpha: str = knob("", "white: lay transparent pictures on white; '': drop alpha, as BLIP", choices=ALPHA)

    # --- model
    pretrained: str = knob("", "checkpoint that training starts from, a path or an address; '' = random weights")
    image_tower: str = knob("", "ViT to start from instead of `pretrained`: file, folder or timm:NAME")
    text_tower: str = knob("", "BERT to start from: a Hugging Face folder, or a file in one")
    finetuned: str = knob("", "checkpoint that --evaluate loads; '' = `pretrained`, as with BLIP's own YAML files")
    cache_dir: str = knob("", "folder for downloaded checkpoints and fetched shards; '' = that of torch.hub")
    vit: str = knob("base", "size of the image encoder; auto: as in the weights", choices=VITS)
    patch_size: int = knob(16, "side of an image patch in pixels; released checkpoints have 16", 1)
    image_size: int = knob(384, "side of the square input image in pixels, a multiple of patch_size", 1)
    image_mean: list = knob(None, "of normalisation, red green blue; null = the tower's or checkpoint's, BLIP's")
    image_std: list = knob(None, "likewise, the standard deviations")
    med_config: str = knob("configs/med_config.json", "JSON of the text encoder; auto: as in the weights or the tower")
    tokenizer: str = knob("", "folder with a BERT's vocab.txt; '' = that of the tower or the checkpoint, BLIP's")
    max_words: int = knob(30, "words of a caption that are read, BLIP's", 1)
    max_tokens: int = knob(35, "tokens of a caption that are read, [CLS] and [SEP] included, BLIP's", 3)
    vit_init_std: float = knob(0.02, "standard deviation of the image encoder's initial weights", 0, 1)
    pos_embed_std: float = knob(0.02, "standard deviation of the initial image position embeddings", 0, 1)
    embed_dim: int = knob(256, "width of the contrastive features; released checkpoints have 256", 1)
    vit_grad_ckpt: bool = knob(False, "recompute activations of image blocks in the backward pass to save memory")
    vit_ckpt_layer: int = knob(0, "number of last image blocks that vit_grad_ckpt recomputes", 0)

    # --- loss
    momentum: float = knob(0.995, "share of its old weights that a momentum encoder keeps in a step", 0, 1)
    queue_size: int = knob(57600, "momentum features kept as contrastive targets, at least a global batch", 1)
    alpha: float = knob(0.4, "weight of the momentum encoders' soft targets; ramps up over the first epoch", 0, 1)
    negative_all_rank: bool = knob(True, "negatives from all ranks (true) or only from the sample's own rank (false)")
    random_negative_steps: int = knob(
        0, "first optimizer steps with negatives drawn at random, by which untrained matching learns sooner", 0
    )

    # --- batches
    batch_size_train: int = knob(32, "MICRO-batch: samples per forward and backward pass of one process", 1)
    global_batch_size: int = knob(None, "samples per optimizer step; null = batch_size_train x processes", 1)
    ranks_emulated: int = knob(None, "GPUs of the recipe to reproduce, over all processes; null = processes", 1)
    batch_size_test: int = knob(64, "images, or captions, per pass when evaluation encodes them", 1)

    # --- optimization
    init_lr: float = knob(1e-5, "learning rate of the first epoch (AdamW); cosine, stepped per epoch", 0, 1)
    min_lr: float = knob(0.0, "learning rate the cosine ends at, at most init_lr", 0, 1)
    warmup_steps: int = knob(0, "optimizer steps of linear warm-up from 0", 0)
    temp_lr_scale: float = knob(1.0, "factor on the learning rate of the temperature `temp`", 0, 1e4)
    weight_decay: float = knob(0.05, "AdamW's decoupled weight decay", 0, 1)
    freeze: list = knob(None, "not trained: image, text, or their lowest layers with embeddings, as [image:8, text:6]")
    layer_decay: float = knob(
        1.0, "rate = init_lr * layer_decay ** depth below the heads; 1 = one rate for all", 0.1, 1
    )
    lora: dict = knob(None, "low-rank updates instead of whole matrices: {rank: 8, alpha: 16, targets: [image.qkv]}")
    max_epoch: int = knob(6, "epochs of training", 1)
    patience: int = knob(0, "epochs without a better val r_mean after which training ends early; 0 = never", 0)

    # --- evaluation
    eval_before: bool = knob(True, "validate before the first step too, which shows what training gains")
    k_test: int = knob(256, "candidates per query that matching re-ranks; clamped to the gallery", 1)
    rerank_tokens: int = knob(32768, "text tokens per pass of the re-ranking; bounds its memory", 1)

    # --- speed and memory
    precision: str = knob(
        "auto", "arithmetic of training; auto: fp32 on a CPU, on a GPU tf32, as published", choices=AUTO_PRECISION
    )  # losses and momentum update stay fp32
    eval_precision: str = knob(
        "auto", "of evaluation; auto: bf16 where the GPU has it, else fp32", choices=AUTO_PRECISION
    )  # bf16: close scores are recomputed in float32, so Recall is the same
    keep_graphs: int | str = knob("auto", "images per step kept for backward, not recomputed; auto: all that fit", 0)
    compile: bool = knob(False, "torch.compile the encoders: minutes to start, then faster steps")

    # --- run folder
    save_every_steps: int = knob(0, "optimizer steps between extra saves for --resume; 0 = only after each epoch", 0)
    keep_last: int = knob(2, "number of saves for --resume that are kept", 1)
    log_every: int = knob(10, "optimizer steps between rows of steps.jsonl", 1)
    tensorboard: bool = knob(False, "write the numbers for TensorBoard too; needs requirements-tensorboard.txt")

    def __post_init__(self) -> None:
        for knob_ in fields(self):
            value = _typed(knob_.name, getattr(self, knob_.name), knob_.type, knob_.default)
            _check_value(knob_.name, value, **knob_.metadata)
            object.__setattr__(self, knob_.name, value)  # the one assignment to a frozen config
        _check_combinations(self)


def _typed(key: str, value: Any, kind: Any, default: Any) -> Any:
    """`value` as the type of its field: '1e-5' counts as a number, null as an empty text, true is not the number 1.

    A number may be null only if its default is; `resolve` fills it in.
    """
    if value is None and (default == "" or default is None):
        return default
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 readers and quotes make `1e-5` a text
        except (ValueError, OverflowError):
            pass
    if kind == str | list and isinstance(value, list):
        if not value or not all(isinstance(name, str) and name for name in value):
            raise ValueError(f"{key} must be a file or a list of files, got {value!r}")
        return list(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{key} must be {KIND_NAMES[kind]}{' or null' if default is None else ''}, got {value!r}")
    return value


def _check_value(
    key: str, value: Any, doc: str, low: float | None, high: float | None, choices: Collection[str]
) -> None:
    if choices and value not in choices:
        raise ValueError(f"{key} must be one of {', '.join(choices)}, got {value!r}{_nearest(value, choices)} ({doc})")
    if low is None or not isinstance(value, int | float):
        return
    if high is not None and not low <= value <= high:  # also refuses nan
        raise ValueError(f"{key} must be from {low} to {high}, got {value} ({doc})")
    if value < low:
        raise ValueError(f"{key} must be at least {low}, got {value} ({doc})")


def _check_combinations(cfg: RetrievalConfig) -> None:
    for wrong, message in _contradictions(cfg) + _model_contradictions(cfg) + _batch_contradictions(cfg):
        if wrong:
            raise ValueError(message)


def _contradictions(cfg: RetrievalConfig) -> list[tuple[Any, str]]:
    """Knobs that contradict each other, as a table of (is it wrong, what to do)."""
    own_files = [key for key in ("train_file", "val_file", "test_file") if getattr(cfg, key)]
    lacking = [word for word in ("{source}", "{target}") if word not in cfg.fetch]
    has_files = bool(DATASETS[cfg.dataset].files)
    return [
        (
            cfg.image_size % cfg.patch_size,
            f"image_size {cfg.image_size} is not a multiple of patch_size {cfg.patch_size}: set image_size to "
            f"{max(1, cfg.image_size // cfg.patch_size) * cfg.patch_size}",
        ),
        (
            cfg.min_lr > cfg.init_lr,
            f"min_lr {cfg.min_lr} is above init_lr {cfg.init_lr}: lower min_lr, which the cosine ends at",
        ),
        (
            isinstance(cfg.keep_graphs, str) and cfg.keep_graphs != "auto",
            f"keep_graphs must be 'auto' or a whole number, got {cfg.keep_graphs!r}",
        ),
        (
            cfg.fetch and lacking,
            f"fetch {cfg.fetch!r} lacks {' and '.join(lacking)}: write the command that copies one to the other",
        ),
        (
            bool(cfg.fetch) != bool(cfg.cache_gb),
            "fetch and cache_gb go together: set both, or neither",
        ),
        (
            cfg.fetch and not cfg.image_root.endswith(".tar"),
            f"fetch brings shards, but image_root {cfg.image_root!r} names none: write ADDRESS/name-{{000..099}}.tar",
        ),
        (
            not has_files and not own_files,
            f"dataset '{cfg.dataset}' has no files: set train_file, val_file and test_file, or test_file alone to "
            "--evaluate",
        ),
        (
            has_files and own_files,
            f"{', '.join(own_files)} would be ignored, as dataset '{cfg.dataset}' names its own files under ann_root: "
            "set dataset to 'custom', or remove them",
        ),
    ]


def _model_contradictions(cfg: RetrievalConfig) -> list[tuple[Any, str]]:
    """The same for what the model is, starts from and trains."""
    towers = [key for key in ("image_tower", "text_tower") if getattr(cfg, key)]
    return [
        (
            towers and cfg.pretrained,
            f"pretrained holds both encoders, and {' and '.join(towers)} would replace them: set one or the other",
        ),
        *(
            (
                not _is_rgb(getattr(cfg, key)),
                f"{key} must be three numbers, as [0.485, 0.456, 0.406], got {getattr(cfg, key)!r}",
            )
            for key in ("image_mean", "image_std")
        ),
        (
            (cfg.image_mean is None) != (cfg.image_std is None),
            "image_mean and image_std belong together: set both or none",
        ),
        *(
            (not FREEZE.fullmatch(str(part)), f"freeze: {part!r} is not image, text, image:N or text:N")
            for part in cfg.freeze or ()
        ),
        *_lora_contradictions(cfg.lora),
    ]


def _is_rgb(value: list | None) -> bool:
    return value is None or (len(value) == 3 and all(isinstance(x, int | float) and 0 <= x <= 1 for x in value))


def _lora_contradictions(lora: dict | None) -> list[tuple[Any, str]]:
    if lora is None:
        return []
    rank, alpha, targets = (lora.get(key) for key in LORA_KEYS)
    known = isinstance(targets, list) and targets and all(target in LORA_TARGETS for target in targets)
    return [
        (set(lora) != set(LORA_KEYS), f"lora needs the keys {', '.join(LORA_KEYS)}, got {', '.join(map(str, lora))}"),
        (not isinstance(rank, int) or rank < 1, f"lora: rank must be a whole number from 1, got {rank!r}"),
        (not isinstance(alpha, int | float) or alpha <= 0, f"lora: alpha must be a number above 0, got {alpha!r}"),
        (not known,
         f"lora: targets must be a list of {', '.join(LORA_TARGETS)}, got {targets!r}"),
    ]  # fmt: skip


def _batch_contradictions(cfg: RetrievalConfig) -> list[tuple[Any, str]]:
    """The same for the sizes of a step that are set; `resolve` sets those that depend on the number of processes."""
    batch, ranks = cfg.global_batch_size, cfg.ranks_emulated
    per_rank = batch / ranks if batch and ranks else 2
    at_once = batch or cfg.batch_size_train
    return [
        (
            per_rank % 1,
            f"global_batch_size {batch} is not a multiple of ranks_emulated {ranks}: set global_batch_size to "
            f"{max(2, round(per_rank)) * (ranks or 1)}",
        ),
        (
            per_rank < 2,
            f"global_batch_size {batch} over ranks_emulated {ranks} leaves a rank fewer than two samples, so no "
            f"negative: set global_batch_size to at least {2 * (ranks or 1)} (unset, it is batch_size_train x "
            "processes), or lower ranks_emulated",
        ),
        (
            cfg.queue_size < at_once,
            f"queue_size {cfg.queue_size} is smaller than the global batch of {at_once}: set queue_size to at least "
            f"{at_once}, or lower {'global_batch_size' if batch else 'batch_size_train'}",
        ),
    ]


def resolve(cfg: RetrievalConfig, world_size: int) -> RetrievalConfig:
    """`cfg` with its unset batch knobs filled in for `world_size` processes, and checked against that number."""
    ranks = cfg.ranks_emulated or world_size
    if ranks % world_size:
        raise ValueError(
            f"ranks_emulated {ranks} cannot be shared evenly by {world_size} processes: set "
            f"ranks_emulated to a multiple of {world_size}, or change the number of processes"
        )
    batch = cfg.global_batch_size or cfg.batch_size_train * world_size
    return replace(cfg, global_batch_size=batch, ranks_emulated=ranks)


def load_config(
    path: str | Path, overrides: Mapping[str, Any] | Sequence[str] = (), world_size: int = 1
) -> RetrievalConfig:
    """The config in a YAML file, with `overrides` (`{'k_test': '64'}` or `['k_test=64']`, YAML scalars) on top.

    Sizes of a step that are left open are filled in for `world_size` processes.
    """
    values = _read_yaml(path)
    changes = _read_overrides(overrides)
    for where, keys in ((str(path), values), ("--set", changes)):
        for old, new in RENAMED.items():
            if old in keys and new in keys:
                raise ValueError(f"{where}: {old} is the former name of {new}: keep one of the two")
            if old in keys:
                keys[new] = keys.pop(old)
        _check_keys(where, keys)
    values |= changes
    where = str(path) + (" with" if changes else "") + "".join(f" --set {key}={val}" for key, val in changes.items())
    for key in ("dataset", "image_root"):
        if key not in values:
            raise ValueError(f"{where}: the key '{key}' is missing, set it ({_docs()[key]})")
    try:
        return resolve(RetrievalConfig(**values), world_size)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def save_config(cfg: RetrievalConfig, path: str | Path) -> None:
    """Write every knob to a YAML file that `load_config` reads back as an equal config, whole or not at all."""
    part = Path(f"{path}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            YAML().dump(asdict(cfg), file)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _docs() -> dict[str, str]:
    return {knob_.name: knob_.metadata["doc"] for knob_ in fields(RetrievalConfig)}


def _nearest(word: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    return f", did you mean '{close[0]}'?" if close else ""


def _refuse_lavis(where: str, values: Mapping[str, Any]) -> None:
    """LAVIS's YAML has the sections model, datasets and run; say what its values are called here."""
    model, datasets, run = (values.get(name) for name in ("model", "datasets", "run"))
    if not (isinstance(model, dict) and isinstance(datasets, dict) and isinstance(run, dict)):
        return
    names = {"vit_type": "vit", "batch_size_eval": "batch_size_test"}
    found = {names.get(key, key): value for key, value in [*model.items(), *run.items()]}
    keys = ", ".join(f"{key}: {found[key]}" for key in LAVIS_KEYS if key in found)
    data = "flickr" if any("flickr" in str(name) for name in datasets) else "coco"
    raise ValueError(
        f"{where}: a LAVIS config, with the sections model, datasets and run. Use configs/retrieval_{data}.yaml"
        f"{f' with {keys}' if keys else ''}"
    )


def _check_keys(where: str, keys: Mapping[str, Any]) -> None:
    _refuse_lavis(where, keys)
    for key in keys:
        if key not in _docs():
            hint = _nearest(key, _docs()) or ": remove it (configs/schema.py lists every key)"
            raise ValueError(f"{where}: unknown key '{key}'{hint}")


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        values = _parse(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot read the config ({error.strerror}): --config names a YAML file") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file in UTF-8: --config names a YAML file") from None
    except (YAMLError, ValueError) as error:  # ValueError: a scalar like 2024-13-01
        raise ValueError(f"{path}{_explain(error)}") from None
    if values is None:
        raise ValueError(f"{path}: the file is empty: write one `key: value` per line")
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, not keys: write one `key: value` per line")
    return values


def _read_overrides(overrides: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    if not isinstance(overrides, Mapping):
        for text in overrides:
            if "=" not in text:
                raise ValueError(f"--set {text}: write --set key=value")
        key, count = Counter(text.partition("=")[0] for text in overrides).most_common(1)[0] if overrides else ("", 1)
        if count > 1 and any(text.endswith(".tar") for text in overrides):
            raise ValueError(f"--set {key} is given {count} times: put quotation marks around braces, for the shell")
        overrides = dict(text.split("=", 1) for text in overrides)
    changes = {}
    for key, value in overrides.items():
        try:
            changes[key.strip()] = _parse(value) if isinstance(value, str) else value
        except (YAMLError, ValueError) as error:
            raise ValueError(f"--set {key}={value}{_explain(error)}; quote the value if it is a text") from None
    return changes


def _parse(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)  # plain types; refuses repeated keys


def _explain(error: Exception) -> str:
    """': ...' what is wrong, with the line where YAML knows it."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    line = f", line {mark.line + 1}" if mark else ""
    return f"{line}: not valid YAML: {problem or ' '.join(str(error).split())}"
