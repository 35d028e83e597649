"""What the studies share: flags, data, networks, training, results, checkpoints."""
