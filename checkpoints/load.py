"""Foreign weights into the model: what may be missing from a file, and ignored in it, is decided here.

What formats look like is known by `weights.py` (.pth), `huggingface.py`, `runs.py` (saves of a run) and `download.py`
(addresses).
"""

import logging
from dataclasses import dataclass, field

from torch import Tensor

from checkpoints.download import local_path
from checkpoints.files import few
from checkpoints.huggingface import CONFIG, TENSOR_FILES, adopt, is_foreign, read_folder
from checkpoints.protocol import RetrievalModel
from checkpoints.runs import BEST, find_runs
from checkpoints.weights import (
    POS_EMBEDS,
    QUEUES,
    TWINS,
    WeightFile,
    merge_lora,
    online_name,
    read_sizes,
    read_weights,
    require_equal_sizes,
    require_equal_tokenizers,
    resample_pos_embed,
    unmerge_lora,
)
from configs.sizes import MedConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors, by official name; `kind` says what the file is.

    loaded: as they are; resampled: position embeddings of another image size; seeded: momentum twins that start at the
    online weights; ignored: not used, though in the file; missing: queues, which stay as the model made them. Of towers
    also folded: into their neighbours, without loss; random: in no tower, as cross-attention and heads.
    """

    loaded: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    seeded: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    kind: str = ""
    folded: list[str] = field(default_factory=list)
    random: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ["loaded", "resampled", "seeded", "ignored", "missing"]
        counts += [name for name in ("folded", "random") if getattr(self, name)]
        return f"{self.kind}: {', '.join(f'{len(getattr(self, name))} {name}' for name in counts)}"


# ---- loading --------------------------------------------------------------------------------------------------------


def open_weights(source: str, cache_dir: str = "") -> WeightFile:
    """Weights from a file's path, address or released name, from a run folder, or from a Hugging Face folder.

    Of a run folder it takes the best weights or, before there are any, the newest save.
    """
    path = local_path(source, cache_dir)
    inside = [path / name for name in TENSOR_FILES if (path / name).exists()]
    if path.is_dir() and inside and not (path / CONFIG).exists():
        path = inside[0]
    if path.is_dir() and not (path / CONFIG).exists():
        saves = [save for save in (path / BEST, *find_runs(path)) if save.exists()]
        if not saves:
            raise ValueError(
                f"{path}: neither a Hugging Face folder (it has no {CONFIG}) nor a run folder (it has neither {BEST} "
                "nor another save)."
            )
        return read_weights(saves[0])
    if path.is_dir():
        return read_folder(path)
    file = read_weights(path)
    return adopt(file, path.parent) if is_foreign(file) else file


def load_pretrained(model: RetrievalModel, source: str, cache_dir: str = "") -> LoadReport:
    """Load foreign weights into the model: everything but the queues, and nothing silently.

    ValueError for a file that is damaged, has other sizes, or has a tensor too many or too few.
    """
    file = open_weights(source, cache_dir)
    require_equal_heads(file, model.text_encoder.config)
    require_equal_tokenizers(file.name, file.tokenizer, model.tokenizer)
    state, report = fit(file, merge_lora(model.state_dict()), model.vit)
    model.load_state_dict(unmerge_lora(_online_where_shared(state, model), model.state_dict()), strict=False)
    if report.seeded:
        model.copy_params()
    log.info("%s: %s", file.name, report)
    if report.resampled:
        log.info("%s: position embeddings resampled to %d image tokens", file.name, state[POS_EMBEDS[0]].shape[1])
    if report.seeded:
        log.info("%s: no momentum weights; the momentum twins start at the online weights", file.name)
    return report


def _online_where_shared(state: dict[str, Tensor], model: RetrievalModel) -> dict[str, Tensor]:
    """A frozen layer's momentum twin is the same tensor: it must not be overwritten with the file's own twin."""
    tensors = model.state_dict(keep_vars=True)
    shared = [key for key in tensors if key.startswith(TWINS) and tensors[key] is tensors.get(online_name(key))]
    return state | {key: state[online_name(key)] for key in shared if key in state}


def fit(file: WeightFile, target: dict[str, Tensor], vit: str = "") -> tuple[dict[str, Tensor], LoadReport]:
    """The file's tensors in `target`'s shapes, and a report; ValueError unless they make a whole model.

    `vit`: the model's image encoder, by its name.
    """
    named = file.extra.get("config", {}).get("vit", "")
    require_equal_sizes(read_sizes(file.state, file.name, named), read_sizes(target, "the model", vit), file.name)
    state = {key: value for key, value in file.state.items() if key not in QUEUES}
    resampled = [key for key in POS_EMBEDS if key in state and state[key].shape[1] != target[key].shape[1]]
    for key in resampled:
        state[key] = resample_pos_embed(state[key], target[key].shape[1], f"{file.name}: {key}")
    has_twins = any(key.startswith(TWINS) for key in state)
    seeded = [] if has_twins else [key for key in target if key.startswith(TWINS)]
    queues = [key for key in target if key in QUEUES]

    missing = [key for key in target if key not in {*state, *seeded, *queues}]
    unexpected = [key for key in state if key not in target]
    other = [key for key in state if key in target and state[key].shape != target[key].shape]
    for what, keys in (("lacks", missing), ("also has", unexpected), ("has in another shape", other)):
        if keys:
            raise ValueError(
                f"{file.name}: does not fit the retrieval model, it {what} {len(keys)} tensors: {few(keys)}. Is it "
                "of another task (captioning, VQA) or of ALBEF? `python -m checkpoints inspect` says."
            )
    loaded = [key for key in state if key not in resampled]
    ignored = file.ignored + [key for key in file.state if key in QUEUES]
    return state, LoadReport(loaded, resampled, seeded, ignored, queues, file.kind)


def require_equal_heads(file: WeightFile, med: MedConfig) -> None:
    """Heads leave no trace in shapes: a wrong number would load, and compute something else."""
    heads = file.extra.get("text_config", {}).get("num_attention_heads", med.num_attention_heads)
    if heads != med.num_attention_heads:
        raise ValueError(
            f"{file.name}: its text encoder has {heads} attention heads, the config's {med.num_attention_heads}: set "
            "num_attention_heads in the JSON that `med_config` names."
        )
