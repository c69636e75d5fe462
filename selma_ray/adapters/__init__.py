"""LoRA adapters: files in and out, the names of their modules, deltas, and mixtures on one base. Imports no Ray."""
