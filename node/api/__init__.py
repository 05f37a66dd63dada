"""The documents that the control socket and p2pctl exchange."""
