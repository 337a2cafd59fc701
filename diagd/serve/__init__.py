"""A bundle behind a port, for the clients of a release."""
