"""Real-time frames from autoregressive video world models by diagonal decoding."""
