"""Fewer bytes for a bundle: quantised step graphs, let in by a quality gate."""
