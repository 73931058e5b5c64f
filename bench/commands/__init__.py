"""One file a command: its options, one call, and what it prints."""
