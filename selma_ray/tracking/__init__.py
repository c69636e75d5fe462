"""Experiment trackers: where figures and sample images of training go, behind one small interface."""
