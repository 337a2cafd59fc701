"""Runtime of diagd."""
