"""Evaluation: accuracy under attack, of a model or of the runs in their folders."""
