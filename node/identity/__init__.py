"""Keys, certificates, and the decision who is admitted."""
