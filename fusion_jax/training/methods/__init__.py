"""Ways of training: layer-wise, by static pruning, as chains, in rounds."""
