"""The machine below: systemd, logs, files, SQLite, the allocator."""
