"""The operating system: systemd, logs, files, SQLite, the allocator."""
