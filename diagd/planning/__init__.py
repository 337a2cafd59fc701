"""What a model costs on a device, worked out before anything is loaded."""
