"""Files on disk to samples: annotations, images, training and evaluation loaders, and the recall metrics."""
