"""The control socket: routes, doctor, reload."""
