"""What Shoal does: sockets, files, processes. Everything is constructed once, in `node.daemon`."""
