"""The registry API that clients see."""
