"""Fine-tuning a model to the orders it is decoded in, and to the better of its own rollouts."""
