"""From checkpoint to bundle: families of models, their weights, and ONNX graphs of a step."""
