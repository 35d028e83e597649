"""Distributions over the weights: alone, mixed, and their natural parameters."""
