"""A training run: epochs of steps, validation after each, saves, and the test split with the best weights.

Where a run can be left and taken up again: before and within any step, before and within any evaluation. An epoch is
saved as trained before it is validated; a resumed run goes on with the evaluation that is still to be done.
"""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from checkpoints.load import load_pretrained
from checkpoints.runs import BEST, RunState, epoch_of_best, find_runs, resume, save_checkpoint, save_run
from configs.schema import RetrievalConfig, save_config
from data.loaders import recipe_sampler, train_loader, worker_died
from data.retrieval import TrainBatch
from models.blip_retrieval import BLIP_Retrieval
from models.freezing import training_table
from models.towers import start_from_towers
from retrieval.evaluate import chance_warning, evaluate
from retrieval.provenance import RANDOM, Origin, log_head
from retrieval.rankings import Rankings, save_rankings
from training.compilation import compile_encoders
from training.journal import Journal, read_log
from training.memory import auto_keep_graphs, pool_of_texts
from training.monitor import EpochMonitor, RunClock, TrainingWarnings
from training.preflight import LOG, Job
from training.schedule import build_optimizer, ramped_alpha, set_lr
from training.step import StepReport, train_step
from utils import (
    NotFinite,
    Stopped,
    StopSignal,
    average_gradients,
    barrier,
    broadcast_model,
    from_main,
    gather_names,
    generator,
    get_rank,
    get_world_size,
    is_main,
    name_images,
    never_stop,
    precision,
    seed_from,
)

log = logging.getLogger("blip")


def train(model: BLIP_Retrieval, job: Job) -> None:
    """Train, validate and test; Stopped with the words for the user when a stop signal came."""
    with StopSignal() as stop, Journal(job, model.temp.device) as journal, logging_redirect_tqdm():
        log_head(model, job.cfg)
        for line in trained_parts(model, job.cfg):
            log.info("%s", line)
        run = TrainingRun(model, job, stop, journal)
        try:
            run.validate_start()
            while not run.trained():
                run.train_epoch()
                run.validate()
            run.test()
        except Stopped:
            raise Stopped(f"{run.where_it_stands()}; go on with the same command and --resume auto") from None
        except NotFinite as error:
            images, saves = name_images(error.names, job.folder / "nonfinite_batch.txt"), find_runs(job.folder)
            last = saves[0] if saves else "the start of the run"
            raise ValueError(f"{error}{images} The last good state is {last}.") from None
        except RuntimeError as error:
            if not (stop.received and worker_died(error)):
                raise
            raise Stopped(
                f"stopped by {stop.received}, which also ended a loader's worker in the middle of the work: go on from "
                "the last save with the same command and --resume auto"
            ) from None


