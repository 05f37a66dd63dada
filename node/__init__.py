"""The I/O of Shoal: sockets, files, processes. node/assembly.py constructs everything, once."""
