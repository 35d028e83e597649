"""Training: from a loss to an estimate, from an estimate to a step, and its state."""
