"""The decisions of Shoal: values, codes, plans and state machines. No clock, no socket, no `async`."""
