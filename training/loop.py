"""A training run: epochs of steps, validation after each, saves, and the test split with the best weights."""

import logging

import torch
from torch.utils.data import DataLoader

from checkpoints.load import load_pretrained
from checkpoints.runs import BEST, RunState, find_runs, resume, save_checkpoint, save_run
from configs.schema import RetrievalConfig, save_config
from data.loaders import recipe_sampler, train_loader
from data.retrieval import TrainBatch
from models.blip_retrieval import BLIP_Retrieval
from retrieval.evaluate import chance_warning, evaluate
from training.compilation import compile_encoders
from training.memory import auto_keep_graphs
from training.monitor import EpochMonitor, TrainingWarnings
from training.preflight import LOG, Job
from training.schedule import build_optimizer, ramped_alpha, set_lr
from training.step import StepReport, train_step
from utils import (
    NotFinite,
    StopSignal,
    average_gradients,
    barrier,
    broadcast_model,
    generator,
    get_rank,
    get_world_size,
    is_main,
    keep_log_until,
    name_images,
    precision,
    record,
    seed_from,
)

log = logging.getLogger("blip")


def train(model: BLIP_Retrieval, job: Job) -> int:
    """Epochs with validation, then the test split with the best weights. Returns the exit status."""
    cfg, folder, table = job.cfg, job.folder, job.splits["train"]
    sampler = recipe_sampler(cfg, len(table.captions), job.args.seed, get_world_size(), get_rank())
    loader = train_loader(cfg, table, sampler, model.temp.device)
    optimizer = build_optimizer(model, cfg)
    state = start_run(model, optimizer, job)
    broadcast_model(model)
    if state.epoch == state.step == 0:
        record(
            folder / LOG, {"epoch": -1, **evaluate(model, cfg, job.splits["val"], "val")}
        )  # where training starts from
    if cfg.compile:
        compile_encoders(model)
    keep_graphs = count_kept_graphs(model, cfg, optimizer)
    stop, warnings = StopSignal(), TrainingWarnings(len(loader))
    for epoch in range(state.epoch, cfg.max_epoch):
        try:
            stats = train_one_epoch(model, loader, optimizer, job, state, keep_graphs, stop, warnings)
            if stats is None:
                log.info("stopped by a signal after step %d of epoch %d: go on with --resume auto", state.step, epoch)
                return StopSignal.EXIT_STOPPED
            stats |= evaluate(model, cfg, job.splits["val"], "val")
        except NotFinite as error:
            images, saves = name_images(error.names, folder / "nonfinite_batch.txt"), find_runs(folder)
            last = saves[0] if saves else "the start of the run"
            raise ValueError(f"{error}{images} The last good state is {last}.") from None
        if warning := chance_warning(job.splits["val"], "val", stats):
            warnings.warn("chance", warning)
        if stats["val_r_mean"] > state.best or state.best_epoch < 0:
            state.best, state.best_epoch = stats["val_r_mean"], epoch
            save_checkpoint(folder / BEST, model, optimizer, job.config, epoch)
        record(folder / LOG, {"epoch": epoch, **stats, "best_epoch": state.best_epoch})
        state.epoch, state.step, state.meters = epoch + 1, 0, {}
        save_run(folder, model, optimizer, job.config, state, cfg.keep_last)
        barrier()
    load_pretrained(model, str(folder / BEST))
    record(folder / LOG, {"best_epoch": state.best_epoch, **evaluate(model, cfg, job.splits["test"], "test")})
    log.info("the best epoch was %d; weights, log and config are in %s", state.best_epoch, folder)
    return 0


def start_run(model: BLIP_Retrieval, optimizer: torch.optim.Optimizer, job: Job) -> RunState:
    """The state to go on from: a run's own (`--resume`), or the beginning, from `pretrained` or random weights."""
    cfg, folder, source = job.cfg, job.folder, job.args.resume
    state = resume(source, folder, model, optimizer, job.config) if source else None
    if state is None and cfg.pretrained:
        load_pretrained(model, cfg.pretrained, cfg.cache_dir)
    if is_main():  # the first thing that is written
        folder.mkdir(parents=True, exist_ok=True)
        save_config(cfg, folder / "config.yaml")
        keep_log_until(folder / LOG, state.epoch if state else -1)
    return state or RunState()


def count_kept_graphs(model: BLIP_Retrieval, cfg: RetrievalConfig, optimizer: torch.optim.Optimizer) -> int:
    """Image graphs a process keeps within a step: the config's number, or as many as its memory has room for."""
    if isinstance(cfg.keep_graphs, int):
        return cfg.keep_graphs
    samples = cfg.global_batch_size // get_world_size()
    with precision(model, cfg.precision):
        return auto_keep_graphs(model, cfg.image_size, cfg.batch_size_train, samples, optimizer)


def train_one_epoch(
    model: BLIP_Retrieval,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    job: Job,
    state: RunState,
    keep_graphs: int,
    stop: StopSignal,
    warnings: TrainingWarnings,
) -> dict[str, float] | None:
    """Train the steps of `state.epoch` that are left: the epoch's mean losses, or None when a signal stopped it."""
    cfg, epoch, steps = job.cfg, state.epoch, len(loader)
    loader.batch_sampler.set_epoch(epoch, state.step)
    monitor = EpochMonitor(f"epoch {epoch}", steps, cfg.global_batch_size, model.temp.device, state, warnings)
    model.train()
    for step, batch in enumerate(loader, state.step):
        lr = set_lr(optimizer, cfg, epoch, epoch * steps + step)
        optimizer.zero_grad()
        ranks = loader.batch_sampler.local_ranks
        report = compute_gradients(model, batch, cfg, job.args.seed, ranks, keep_graphs, epoch, step, steps)
        average_gradients(model)
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        monitor.update(report, grad_norm, model.temp.detach(), lr, batch, stop.received)
        state.step = step + 1
        due = cfg.save_every_steps and state.step % cfg.save_every_steps == 0 and state.step < steps
        if due or monitor.stop_requested:
            monitor.save(state)
            save_run(job.folder, model, optimizer, job.config, state, cfg.keep_last)
        if monitor.stop_requested:
            return None
    return {f"train_{k}": v for k, v in monitor.means(cfg.on_bad_image == "skip").items()} | {"train_lr": lr}


def compute_gradients(
    model: BLIP_Retrieval,
    batch: TrainBatch,
    cfg: RetrievalConfig,
    seed: int,
    ranks: range,
    keep_graphs: int,
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
            keep_graphs=keep_graphs,
            generators=[generator(device, seed, epoch, step, 1 + rank) for rank in ranks],
        )