class TrainingRun:
    """Model, data, optimizer and the state of a run on this process."""

    def __init__(self, model: BLIP_Retrieval, job: Job, stop: StopSignal, journal: Journal):
        self.model, self.job, self.cfg, self.folder, self.stop = model, job, job.cfg, job.folder, stop
        self.journal = journal
        table = job.splits["train"]
        self.sampler = recipe_sampler(self.cfg, table, job.args.seed, get_world_size(), get_rank())
        self.loader = train_loader(self.cfg, table, self.sampler, model.temp.device)
        self.steps = len(self.loader)  # of an epoch
        self.warnings = TrainingWarnings(self.steps)
        self.optimizer = build_optimizer(model, self.cfg)
        self.state = start_run(model, self.optimizer, job, journal, self.steps)
        val, test = (len(job.splits[split].captions) for split in ("val", "test"))
        self.clock = RunClock(self.steps, self.cfg.max_epoch, test / val)
        epochs, batch = self.cfg.max_epoch, self.cfg.global_batch_size
        log.info("%d epochs of %d steps, each of %d pairs", epochs, self.steps, batch)
        broadcast_model(model)
        self.train_stats: dict[str, float] = {}  # of the epoch that is to be validated
        self.keep_graphs: int | None = None

    def trained(self) -> bool:
        """Whether all epochs are done, or as many as `patience` allows without a better one."""
        return trained(self.state, self.cfg)

    # ---- training -------------------------------------------------------------------------------------------------

    def train_epoch(self) -> None:
        """Train what is left of the epoch, and save it as trained."""
        cfg, state = self.cfg, self.state
        if self.keep_graphs is None:
            if cfg.compile:
                compile_encoders(self.model)
            self.keep_graphs = count_kept_graphs(self.model, cfg, self.optimizer)
        sizes, device = (self.steps, cfg.global_batch_size), self.model.temp.device
        monitor = EpochMonitor(*sizes, state, device, self.warnings, self.clock, self.journal)
        lr = set_lr(self.optimizer, cfg, state.epoch, state.epoch * self.steps + self.steps - 1)
        if state.step < self.steps:
            with monitor.bar:
                lr = self.train_steps(monitor)
                monitor.save(state)
            self.save()
        means = monitor.means(cfg.on_bad_sample == "skip")
        self.train_stats = {f"train_{k}": v for k, v in means.items()} | {"train_lr": lr}

    def train_steps(self, monitor: EpochMonitor) -> float:
        """The steps of the epoch that are left; the learning rate of the last one."""
        cfg, state = self.cfg, self.state
        self.sampler.set_epoch(state.epoch, state.step)
        self.model.train()
        for step, batch in enumerate(self.batches(monitor), state.step):
            lr = set_lr(self.optimizer, cfg, state.epoch, state.epoch * self.steps + step)
            self.optimizer.zero_grad()
            try:
                self.check_stop()
                report = self.gradients(batch)
            except Stopped:
                monitor.save(state)
                self.save()
                raise
            average_gradients(self.model)
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            grad_norm = torch.nn.utils.get_total_norm(grads)
            self.optimizer.step()
            state.step, state.momentum_moved = step + 1, False
            monitor.update(report, grad_norm, self.model.temp.detach(), lr, batch, bool(self.stop.received))
            if cfg.save_every_steps and state.step % cfg.save_every_steps == 0 and state.step < self.steps:
                monitor.save(state)
                self.save()
            if monitor.stop_requested and get_world_size() > 1:  # all processes have agreed on this step
                monitor.save(state)
                self.save()
                barrier()  # the launcher ends the others soon after the first has left: rank 0 may still be writing
                raise Stopped
        return lr

    def batches(self, monitor: EpochMonitor) -> Iterator[TrainBatch]:
        """What the loader gives; a stop signal that ended its workers ends the run like any other."""
        try:
            yield from self.loader
        except RuntimeError as error:
            if not (self.stop.received and worker_died(error)):
                raise
            monitor.save(self.state)  # the loader is asked between steps
            self.save()
            raise Stopped from None

    def check_stop(self) -> None:
        """Leave now if asked to; several processes agree between steps instead, when they exchange losses."""
        if get_world_size() == 1:
            self.stop.poll()

    def gradients(self, batch: TrainBatch) -> StepReport:
        """One step up to the gradients; a signal may end it between micro-batches, with the momentum twins moved."""
        state, moved = self.state, self.state.momentum_moved

        def poll() -> None:
            state.momentum_moved = True
            self.check_stop()

        assert self.keep_graphs is not None
        place = state.epoch, state.step, self.steps
        ranks = self.sampler.local_ranks
        return compute_gradients(
            self.model, batch, self.cfg, self.job.args.seed, ranks, self.keep_graphs, *place, poll, moved
        )

    def save(self) -> None:
        save_run(self.folder, self.model, self.optimizer, self.job.config, self.state, self.cfg.keep_last)

    def where_it_stands(self) -> str:
        """What is saved, and what is left of the run."""
        state = self.state
        if self.trained():
            left = "the test split is still to be evaluated"
        elif state.step >= self.steps:
            left = f"epoch {state.epoch} is trained and still to be validated"
        else:
            left = f"{state.step} of {self.steps} steps of epoch {state.epoch} are done"
        return f"stopped by {self.stop.received or 'a signal to another process'}: {left}, all saved in {self.folder}"

    # ---- evaluation -----------------------------------------------------------------------------------------------

    def validate_start(self) -> None:
        """Validation before the first step (epoch -1 in the log): where training starts from."""
        done = from_main(["yes"] if read_log(self.folder / LOG) else [])  # rank 0 keeps the log
        if not self.cfg.eval_before or self.state.epoch or self.state.step or done:
            return
        try:
            stats = {"epoch": -1, **self.evaluate("val")[0]}
        except Stopped:
            self.save()
            raise
        source = self.cfg.pretrained or " and ".join(filter(None, (self.cfg.image_tower, self.cfg.text_tower)))
        origin = Origin(source, self.state.origin or "unknown") if source else RANDOM
        self.journal.evaluated("start", stats, self.model, "val", origin, 0)

    def validate(self) -> None:
        """Validate the trained epoch, keep the best weights, log the epoch's line, and go to the next epoch."""
        state, epoch = self.state, self.state.epoch
        numbers, rankings = self.evaluate("val")
        stats = self.train_stats | numbers
        if warning := chance_warning(self.job.splits["val"], "val", stats):
            self.warnings.warn("chance", warning)
        mean, before = stats["val_r_mean"], state.best
        if mean > before or state.best_epoch < 0:
            beaten = f" (before {before:.2f})" if state.best_epoch >= 0 else ""
            state.best, state.best_epoch = mean, epoch
            save_checkpoint(self.folder / BEST, self.model, self.optimizer, self.job.config, epoch)
            log.info("new best: val_r_mean %.2f%s, saved as %s", mean, beaten, BEST)
        else:
            log.info("val_r_mean %.2f; the best is still %.2f of epoch %d", mean, before, state.best_epoch)
        row = {"epoch": epoch, **stats, "best_epoch": state.best_epoch}
        row = self.journal.evaluated("epoch", row, self.model, "val", Origin(), (epoch + 1) * self.steps)
        if state.best_epoch == epoch and is_main():
            save_rankings(self.folder, rankings, row)
        state.epoch, state.step, state.meters = epoch + 1, 0, {}
        self.save()
        barrier()
        if self.trained() and state.epoch < self.cfg.max_epoch:
            log.info("no better val r_mean for %d epochs (patience): training ends here", self.cfg.patience)

    def test(self) -> None:
        """The test split with the best weights."""
        load_pretrained(self.model, str(self.folder / BEST))
        numbers, rankings = self.evaluate("test")
        row = {"best_epoch": self.state.best_epoch, **numbers}
        row = self.journal.evaluated("test", row, self.model, "test", Origin(BEST), self.state.epoch * self.steps)
        if is_main():
            save_rankings(self.folder, rankings, row)
        log.info("the best epoch was %d; weights, log and config are in %s", self.state.best_epoch, self.folder)

    def evaluate(self, split: str) -> tuple[dict[str, float], Rankings]:
        start = time.monotonic()
        found = evaluate(self.model, self.cfg, self.job.splits[split], split, self.stop.poll)
        if split == "val":
            self.clock.validation = time.monotonic() - start
        return found


