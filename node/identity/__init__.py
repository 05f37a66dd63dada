"""Keys, certificates, and the decision which peers are members."""
