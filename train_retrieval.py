"""Fine-tune and evaluate BLIP for image-text retrieval.

    python -m torch.distributed.run --nproc_per_node=1 train_retrieval.py \\
        --config configs/retrieval_flickr.yaml --output_dir output/retrieval_flickr [--evaluate]

It also runs without the launcher, as one process. `--check` looks at everything that could go wrong later and writes
nothing. A run folder gets `config.yaml`, `log.txt` (one JSON line an epoch), `steps.jsonl`, `console.log`, perhaps
`nonfinite_batch.txt`, `checkpoint_best.pth` (best validation r_mean, the published layout) and the last states for
`--resume`; `--evaluate` writes `evaluate.txt` only.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from configs.schema import RetrievalConfig, load_config


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
    """Exit status: 0 done, 2 something the user can mend (one paragraph on stderr), 75 saved after a signal.

    130: aborted by Ctrl-C, before there was anything to save or for the second time.
    """
    args = parse_args(argv)
    try:
        cfg = load_config(args.config, args.set, int(os.environ.get("WORLD_SIZE", 1)))
        return run(cfg, args)
    except (ValueError, OSError) as error:  # OSError: a disk that fills up, for instance
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("aborted: nothing more was saved", file=sys.stderr)
        return 130


def run(cfg: RetrievalConfig, args: argparse.Namespace) -> int:
    """What the arguments ask for; the exit status."""
    # Here, as they take seconds, which --help and a mistake in the YAML should not wait for.
    import torch

    from models.blip_retrieval import build_model
    from retrieval.evaluate import evaluate_only
    from training.dry_run import print_dry_run
    from training.loop import train
    from training.preflight import preflight
    from utils import from_main, init_distributed, is_main, setup_logging

    device = init_distributed(args.device)
    setup_logging()
    job, found = preflight(cfg, args)
    found.errors = from_main(found.errors)
    if args.check:
        if is_main():
            found.print()
        return 2 if found.errors else 0
    if found.errors and not is_main():
        return 2  # rank 0 says why
    found.raise_or_log()
    torch.manual_seed(args.seed)  # the same random weights on every process
    model = build_model(cfg).to(device)
    if args.dry_run:
        print_dry_run(model, job)
        return 0
    if args.evaluate:
        return evaluate_only(model, cfg, job.splits, job.folder, args.seed)
    return train(model, job)


if __name__ == "__main__":
    sys.exit(main())
