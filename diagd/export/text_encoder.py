"""Text to the embeddings that video2world models attend to, by a T5 encoder on this machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from diagd.errors import UsageError, require


def encode_text(words: str, encoder: Path, length: int) -> NDArray[np.float32]:
    """Last hidden states of a T5 encoder, as Cosmos takes them from google-t5/t5-11b.

    ``encoder`` is a folder in the layout of Hugging Face, with the tokenizer.

    Returns:
        float32 [n, width], one row a token, the end token included, at most ``length``.

    Raises:
        UsageError: the folder holds no T5 encoder.
        DependencyError: transformers is not installed.
    """
    transformers = require("transformers", extra="text", purpose="encode text with T5")
    if not (encoder / "config.json").is_file():
        raise UsageError(f"{encoder} holds no T5 encoder: expected a folder with config.json and a tokenizer")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(encoder, local_files_only=True)
        model = transformers.T5EncoderModel.from_pretrained(encoder, local_files_only=True, dtype="auto")
    except (OSError, ValueError) as error:
        raise UsageError(f"{encoder} holds no T5 encoder: {error}") from error
    tokens = tokenizer(words, truncation=True, max_length=length, return_tensors="pt")
    with torch.inference_mode():
        states = model.eval()(tokens["input_ids"]).last_hidden_state[0]
    embeddings: NDArray[np.float32] = states.float().numpy()
    return embeddings
