"""Fine-tuning a model to the decoding orders it will be run with."""
