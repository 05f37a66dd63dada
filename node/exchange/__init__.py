"""Requests between members."""
