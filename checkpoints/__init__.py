"""Files of weights: formats, download, saves of a run, conversion. `python -m checkpoints` is its command line."""
