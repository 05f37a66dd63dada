"""One block: from a tier, its keepers, its home or the upstream registry."""
