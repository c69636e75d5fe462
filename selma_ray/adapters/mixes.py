"""What a mix of experts is, for those that ask for one and never compute it. Loads no torch."""

__all__ = ["Mix"]

Mix = tuple[tuple[str, float], ...]
"""Experts on the base model by name, each with the weight of its delta; empty for the base model itself."""
