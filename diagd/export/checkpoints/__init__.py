"""Checkpoints of diagd."""
