"""Sweeps: many runs from one command, each in a folder that its own config names, so that all of it can be continued."""
