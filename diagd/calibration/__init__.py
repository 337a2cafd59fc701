"""Calibration of diagd."""
