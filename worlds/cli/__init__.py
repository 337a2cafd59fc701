"""Verbs that ``diagd`` finds by entry point."""
