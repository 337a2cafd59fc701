"""Small worlds beside diagd: recording, training, and evaluation by what their rules say."""
