"""The product that a machine's arithmetic is measured by."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime

from diagd.planning.ceilings import matrix_product_model


def test_matrix_product_model_multiplies() -> None:
    content = matrix_product_model(3, 5, 2)
    onnx.checker.check_model(onnx.load_from_string(content))
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    a, b = random.normal(size=(3, 5)).astype(np.float32), random.normal(size=(5, 2)).astype(np.float32)
    np.testing.assert_allclose(session.run(None, {"A": a, "B": b})[0], a @ b, rtol=1e-5)
