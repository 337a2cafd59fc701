"""Bundle of diagd."""