def trained(state: RunState, cfg: RetrievalConfig) -> bool:
    without_better = state.epoch - 1 - state.best_epoch if state.best_epoch >= 0 else 0
    return state.epoch >= cfg.max_epoch or bool(cfg.patience) and without_better >= cfg.patience


def trained_parts(model: BLIP_Retrieval, cfg: RetrievalConfig) -> list[str]:
    """What of the model trains and how fast, when that is not all of it at one rate."""
    if not (cfg.freeze or cfg.lora or cfg.layer_decay < 1):
        return []
    return ["what trains, and the factor on its learning rate:", *training_table(model, cfg.layer_decay)]


def start_run(
    model: BLIP_Retrieval, optimizer: torch.optim.Optimizer, job: Job, journal: Journal, steps: int
) -> RunState:
    """The state to start from: that of a save (`--resume`), or step 0 with weights of `pretrained` or random ones."""
    cfg, folder, source = job.cfg, job.folder, job.args.resume
    state = resume(source, folder, model, optimizer, job.config) if source else None
    if len({*gather_names([str(state and (state.epoch, state.step))])}) > 1:
        raise ValueError(f"--resume {source}: not every process finds the same save: all must see {folder} alike.")
    if state:
        require_best(state, cfg, folder, steps)
    elif source and is_main():
        log.warning("warning: --resume %s: %s holds no save of a run, so this run STARTS ANEW", source, folder)
    origin = state.origin if state else RANDOM.kind
    if state is None and cfg.pretrained:
        origin = load_pretrained(model, cfg.pretrained, cfg.cache_dir).kind
    elif state is None and (job.plan.image or job.plan.text):
        origin = start_from_towers(model, job.plan).kind
    elif state is None:
        log.info("training starts from random weights, as neither pretrained nor a tower is set")
    journal.open(state, steps)  # the first thing that is written
    if is_main():
        save_config(cfg, folder / "config.yaml")
    return state or RunState(origin=origin)


def require_best(state: RunState, cfg: RetrievalConfig, folder: Path, steps: int) -> None:
    """If the best weights are not those that `state` tells of, have the next epoch's become the best.

    So it is where a save went to another folder without them, or where the run had gone on from that save before.
    ValueError if no epoch is left.
    """
    found = from_main([epoch_of_best(folder)])[0]
    begun = state.epoch if state.step >= steps else None  # kept, and the save after it did not come about
    if state.best_epoch < 0 or found in (state.best_epoch, begun):
        return
    words = f"of epoch {found}" if isinstance(found, int) else found
    missing = f"{folder / BEST} is {words}, and the best weights of the resumed run were those of epoch"
    if trained(state, cfg):
        raise ValueError(f"{missing} {state.best_epoch}: put that file there, or go on from an earlier save.")
    if is_main():
        log.warning("warning: %s %d: the best of epoch %d and later is kept", missing, state.best_epoch, state.epoch)
    state.best, state.best_epoch = 0.0, -1


def count_kept_graphs(model: BLIP_Retrieval, cfg: RetrievalConfig, optimizer: torch.optim.Optimizer) -> int:
    """Image graphs a process keeps within a step: the config's number, or as many as its memory has room for."""
    if isinstance(cfg.keep_graphs, int):
        return cfg.keep_graphs
    samples = cfg.global_batch_size // get_world_size()
    pool = pool_of_texts(model, cfg.global_batch_size, cfg.ranks_emulated)
    with precision(model, cfg.precision):
        return auto_keep_graphs(model, cfg.image_size, cfg.batch_size_train, samples, optimizer, pool)


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
    poll: Callable[[], None] = never_stop,
    momentum_moved: bool = False,
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
            poll=poll,
            momentum_moved=momentum_moved,
            hard_negatives=epoch * steps + step >= cfg.random_negative_steps,
        )
