"""The OCI formats as values: no I/O, no async."""
