"""A run: its recipe, its folder, and its stages in order, a module each."""
