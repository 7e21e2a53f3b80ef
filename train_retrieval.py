"""Fine-tune and evaluate BLIP for image-text retrieval.

    python -m torch.distributed.run --nproc_per_node=1 train_retrieval.py \\
        --config configs/retrieval_flickr.yaml --output_dir output/retrieval_flickr [--evaluate]

It also runs without the launcher, as one process. A run folder gets `config.yaml`, `log.txt` (one JSON line an epoch),
`checkpoint_best.pth` (best validation r_mean, the published layout) and the last states for `--resume`;
`--evaluate` writes `evaluate.txt` only.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from configs.schema import RetrievalConfig, load_config, resolve, save_config
from data.annotations import load_annotations
from data.images import find_path, open_store, require_images
from data.loaders import GlobalBatchSampler, eval_image_loader, train_loader
from data.metrics import KS, chance_metrics, retrieval_metrics
from data.retrieval import TrainBatch
from models.blip_retrieval import BLIP_Retrieval
from models.checkpoint import RunState, find_runs, load_pretrained, resume, save_checkpoint, save_run
from models.rerank import own_blocks, rerank
from models.train_step import StepReport, train_step
from utils import (
    LossMeter,
    NotFinite,
    StopSignal,
    average_gradients,
    barrier,
    broadcast_model,
    cosine_lr,
    generator,
    get_rank,
    get_world_size,
    init_distributed,
    is_main,
    precision,
    ramped_alpha,
    seed_from,
    setup_logging,
)

log = logging.getLogger("blip")
BEST, LOG = "checkpoint_best.pth", "log.txt"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune or evaluate BLIP for image-text retrieval.")
    parser.add_argument("--config", required=True, help="YAML file; configs/schema.py documents every key")
    parser.add_argument("--output_dir", type=Path, help="run folder (default: output/<name of the config>)")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate val and test, touching no checkpoint")
    parser.add_argument("--device", default="auto", help="cuda, cuda:N or cpu (default: cuda when there is one)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--resume", default="", metavar="auto|PATH", help="continue a run of --output_dir, or that file"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override config keys"
    )
    args = parser.parse_args(argv)
    args.output_dir = args.output_dir or Path("output") / Path(args.config).stem
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 something the user can mend (one paragraph on stderr), 75 saved after a signal."""
    args = parse_args(argv)
    try:
        device = init_distributed(args.device)
        setup_logging()
        cfg = resolve(load_config(args.config, args.set), get_world_size())
        torch.manual_seed(args.seed)  # the same random weights on every process
        model = build_model(cfg).to(device)
        if args.evaluate:
            evaluate_only(model, cfg, args, device)
        else:
            return train(model, cfg, args, device)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def build_model(cfg: RetrievalConfig) -> BLIP_Retrieval:
    return BLIP_Retrieval(
        med_config=find_path(cfg.med_config),
        image_size=cfg.image_size,
        vit=cfg.vit,
        vit_grad_ckpt=cfg.vit_grad_ckpt,
        vit_ckpt_layer=cfg.vit_ckpt_layer,
        embed_dim=cfg.embed_dim,
        queue_size=cfg.queue_size,
        momentum=cfg.momentum,
        negative_all_rank=cfg.negative_all_rank,
        patch_size=cfg.patch_size,
    )


# ---- evaluation -----------------------------------------------------------------------------------------------------


def evaluate_only(model: BLIP_Retrieval, cfg: RetrievalConfig, args: argparse.Namespace, device: torch.device) -> None:
    source = cfg.finetuned or cfg.pretrained
    if source:
        load_pretrained(model, source, cfg.cache_dir)
    else:
        log.warning("neither finetuned nor pretrained is set: evaluating random weights")
    stats = evaluate(model, cfg, "val", device) | evaluate(model, cfg, "test", device)
    record(args.output_dir, stats, "evaluate.txt")


def evaluate(model: BLIP_Retrieval, cfg: RetrievalConfig, split: str, device: torch.device) -> dict[str, float]:
    """Recall of one split in percent, keys prefixed `val_` or `test_`.

    BLIP's nine keys are of the re-ranked lists; `itc_*` are the same nine from contrast alone, `chance_*` by luck.
    """
    annotations = load_annotations(cfg, split)
    require_images(open_store(cfg), annotations.images)
    num_images = len(annotations.images)
    own_images = [i for block in own_blocks(num_images, cfg.batch_size_test) for i in block]
    batches = eval_image_loader(cfg, annotations, own_images, device)
    gallery = min(num_images, len(annotations.captions))
    log.info("evaluate %s: %d images, %d captions", annotations.name, num_images, len(annotations.captions))
    if cfg.k_test > gallery:
        log.info("k_test %d is larger than the gallery: %d candidates are re-ranked", cfg.k_test, gallery)
    model.eval()
    with precision(model, cfg.eval_precision):
        ranking = rerank(
            model, batches, num_images, annotations.captions, cfg.k_test, cfg.batch_size_test, cfg.rerank_tokens
        )
    ids = annotations.image_ids, annotations.caption_ids
    itm, itc = (retrieval_metrics(x.i2t, x.i2t_value, x.t2i, x.t2i_value, *ids) for x in (ranking.itm, ranking.itc))
    chance = chance_metrics(*ids)
    log_recall(annotations.name, {"re-ranked (ITM)": itm, "contrast (ITC)": itc, "chance": chance})
    kinds = {"": itm, "itc_": itc, "chance_": chance}
    return {f"{split}_{kind}{k}": v for kind, metrics in kinds.items() for k, v in metrics.items()}


