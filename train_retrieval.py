"""Fine-tune and evaluate BLIP for image-text retrieval.

    python -m torch.distributed.run --nproc_per_node=1 train_retrieval.py \\
        --config configs/retrieval_flickr.yaml --output_dir output/retrieval_flickr [--evaluate]

It also runs without the launcher, as one process. `--check` looks at everything that could go wrong later and writes
nothing. A run folder gets `config.yaml`, `log.txt` (one JSON line an epoch), perhaps `nonfinite_batch.txt`,
`checkpoint_best.pth` (best validation r_mean, the published layout) and the last states for `--resume`;
`--evaluate` writes `evaluate.txt` only.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from configs.schema import RetrievalConfig, load_config, resolve, save_config
from data.annotations import SPLITS, Annotations, available_splits, load_annotations
from data.checks import Findings, check_data
from data.loaders import eval_image_loader, recipe_sampler, train_loader
from data.metrics import chance_metrics, recall_table, retrieval_metrics, within_noise
from data.recipe import check_disk, check_recipe, require_negatives
from data.retrieval import TrainBatch
from models.blip_retrieval import BLIP_Retrieval
from models.checkpoint import (
    RunState,
    find_runs,
    fit,
    load_pretrained,
    open_weights,
    resume,
    save_checkpoint,
    save_run,
)
from models.download import RELEASED, cache_folder
from models.dry_run import DrySizes, dry_run
from models.machine import auto_keep_graphs, compile_encoders
from models.meters import LossMeter, NotFinite, Watch
from models.rerank import own_blocks, rerank
from models.train_step import StepReport, train_step
from utils import (
    StopSignal,
    average_gradients,
    barrier,
    broadcast_model,
    build_optimizer,
    find_path,
    from_main,
    generator,
    get_rank,
    get_world_size,
    init_distributed,
    is_main,
    keep_log_until,
    name_images,
    precision,
    ramped_alpha,
    record,
    seed_from,
    set_lr,
    setup_logging,
)

log = logging.getLogger("blip")
BEST, LOG = "checkpoint_best.pth", "log.txt"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune or evaluate BLIP for image-text retrieval.")
    parser.add_argument("--config", required=True, help="YAML file; configs/schema.py documents every key")
    parser.add_argument("--output_dir", type=Path, help="run folder (default: output/<name of the config>)")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate val and test, touching no checkpoint")
    parser.add_argument("--check", action="store_true", help="look for mistakes in config, data, checkpoint and disk")
    parser.add_argument("--dry_run", action="store_true", help="measure memory, speed and hours on a few steps")
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
        job, found = preflight(cfg, args)
        found.errors = from_main(found.errors)
        if args.check:
            return print_report(found)
        if found.errors and not is_main():
            return 2  # rank 0 says why
        found.act()
        torch.manual_seed(args.seed)  # the same random weights on every process
        model = build_model(cfg).to(device)
        if args.dry_run:
            measure(model, job)
        elif args.evaluate:
            evaluate_only(model, job)
        else:
            return train(model, job)
    except (ValueError, OSError) as error:  # OSError: a disk that fills up, for instance
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def build_model(cfg: RetrievalConfig) -> BLIP_Retrieval:
    names = ("image_size", "vit", "vit_grad_ckpt", "vit_ckpt_layer", "embed_dim", "queue_size", "momentum",
             "negative_all_rank", "patch_size", "pos_embed_std")  # fmt: skip
    med_config = find_path(cfg.med_config)
    try:
        return BLIP_Retrieval(med_config=med_config, **{name: getattr(cfg, name) for name in names})
    except TypeError as error:
        raise ValueError(f"med_config {med_config}: a value is of the wrong type ({error}).") from None


# ---- before a run ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What is to be done, on which data; it does not change."""

    cfg: RetrievalConfig  # resolved
    args: argparse.Namespace
    splits: dict[str, Annotations]  # those the job needs

    @property
    def folder(self) -> Path:
        return self.args.output_dir

    @property
    def config(self) -> dict[str, Any]:
        """What decides the numbers of a run, in plain values; it goes into every checkpoint."""
        return asdict(self.cfg) | {"seed": self.args.seed}


