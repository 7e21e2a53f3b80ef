"""Training: the step in micro-batches, its schedule, and what is checked and measured before and during a run."""