def log_recall(name: str, rows: dict[str, dict[str, float]]) -> None:
    """A table of Recall@K in percent, one row for each way to rank."""
    ks = "".join(f"{f'R@{k}':>8}" for k in KS)
    log.info("%-18s %24s  %24s", name, "image -> text", "text -> image")
    log.info("%-18s %s  %s  %8s", "Recall, %", ks, ks, "mean")
    for row, metrics in rows.items():
        txt, img = ("".join(f"{metrics[f'{way}_r{k}']:8.2f}" for k in KS) for way in ("txt", "img"))
        log.info("%-18s %s  %s  %8.2f", row, txt, img, metrics["r_mean"])


# ---- training -------------------------------------------------------------------------------------------------------


def train(model: BLIP_Retrieval, cfg: RetrievalConfig, args: argparse.Namespace, device: torch.device) -> int:
    """Epochs with validation, then the test split with the best weights. Returns the exit status."""
    folder = args.output_dir
    for split in ("val", "test"):
        require_images(open_store(cfg), load_annotations(cfg, split).images)
    loader = build_loader(cfg, args.seed, device)
    optimizer = build_optimizer(model, cfg)
    state = start_run(model, optimizer, cfg, args)
    broadcast_model(model)
    if state.epoch == state.step == 0:
        record(folder, {"epoch": -1, **evaluate(model, cfg, "val", device)})  # where training starts from
    stop = StopSignal()
    for epoch in range(state.epoch, cfg.max_epoch):
        try:
            stats = train_one_epoch(model, loader, optimizer, cfg, args, state, stop, device)
        except NotFinite as error:
            saves = find_runs(folder)
            raise ValueError(
                f"{error} The last good state is {saves[0] if saves else 'the start of the run'}."
            ) from None
        if stats is None:
            log.info("stopped by a signal after step %d of epoch %d: continue with --resume auto", state.step, epoch)
            return StopSignal.EXIT_STOPPED
        stats |= evaluate(model, cfg, "val", device)
        if stats["val_r_mean"] > state.best or state.best_epoch < 0:
            state.best, state.best_epoch = stats["val_r_mean"], epoch
            save_checkpoint(folder / BEST, model, optimizer, asdict(cfg), epoch)
        record(folder, {"epoch": epoch, **stats, "best_epoch": state.best_epoch})
        state.epoch, state.step, state.meters = epoch + 1, 0, {}
        save_run(folder, model, optimizer, asdict(cfg), state, cfg.keep_last)
        barrier()
    load_pretrained(model, str(folder / BEST))
    record(folder, {"best_epoch": state.best_epoch, **evaluate(model, cfg, "test", device)})
    log.info("the best epoch was %d; weights, log and config are in %s", state.best_epoch, folder)
    return 0


def build_loader(cfg: RetrievalConfig, seed: int, device: torch.device) -> DataLoader:
    """This process's share of every global batch."""
    annotations = load_annotations(cfg, "train")
    require_images(open_store(cfg), annotations.images)
    local = cfg.ranks_emulated // get_world_size()
    ranks = range(get_rank() * local, (get_rank() + 1) * local)
    sampler = GlobalBatchSampler(len(annotations.captions), cfg.global_batch_size, cfg.ranks_emulated, ranks, seed)
    return train_loader(cfg, annotations, sampler, device)


def start_run(
    model: BLIP_Retrieval, optimizer: torch.optim.Optimizer, cfg: RetrievalConfig, args: argparse.Namespace
) -> RunState:
    """The state to go on from: a run's own (`--resume`), or the beginning, from `pretrained` or random weights."""
    folder = args.output_dir
    if not args.resume and (folder / LOG).exists():
        raise ValueError(
            f"--output_dir {folder} already holds a run: continue it with --resume auto, or name another folder."
        )
    state = resume(args.resume, folder, model, optimizer, asdict(cfg)) if args.resume else None
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        save_config(cfg, folder / "config.yaml")
        keep_log_until(folder / LOG, state.epoch if state else -1)
    if state is None and cfg.pretrained:
        load_pretrained(model, cfg.pretrained, cfg.cache_dir)
    return state or RunState()


