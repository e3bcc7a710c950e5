"""Calibration: the inputs of a model's MLPs on text."""
