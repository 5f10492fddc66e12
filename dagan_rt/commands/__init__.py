"""One module a command: `add_parser` declares the options, `run` does the work and imports what it needs."""
