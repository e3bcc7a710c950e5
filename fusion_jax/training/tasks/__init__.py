"""Tasks: data, metrics and losses of classification, pairs of texts, and plain text."""
