"""World of diagd."""
