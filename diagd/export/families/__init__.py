"""Families of diagd."""
