"""Trains any model on any loss: batches, the compiled step, checkpoints."""
