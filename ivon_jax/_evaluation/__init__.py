"""Functions under a posterior: means over its samples, and the linearised model."""
