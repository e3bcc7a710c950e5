"""Takes over the MLPs of modules of other classes, and gives them back."""
