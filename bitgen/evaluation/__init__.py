"""Metrics of samples, reconstructions and representations."""
