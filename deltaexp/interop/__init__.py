"""Other libraries' methods and checkpoints."""
