"""Networks that turn pixels into tokens and back, as the releases have them."""
