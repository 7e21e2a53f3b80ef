"""The model: encoders, losses, training step, checkpoints and re-ranking. Tensors in, tensors out."""
