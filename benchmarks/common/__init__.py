"""What the studies share: flags, data, networks, training, results, examples/gpt2."""