def preflight(cfg: RetrievalConfig, args: argparse.Namespace) -> tuple[Job, Findings]:
    """Read the annotations; on rank 0 find what is wrong (with `--check` in all of it) before anything is written."""
    found, job = Findings(), Job(cfg, args, {})
    for split in [s for s in available_splits(cfg) if s != "train"] if args.evaluate else SPLITS:
        found.attempt(lambda split=split: job.splits.update({split: load_annotations(cfg, split)}))
    if not is_main():
        return job, found
    found.add(check_data(cfg, job.splits, args.check))
    found.attempt(lambda: found.add(check_model(job)))
    if not (args.evaluate or args.resume or args.dry_run) and (job.folder / LOG).exists():
        found.errors.append(
            f"--output_dir {job.folder} already holds a run: continue it with --resume auto, or name another folder."
        )
    if "train" in job.splits:
        found.add(check_recipe(cfg, job.splits["train"]))
        found.attempt(lambda: require_negatives(cfg, job.splits["train"], args.seed))
    return job, found


def check_model(job: Job) -> Findings:
    """The text encoder's JSON, the checkpoint, and room for saves; on a model without memory."""
    cfg, args = job.cfg, job.args
    with torch.device("meta"):
        model = build_model(cfg)
    source = (cfg.finetuned if args.evaluate else "") or cfg.pretrained
    found = check_checkpoint(model, source, job) if source and not args.resume else Findings()
    if not args.evaluate:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found.add(check_disk(job.folder, trained, cfg.keep_last))
    return found


def check_checkpoint(model: BLIP_Retrieval, source: str, job: Job) -> Findings:
    """Whether it fits the config, and whether it is one to train from."""
    cfg, args = job.cfg, job.args
    remote = "://" in source or (source in RELEASED and not Path(source).exists())
    if args.check and remote and not (cache_folder(cfg.cache_dir) / source.rpartition("/")[2]).exists():
        return Findings(facts=[f"{source}: not here yet, so not checked; the first run downloads it"])
    if args.check:
        with warnings.catch_warnings(action="ignore"):  # that there is no memory to load into
            kind = load_pretrained(model, source, cfg.cache_dir).kind
    else:
        kind = fit(open_weights(source, cfg.cache_dir), model.state_dict())[1].kind
    found = Findings(facts=[f"{source}: {kind}"])
    if not args.evaluate and ("already fine-tuned" in kind or "run of this program" in kind):
        found.warnings.append(
            f"pretrained {source} is a {kind}: fine-tuning it again starts a finished model at the full learning rate; "
            "set pretrained to a pre-trained checkpoint such as model_base.pth, or lower init_lr"
        )
    return found


def measure(model: BLIP_Retrieval, job: Job) -> None:
    """Print what the run would cost here, from a few steps on its first batch; writes nothing."""
    cfg, table, val = job.cfg, job.splits["train"], job.splits["val"]
    if cfg.pretrained:
        load_pretrained(model, cfg.pretrained, cfg.cache_dir)
    sampler = recipe_sampler(cfg, len(table.captions), job.args.seed, get_world_size(), get_rank())
    batch = next(iter(train_loader(cfg, table, sampler, model.temp.device)))
    sizes = DrySizes(len(table.captions), len(val.images), len(val.captions))
    for line in dry_run(model, cfg, sizes, batch, model.temp.device):
        if is_main():
            print(line)


def print_report(found: Findings) -> int:
    """The exit status of `--check`: 2 if there are errors."""
    if is_main():
        print(found.report())
        for error in found.errors:
            print(f"error: {error}", file=sys.stderr)
    return 2 if found.errors else 0


# ---- evaluation -----------------------------------------------------------------------------------------------------


def evaluate_only(model: BLIP_Retrieval, job: Job) -> None:
    source = job.cfg.finetuned or job.cfg.pretrained
    if source:
        load_pretrained(model, source, job.cfg.cache_dir)
    else:
        log.warning("neither finetuned nor pretrained is set: evaluating random weights")
    stats = {}
    for split in job.splits:
        stats |= evaluate(model, job, split)
        warn_near_chance(Watch(), job.splits[split], split, stats)
    record(job.folder / "evaluate.txt", stats)


def evaluate(model: BLIP_Retrieval, job: Job, split: str) -> dict[str, float]:
    """Recall of one split in percent, keys prefixed `val_` or `test_`; NotFinite when a score is no number.

    BLIP's nine keys are of the re-ranked lists; `itc_*` are the same nine from contrast alone, `chance_*` by luck.
    """
    cfg, annotations = job.cfg, job.splits[split]
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
        ranking = rerank(model, batches, num_images, annotations.captions, *sizes, *ids)
    try:
        itm, itc = (retrieval_metrics(x.i2t, x.i2t_value, x.t2i, x.t2i_value, *ids) for x in (ranking.itm, ranking.itc))
    except ValueError as error:
        raise NotFinite(f"{annotations.name}: {error}") from None
    chance = chance_metrics(*ids)
    rows = {"re-ranked (ITM)": itm, "contrast (ITC)": itc, "chance": chance}
    for line in recall_table(annotations.name, rows):
        log.info("%s", line)
    kinds = {"": itm, "itc_": itc, "chance_": chance}
    return {f"{split}_{kind}{k}": v for kind, metrics in kinds.items() for k, v in metrics.items()}