def build_optimizer(model: BLIP_Retrieval, cfg: RetrievalConfig) -> torch.optim.Optimizer:
    """AdamW on everything that trains, weight decay included, as BLIP does; `scale` multiplies a group's rate."""
    rest = [p for p in model.parameters() if p.requires_grad and p is not model.temp]
    groups = [{"params": rest, "scale": 1.0}, {"params": [model.temp], "scale": cfg.temp_lr_scale}]
    return torch.optim.AdamW(groups, lr=cfg.init_lr, weight_decay=cfg.weight_decay, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, cfg: RetrievalConfig, epoch: int, global_step: int) -> float:
    lr = cosine_lr(epoch, cfg.max_epoch, cfg.init_lr, cfg.min_lr)
    if global_step < cfg.warmup_steps:
        lr *= (global_step + 1) / cfg.warmup_steps
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
    return lr


def train_one_epoch(
    model: BLIP_Retrieval,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    cfg: RetrievalConfig,
    args: argparse.Namespace,
    state: RunState,
    stop: StopSignal,
    device: torch.device,
) -> dict[str, float] | None:
    """Train the steps of `state.epoch` that are left: the epoch's mean losses, or None when a signal stopped it."""
    epoch, steps = state.epoch, len(loader)
    loader.batch_sampler.set_epoch(epoch, state.step)
    meter = LossMeter(f"epoch {epoch}", steps, cfg.global_batch_size, device, state)
    model.train()
    for step, batch in enumerate(loader, state.step):
        check_negatives(batch, cfg, epoch, step)
        lr = set_lr(optimizer, cfg, epoch, epoch * steps + step)
        optimizer.zero_grad()
        report = compute_gradients(model, batch, cfg, args.seed, loader.batch_sampler.local_ranks, epoch, step, steps)
        average_gradients(model)
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        meter.update(report, grad_norm, lr, batch.names, stop.received)
        state.step = step + 1
        due = cfg.save_every_steps and state.step % cfg.save_every_steps == 0 and state.step < steps
        if due or meter.stop_requested:
            meter.save(state)
            save_run(args.output_dir, model, optimizer, asdict(cfg), state, cfg.keep_last)
        if meter.stop_requested:
            return None
    return {f"train_{k}": v for k, v in meter.means().items()} | {"train_lr": lr}


def compute_gradients(
    model: BLIP_Retrieval,
    batch: TrainBatch,
    cfg: RetrievalConfig,
    seed: int,
    ranks: range,
    epoch: int,
    step: int,
    steps: int,
) -> StepReport:
    """One training step up to the gradients; every random draw is a function of (seed, epoch, step, rank)."""
    device = model.temp.device
    torch.manual_seed(seed_from(seed, epoch, step, get_rank()))  # dropout and drop-path
    with precision(model, cfg.precision):
        return train_step(
            model,
            batch.image.to(device, non_blocking=True),
            batch.text,
            batch.idx.to(device, non_blocking=True),
            ramped_alpha(cfg.alpha, epoch, step, steps),
            ranks=len(ranks),
            micro_batch=cfg.batch_size_train,
            keep_graphs=0 if cfg.keep_graphs == "auto" else cfg.keep_graphs,
            generators=[generator(device, seed, epoch, step, 1 + rank) for rank in ranks],
        )


def check_negatives(batch: TrainBatch, cfg: RetrievalConfig, epoch: int, step: int) -> None:
    """A pool that shows one image only has no negative to draw: a ValueError, before the step is computed."""
    if cfg.negative_all_rank and get_world_size() > 1:
        return  # other processes' images are negatives too
    pools = 1 if cfg.negative_all_rank else cfg.ranks_emulated // get_world_size()
    for pool in batch.idx.view(pools, -1):
        if bool((pool == pool[0]).all()):
            raise ValueError(
                f"epoch {epoch}, step {step}: all {len(pool)} samples that may be each other's negatives show the same "
                f"image (id {int(pool[0])}, first file {batch.names[0]}). Use a larger batch, set "
                "negative_all_rank: true, or give different images different image_id."
            )


def record(folder: Path, stats: dict[str, float], name: str = LOG) -> None:
    """Append one JSON line to a file of the run folder."""
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(stats) + "\n")


def keep_log_until(path: Path, epoch: int) -> None:
    """Drop the lines that a resumed run writes again: those of `epoch` and later, and the test line."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text(
            "".join(line for line in lines if json.loads(line).get("epoch", epoch) < epoch), encoding="utf-8"
        )


if __name__ == "__main__":
    sys.exit(main())
