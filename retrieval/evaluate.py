"""Recall of one split: pictures from the loader, re-ranking, the table and the numbers that are stored."""

import logging
from collections.abc import Callable
from pathlib import Path

from checkpoints.load import load_pretrained
from checkpoints.runs import BEST, find_runs
from configs.schema import RetrievalConfig, save_config
from data.annotations import Annotations
from data.loaders import eval_image_loader, worker_died
from models.blip_retrieval import BLIP_Retrieval
from retrieval import eccv
from retrieval.metrics import chance_metrics, recall_table, retrieval_metrics, within_noise
from retrieval.provenance import RANDOM, Origin, Provenance, log_head
from retrieval.published import compare, published_metrics
from retrieval.rankings import Rankings, keep, save_rankings
from retrieval.rerank import own_blocks, rerank
from utils import NotFinite, Stopped, StopSignal, is_main, never_stop, precision, record

log = logging.getLogger("blip")


def evaluate_only(
    model: BLIP_Retrieval,
    cfg: RetrievalConfig,
    splits: dict[str, Annotations],
    folder: Path,
    weights: tuple[str, str],
    seed: int,
) -> None:
    """Load the weights, evaluate the splits, append one JSON line to `evaluate.txt` in `folder`, and keep the rankings.

    Unless it is the folder of a run, its `config.yaml` becomes this one: reports learn there where the pictures are.
    `weights`: the checkpoint ('' = random weights) and why it is this one. Stopped with the words for the user when a
    stop signal came; the folder is then as it was.
    """
    log_head(model, cfg)
    (source, why), origin = weights, RANDOM
    log.info("weights: %s (%s)", source or "random", why)
    if source:
        origin = Origin(source, load_pretrained(model, source, cfg.cache_dir).kind)
    stats: dict[str, float] = {}
    kept: list[Rankings] = []
    with StopSignal() as stop:
        try:
            for split, annotations in splits.items():
                numbers, rankings = evaluate(model, cfg, annotations, split, stop.poll, source)
                stats |= numbers
                kept.append(rankings)
                if warning := chance_warning(annotations, split, stats):
                    log.warning("warning: %s", warning)
        except (Stopped, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not (stop.received and worker_died(error)):
                raise
            words = f"stopped by {stop.received}: nothing was written; give the same command again"
            raise Stopped(words) from None
    log.info("these numbers are of %s (%s)", source or "random weights", why)
    if is_main():
        provenance = Provenance(cfg, splits, seed, model.temp.device)
        row = provenance.row("evaluate", stats, model, splits, origin)
        record(folder / "evaluate.txt", row)
        for rankings in kept:
            save_rankings(folder, rankings, row)
        if not (find_runs(folder) or any((folder / name).exists() for name in (BEST, "log.txt"))):
            save_config(cfg, folder / "config.yaml")


def evaluate(
    model: BLIP_Retrieval,
    cfg: RetrievalConfig,
    annotations: Annotations,
    split: str,
    poll: Callable[[], None] = never_stop,
    source: str = "",
) -> tuple[dict[str, float], Rankings]:
    """Recall of one split in percent, keys prefixed `val_` or `test_`, and its rankings; NotFinite for a bad score.

    BLIP's nine keys are of the re-ranked lists; `itc_*` the same from contrast alone, `chance_*` by a random order.
    `source`: where the weights were loaded from; the log compares a released file with its published numbers.
    """
    num_images = len(annotations.images)
    own_images = [i for block in own_blocks(num_images, cfg.batch_size_test) for i in block]
    batches = eval_image_loader(cfg, annotations, own_images, model.temp.device)
    ids = annotations.image_ids, annotations.caption_ids
    gallery = min(num_images, len(annotations.captions))
    log.info("evaluate %s: %d images, %d captions", annotations.name, num_images, len(annotations.captions))
    if cfg.k_test > gallery:
        log.info("k_test %d is larger than the gallery: %d candidates are re-ranked", cfg.k_test, gallery)
    model.eval()
    with precision(model, cfg.eval_precision):
        sizes = cfg.k_test, cfg.batch_size_test, cfg.rerank_tokens
        ranking = rerank(model, batches, num_images, annotations.captions, *sizes, *ids, poll)
    try:
        itm, itc = (retrieval_metrics(x.i2t, x.i2t_value, x.t2i, x.t2i_value, *ids) for x in (ranking.itm, ranking.itc))
    except ValueError as error:
        raise NotFinite(f"{annotations.name}: {error}") from None
    chance = chance_metrics(*ids)
    rankings = {"re-ranked (ITM)": itm, "contrast (ITC)": itc, "chance": chance}
    published = published_metrics(source, cfg.dataset, split, num_images, len(annotations.captions))
    for line in recall_table(annotations.name, rankings | ({"published": published} if published else {})):
        log.info("%s", line)
    if published:
        log.info("%s", compare(itm, published))
    corrected: dict[str, float] = {}
    if cfg.dataset == "coco" and split == "test" and eccv.installed() and is_main():
        corrected, lines = eccv.corrected_metrics(ranking, annotations)
        for line in lines:
            log.info("%s", line)
    kinds = {"": itm, "itc_": itc, "chance_": chance}
    numbers = {f"{split}_{kind}{k}": v for kind, metrics in kinds.items() for k, v in metrics.items()}
    numbers |= {f"{split}_{key}": value for key, value in corrected.items()}
    return numbers, keep(ranking, annotations, split)


def chance_warning(table: Annotations, split: str, stats: dict[str, float]) -> str:
    """What to say when a split's Recall is what a random order gives; '' when it is not."""
    metrics = {key.removeprefix(f"{split}_"): value for key, value in stats.items()}
    lonely_images, lonely_captions = table.distractors
    if not within_noise(metrics, len(table.images) - lonely_images, len(table.captions) - lonely_captions):
        return ""
    return (
        f"{table.name}: R@1 and R@10 are within noise of chance (2 sigma), nothing was learnt: check that captions "
        "describe their images, that a checkpoint is loaded (pretrained, finetuned), and init_lr"
    )
