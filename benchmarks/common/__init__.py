"""What the examples share: checked flags, data files and checkpoints."""
