"""The quality of Diagonal Decoding on trained worlds: the study behind docs/quality.md."""
