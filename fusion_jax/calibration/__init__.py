"""What the MLPs of a model see on calibration text."""
