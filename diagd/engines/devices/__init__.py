"""Step graphs on a device: fixed addresses, no wait for the host inside a frame, one CUDA graph a width."""
