"""Fine-tune and evaluate BLIP for image-text retrieval.

    python train_retrieval.py --config configs/retrieval_flickr.yaml --output_dir output/retrieval_flickr [--evaluate]

With two or more GPUs, write `python -m torch.distributed.run --nproc_per_node=2` for `python`.

`--check` looks at everything that could go wrong later and writes nothing. A run folder gets `config.yaml`, `log.txt`
(one JSON row an evaluation), `steps.jsonl`, `console.log`, perhaps `nonfinite_batch.txt`, `checkpoint_best.pth` (best
validation r_mean, the published layout) and the last states for `--resume`. `--evaluate` writes `evaluate.txt`, two
`ranking_*.npz`, and `config.yaml` unless it is a run's.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from configs.schema import RetrievalConfig, load_config
from training.failures import CONSEQUENCE, explain, let_another_speak, tell_launcher


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune or evaluate BLIP for image-text retrieval.")
    parser.add_argument("--config", required=True, help="YAML file; configs/schema.py documents every key")
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="run folder (default: the one the config lies in, or output/<its name>)",
    )
    parser.add_argument("--evaluate", action="store_true", help="only evaluate val and test, touching no checkpoint")
    parser.add_argument(
        "--checkpoint", default="", metavar="PATH",
        help="what --evaluate loads (default: the run folder's best weights, else `finetuned`, else `pretrained`)",
    )  # fmt: skip
    parser.add_argument("--random_weights", action="store_true", help="--evaluate without a checkpoint, on purpose")
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
    # torch.distributed.launch names the GPU so; torch.distributed.run in LOCAL_RANK.
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    if (args.checkpoint or args.random_weights) and not args.evaluate:
        parser.error("--checkpoint and --random_weights go with --evaluate; training starts from the key `pretrained`")
    if args.checkpoint and args.random_weights:
        parser.error("give either --checkpoint or --random_weights")
    args.output_dir = args.output_dir or default_folder(Path(args.config))
    return args


def default_folder(config: Path) -> Path:
    """The run folder that a config was saved in, else one named after it."""
    in_run = any((config.parent / name).exists() for name in ("log.txt", "checkpoint_best.pth", "evaluate.txt"))
    return config.parent if in_run else Path("output") / config.stem


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 something the user can mend (one paragraph on stderr), 75 saved after a signal.

    130: aborted by Ctrl-C, before there was anything to save or for the second time.
    """
    args, cfg = parse_args(argv), None
    try:
        cfg = load_config(args.config, args.set, int(os.environ.get("WORLD_SIZE", 1)))
        return run(cfg, args)
    except KeyboardInterrupt:
        print("aborted: nothing more was saved", file=sys.stderr)
        return 130
    except Exception as error:
        paragraph = explain(error, cfg)
        if not paragraph:
            raise
    if cfg is None and os.environ.get("RANK", "0") != "0":
        let_another_speak()  # rank 0 has read the same file
        return 2
    print(f"error: {paragraph}", file=sys.stderr, flush=True)
    if paragraph.startswith(CONSEQUENCE):
        let_another_speak()
    else:
        tell_launcher(paragraph)
    return 2


def run(cfg: RetrievalConfig, args: argparse.Namespace) -> int:
    """What the arguments ask for; the exit status."""
    # Here, as they take seconds, which --help and a mistake in the YAML should not wait for.
    import torch

    from models.blip_retrieval import build_model
    from models.freezing import train_less
    from retrieval.evaluate import evaluate_only
    from training.dry_run import print_dry_run
    from training.loop import train
    from training.preflight import of_all_processes, preflight, weights_to_evaluate, with_precisions
    from utils import Stopped, StopSignal, init_distributed, is_main, leave_distributed, setup_logging

    device = init_distributed(args.device)
    setup_logging()
    cfg = with_precisions(cfg, device)
    job, found = preflight(cfg, args)
    cfg = job.cfg
    found.errors = of_all_processes(found.errors)
    if args.check and is_main():
        found.print()
    if found.errors and not is_main():
        let_another_speak()  # rank 0
        return 2
    if args.check:
        if found.errors:
            tell_launcher("\n".join(found.errors))
        leave_distributed()
        return 2 if found.errors else 0
    found.raise_or_log()
    torch.manual_seed(args.seed)  # the same random weights on every process
    model = build_model(cfg, job.plan.med, job.plan.tokenizer)
    if not args.evaluate:
        train_less(model, cfg)
    model = model.to(device)
    try:
        if args.dry_run:
            print_dry_run(model, job)
        elif args.evaluate:
            evaluate_only(model, cfg, job.splits, job.folder, weights_to_evaluate(cfg, args), args.seed)
        else:
            train(model, job)
    except Stopped as stopped:
        logging.getLogger("blip").info("%s", stopped)
        if is_main():
            tell_launcher(str(stopped))
        leave_distributed()
        return StopSignal.EXIT_STOPPED
    leave_distributed()
    return 0


if __name__ == "__main__":
    sys.exit(main())
