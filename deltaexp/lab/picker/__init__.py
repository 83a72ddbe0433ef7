"""Choosing modules by eye: a local page with the module tree of a backbone, and the server behind it."""
