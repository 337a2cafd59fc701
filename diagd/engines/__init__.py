"""What runs a step: backends, their memory and the sampler behind them."""
