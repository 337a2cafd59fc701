"""Cli of diagd."""
