"""What is known to be wrong with a run before anything is written: data, config, checkpoint and disk together."""

import argparse
import os
import platform
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from checkpoints.download import is_to_be_downloaded
from checkpoints.files import DamagedFile
from checkpoints.load import fit, load_pretrained, open_weights
from checkpoints.runs import BEST, find_runs, size_of_save
from checkpoints.weights import merge_lora
from configs.datasets import SPLITS
from configs.schema import AUTO, RetrievalConfig
from configs.sizes import MedConfig
from data.annotations import Annotations, available_splits, load_annotations
from data.checks import check_data
from data.findings import Findings
from data.windows import window_warnings
from models.blip_retrieval import BLIP_Retrieval, build_model
from models.freezing import train_less
from models.towers import Plan, plan_model, start_from_towers
from training.recipe import check_disk, check_recipe, require_negatives
from utils import choose_precision, from_main, gather_names, get_rank, is_main, unused_driver

LOG = "log.txt"  # of a run folder: one JSON line an epoch


@dataclass(frozen=True)
class Job:
    """What is to be done, on which data; it does not change."""

    cfg: RetrievalConfig
    args: argparse.Namespace
    splits: dict[str, Annotations]  # those the job needs
    plan: Plan

    def load(self, split: str) -> None:
        self.splits[split] = load_annotations(self.cfg, split, self.plan.tokenizer)

    @property
    def folder(self) -> Path:
        return self.args.output_dir

    @property
    def config(self) -> dict[str, Any]:
        """What decides the numbers of a run, in plain values; it goes into every checkpoint."""
        return asdict(self.cfg) | {"seed": self.args.seed}


def with_precisions(cfg: RetrievalConfig, device: torch.device) -> RetrievalConfig:
    """The config with the precisions that `auto` means on this device."""
    training, evaluation = (choose_precision(cfg.precision, device), choose_precision(cfg.eval_precision, device, True))
    return replace(cfg, precision=training, eval_precision=evaluation)


class NotHereYet(Exception):
    """What is left open cannot be told before a download."""


def preflight(cfg: RetrievalConfig, args: argparse.Namespace) -> tuple[Job, Findings]:
    """Read the annotations; on rank 0 find what is wrong (with `--check` in all of it) before anything is written."""
    found, plans = Findings(), list[Plan]()
    try:
        found.attempt(lambda: plans.append(plan_job(cfg, args)))
    except NotHereYet as reason:
        found.facts.append(str(reason))
    job = Job(cfg, args, {}, Plan(cfg, MedConfig()))
    if plans:
        job = Job(plans[0].cfg, args, {}, plans[0])
    cfg = job.cfg
    for split in [s for s in available_splits(cfg) if s != "train"] if args.evaluate else SPLITS:
        found.attempt(partial(job.load, split))
    if not is_main():
        return job, found
    found.add(check_data(cfg, job.splits, args.check))
    found.warnings += launcher_warnings()
    if args.device == "auto" and (words := unused_driver()):
        found.warnings.append(f"this runs on the CPU. {words}")
    if not args.evaluate and cfg.tensorboard and not find_spec("tensorboard"):
        found.errors.append(
            "tensorboard is true, but the package is not installed: pip install -r requirements-tensorboard.txt, or "
            "set tensorboard to false."
        )
    if plans:
        found.attempt(lambda: found.add(check_model(job)))
    if not (args.evaluate or args.resume or args.dry_run) and ((job.folder / LOG).exists() or find_runs(job.folder)):
        found.errors.append(
            f"--output_dir {job.folder} already holds a run: continue it with --resume auto, or name another folder."
        )
    if "train" in job.splits:
        found.attempt(lambda: found.warnings.extend(window_warnings(cfg, job.splits["train"], args.seed)))
        recipe = check_recipe(cfg, job.splits["train"])
        found.add(recipe)
        if not recipe.errors:
            found.attempt(lambda: require_negatives(cfg, job.splits["train"], args.seed))
    return job, found


def of_all_processes(errors: list[str]) -> list[str]:
    """Rank 0's errors, then what only others have found: a file that is not on their machine, say."""
    main = from_main([errors])[0]
    here = f"on {platform.node()}, rank {get_rank()}"
    return main + gather_names([f"{here}: {error}" for error in errors if error not in main])


