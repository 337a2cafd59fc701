"""Tokenizers of diagd."""
