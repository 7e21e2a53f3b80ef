"""Paired timings of this repository against the published algorithms; run each as `python -m benchmarks.<name>`."""

import argparse

import torch

from utils import setup_logging


def set_up(args: argparse.Namespace) -> torch.device:
    """Logging, threads and seed of a benchmark with `--device` and `--threads`; its device."""
    setup_logging()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.manual_seed(0)
    return torch.device(args.device)
