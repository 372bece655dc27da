"""A checkpoint in a Hugging Face folder with random weights of real strength, and a tokenizer that knows given texts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.conversion.huggingface import HuggingFaceSink
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training.checkpoint import flat
from tests.parity.numpy_llama import random_weights, to_ours


def write_tiny_checkpoint(folder: Path, texts: Sequence[str], *, vocab_size: int = 800, context: int = 512) -> Path:
    """Writes it, and gives the folder."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer.train(texts, folder.parent / f"{folder.name}.model", vocab_size=vocab_size)
    config = LlamaConfig(
        dim=64,
        n_layers=1,
        n_heads=4,
        n_kv_heads=2,
        ffn_dim=96,
        head_dim=16,
        vocab_size=tokenizer.vocab_size,
        context_length=context,
    )
    model = flat(to_ours(random_weights(config, seed=0), config))
    dtypes = dict.fromkeys(model, np.dtype(np.float32))
    with HuggingFaceSink(folder, config, dtypes, {"tokenizer.model": tokenizer.model_bytes}) as sink:
        for name, layer in sink.order:
            whole = np.asarray(model[name])
            sink.write(name, layer, whole if layer is None else whole[layer])
    return folder
