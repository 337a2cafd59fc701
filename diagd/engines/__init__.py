"""Engines of diagd."""