def plan_job(cfg: RetrievalConfig, args: argparse.Namespace) -> Plan:
    """What the config leaves open, filled in from the checkpoint that will be loaded, if there is one.

    NotHereYet where it is left to a checkpoint that `--check` does not download.
    """
    source = cfg.pretrained
    if args.evaluate:
        source = weights_to_evaluate(cfg, args)[0]
    elif args.resume:
        saves = find_runs(args.output_dir) if args.resume == "auto" else [Path(args.resume)]
        if saves and saves[0].is_dir():
            raise ValueError(f"--resume {saves[0]}: is a folder. Name a save in it, or --output_dir and --resume auto.")
        if not saves and (args.output_dir / BEST).exists():
            raise ValueError(
                f"--resume {args.resume}: {args.output_dir} holds {BEST}, but no save to go on from. Start from it in "
                "a new --output_dir, as `pretrained`, or remove it."
            )
        for save in saves:
            with suppress(DamagedFile):  # `resume` says so, and goes on with the save before it
                return plan_model(cfg, str(save))
    if args.check and is_to_be_downloaded(source, cfg.cache_dir):
        if AUTO in (cfg.vit, cfg.med_config):
            raise NotHereYet(f"{source}: not here yet, so neither its sizes nor whether they fit were checked")
        source = ""
    return plan_model(cfg, source)


def launcher_warnings() -> list[str]:
    """Several launchers that are to restart processes, but share the store that a new launcher cannot join."""
    several = int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1 and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if not several or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return []
    return [
        "a machine that dies could not come back into this run: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for the "
        "launcher on every machine (docs/training.md)"
    ]


def weights_to_evaluate(cfg: RetrievalConfig, args: argparse.Namespace) -> tuple[str, str]:
    """What `--evaluate` loads ('' = random weights, asked for), and why; ValueError if nothing names a checkpoint."""
    if args.random_weights:
        return "", "--random_weights asks for it"
    best = args.output_dir / BEST
    choices = (
        (args.checkpoint, "--checkpoint names it"),
        (str(best) if best.exists() else "", "the best weights of this run folder"),
        (cfg.finetuned, "the config's `finetuned`"),
        (cfg.pretrained, "the config's `pretrained`, as there is no `finetuned`"),
    )
    for source, why in choices:
        if source:
            return source, why
    saves = find_runs(args.output_dir)
    if saves:
        raise ValueError(
            f"{args.output_dir}: no epoch of this run has been validated yet, so it has no {BEST}. "
            f"--checkpoint {saves[0]} evaluates its last save."
        )
    raise ValueError(
        f"nothing to evaluate: {best} does not exist, and the config names neither `finetuned` nor `pretrained`. Give "
        "--checkpoint PATH, name the run's folder as --output_dir, or say --random_weights."
    )


def check_model(job: Job) -> Findings:
    """The text encoder's JSON, the checkpoint, and room for saves; on a model without memory."""
    cfg, args = job.cfg, job.args
    with torch.device("meta"):
        model = build_model(cfg, job.plan.med, job.plan.tokenizer)
        if not args.evaluate:
            train_less(model, cfg)
    source = weights_to_evaluate(cfg, args)[0] if args.evaluate else cfg.pretrained
    found = check_checkpoint(model, source, job) if source and not args.resume else Findings()
    if not (args.evaluate or args.resume) and (job.plan.image or job.plan.text):
        with warnings.catch_warnings(action="ignore"):  # that there is no memory to load into
            found.facts.append(str(start_from_towers(model, job.plan)))
    if not args.evaluate:
        found.add(check_disk(job.folder, size_of_save(model), cfg.keep_last))
    return found


def check_checkpoint(model: BLIP_Retrieval, source: str, job: Job) -> Findings:
    """Whether it fits the config, and whether it is one to train from."""
    cfg, args = job.cfg, job.args
    if args.check and is_to_be_downloaded(source, cfg.cache_dir):
        return Findings(facts=[f"{source}: not here yet, so not checked; the first run downloads it"])
    if args.check:
        with warnings.catch_warnings(action="ignore"):  # that there is no memory to load into
            kind = load_pretrained(model, source, cfg.cache_dir).kind
    else:
        kind = fit(open_weights(source, cfg.cache_dir), merge_lora(model.state_dict()), model.vit)[1].kind
    found = Findings(facts=[f"{source}: {kind}"])
    if not args.evaluate and ("already fine-tuned" in kind or "run of this program" in kind):
        found.warnings.append(
            f"pretrained {source} is a {kind}: fine-tuning it again starts a finished model at the full learning rate; "
            "set pretrained to a pre-trained checkpoint such as model_base.pth, or lower init_lr"
        )
    return found
