"""Proofs against members that signed false records."""
