"""Export of diagd."""
