"""p2pctl, the control program."""
