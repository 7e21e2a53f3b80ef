"""Files on disk to samples: annotations, images, loaders, the drawn and the emoji data sets, and what can be wrong."""
