"""What Shoal decides: values, codes, plans and state machines. No clock, no socket, no `async`."""
