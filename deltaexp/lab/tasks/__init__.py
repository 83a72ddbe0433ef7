"""Tasks: the data of a run, tokenised, and how its answers are measured."""
