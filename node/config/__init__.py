"""The configuration, parsed once into typed values."""
