"""TensorRT 10, 11 and TensorRT-RTX: what is installed can be told apart by what it offers, not by version."""
