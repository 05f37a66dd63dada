"""Metrics, and where bytes came from."""
