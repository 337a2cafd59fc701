"""A small T5 in the layout of Hugging Face, written by the test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diagd.errors import UsageError
from diagd.export.families.cosmos import encode_text

LENGTH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("t5")
    words = {word: n for n, word in enumerate(["<pad>", "</s>", "<unk>", "a", "robot", "walks", "away"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(words), d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4
    )
    transformers.T5EncoderModel(config).save_pretrained(folder)
    return folder


def test_rows_are_those_of_the_padded_and_masked_text(folder: Path) -> None:
    """The released pipeline pads to the full length, masks the padding and keeps the rows of the text."""
    import transformers

    ids = torch.tensor([[3, 4, 5, 1] + [0] * (LENGTH - 4)])
    model: torch.nn.Module = transformers.T5EncoderModel.from_pretrained(folder)
    with torch.no_grad():
        states = model.eval()(ids, attention_mask=(ids != 0).long()).last_hidden_state[0, :4]
    embeddings = encode_text("a robot walks", folder, LENGTH)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, states.numpy(), atol=1e-5)


def test_long_texts_are_cut_off(folder: Path) -> None:
    assert encode_text("a robot walks away " * 5, folder, LENGTH).shape == (LENGTH, 16)


def test_other_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no T5 encoder"):
        encode_text("a", tmp_path, LENGTH)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds no T5 encoder"):
        encode_text("a", tmp_path, LENGTH)
