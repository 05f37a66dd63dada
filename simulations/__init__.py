"""The shipped code on an in-memory network in virtual time: docs/SIMULATIONS.md."""
