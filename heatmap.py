"""Draw where matching looks for each word of a caption.

    python heatmap.py CHECKPOINT IMAGE "a dog in the snow" [--layer 7] [-o heatmap.png|heatmap.npz]

CHECKPOINT is whatever `models.load` opens: a file, a run folder, a released name.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 something the user can mend (one paragraph on stderr)."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="heatmap.py", description=__doc__, formatter_class=form)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("image", metavar="IMAGE", type=Path)
    parser.add_argument("caption", metavar="CAPTION")
    parser.add_argument("--layer", type=int, help="of the text encoder, from 0 (default: 7 of 12); not the last")
    parser.add_argument("-o", "--out", type=Path, default=Path("heatmap.png"), help=".png, or .npz for the numbers")
    parser.add_argument("--config", default="", metavar="YAML", help="for files that do not tell their sizes")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    try:
        print(draw(args))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def draw(args: argparse.Namespace) -> Path:
    """Write what the arguments ask for."""
    if args.out.suffix.lower() not in (".png", ".npz"):
        raise ValueError(f"{args.out}: write to a file whose name ends in .png or .npz")
    # Here, as they take seconds, which --help should not wait for.
    import numpy as np

    from models import load
    from reports.heatmaps import draw_heatmap, seen_by_model

    blip = load(args.checkpoint, args.device, config=args.config)
    found = blip.heatmap(args.image, args.caption, args.layer)
    tokenizer = blip.model.tokenizer
    if rest := tokenizer.clean(args.caption, sys.maxsize).split(" ")[tokenizer.max_words :]:
        print(f"the model reads {tokenizer.max_words} words at most; not drawn: {' '.join(rest)}", file=sys.stderr)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.out.suffix.lower() == ".png":
        draw_heatmap(seen_by_model(blip.picture(args.image), blip.model.image_size), found).save(args.out)
    else:
        values = found._asdict() | {"maps": found.maps.numpy(), "sentence": found.sentence.numpy()}
        np.savez_compressed(args.out, **values)
    return args.out


if __name__ == "__main__":
    sys.exit(main())
