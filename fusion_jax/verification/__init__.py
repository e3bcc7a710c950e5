"""What compressing did to a model."""
