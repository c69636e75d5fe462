"""SELMA (arXiv 2403.06952) as a distributed Ray system: skills, prompts, images, experts, merging, evaluation, serving."""

__version__ = "0.1.0"
__all__ = ["__version__"]
