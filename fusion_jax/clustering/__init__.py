"""k-means for few points per cluster in high dimension."""
