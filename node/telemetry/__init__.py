"""Metrics, and the provenance of bytes."""
