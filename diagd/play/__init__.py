"""A player in front of a stream: browser, terminal, recording."""
