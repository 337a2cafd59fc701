"""Tests of the video tokenizers."""
