"""MLPs, their compressed forms, and how to find and replace them in a model."""