def warn_near_chance(watch: Watch, table: Annotations, split: str, stats: dict[str, float]) -> None:
    metrics = {key.removeprefix(f"{split}_"): value for key, value in stats.items()}
    if within_noise(metrics, len(table.images), len(table.captions)):
        watch.near_chance(table.name)


# ---- training -------------------------------------------------------------------------------------------------------


def train(model: BLIP_Retrieval, job: Job) -> int:
    """Epochs with validation, then the test split with the best weights. Returns the exit status."""
    cfg, folder, table = job.cfg, job.folder, job.splits["train"]
    sampler = recipe_sampler(cfg, len(table.captions), job.args.seed, get_world_size(), get_rank())
    loader = train_loader(cfg, table, sampler, model.temp.device)
    optimizer = build_optimizer(model, cfg)
    state = start_run(model, optimizer, job)
    broadcast_model(model)
    if state.epoch == state.step == 0:
        record(folder / LOG, {"epoch": -1, **evaluate(model, job, "val")})  # where training starts from
    if cfg.compile:
        compile_encoders(model)
    keep_graphs = count_kept_graphs(model, cfg, optimizer)
    stop, watch = StopSignal(), Watch(len(loader))
    for epoch in range(state.epoch, cfg.max_epoch):
        try:
            stats = train_one_epoch(model, loader, optimizer, job, state, keep_graphs, stop, watch)
            if stats is None:
                log.info("stopped by a signal after step %d of epoch %d: go on with --resume auto", state.step, epoch)
                return StopSignal.EXIT_STOPPED
            stats |= evaluate(model, job, "val")
        except NotFinite as error:
            images, saves = name_images(error.names, folder / "nonfinite_batch.txt"), find_runs(folder)
            last = saves[0] if saves else "the start of the run"
            raise ValueError(f"{error}{images} The last good state is {last}.") from None
        warn_near_chance(watch, job.splits["val"], "val", stats)
        if stats["val_r_mean"] > state.best or state.best_epoch < 0:
            state.best, state.best_epoch = stats["val_r_mean"], epoch
            save_checkpoint(folder / BEST, model, optimizer, job.config, epoch)
        record(folder / LOG, {"epoch": epoch, **stats, "best_epoch": state.best_epoch})
        state.epoch, state.step, state.meters = epoch + 1, 0, {}
        save_run(folder, model, optimizer, job.config, state, cfg.keep_last)
        barrier()
    load_pretrained(model, str(folder / BEST))
    record(folder / LOG, {"best_epoch": state.best_epoch, **evaluate(model, job, "test")})
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
    watch: Watch,
) -> dict[str, float] | None:
    """Train the steps of `state.epoch` that are left: the epoch's mean losses, or None when a signal stopped it."""
    cfg, epoch, steps = job.cfg, state.epoch, len(loader)
    loader.batch_sampler.set_epoch(epoch, state.step)
    meter = LossMeter(f"epoch {epoch}", steps, cfg.global_batch_size, model.temp.device, state, watch)
    model.train()
    for step, batch in enumerate(loader, state.step):
        lr = set_lr(optimizer, cfg, epoch, epoch * steps + step)
        optimizer.zero_grad()
        ranks = loader.batch_sampler.local_ranks
        report = compute_gradients(model, batch, cfg, job.args.seed, ranks, keep_graphs, epoch, step, steps)
        average_gradients(model)
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        meter.update(report, grad_norm, model.temp.detach(), lr, batch, stop.received)
        state.step = step + 1
        due = cfg.save_every_steps and state.step % cfg.save_every_steps == 0 and state.step < steps
        if due or meter.stop_requested:
            meter.save(state)
            save_run(job.folder, model, optimizer, job.config, state, cfg.keep_last)
        if meter.stop_requested:
            return None
    return {f"train_{k}": v for k, v in meter.means(cfg.on_bad_image == "skip").items()} | {"train_lr": lr}


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


if __name__ == "__main__":
    sys.exit(main())
