"""Schedule of diagd."""
