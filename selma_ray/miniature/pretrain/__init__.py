"""Training of the miniature's models: `python -m selma_ray.miniature.pretrain --help`."""
