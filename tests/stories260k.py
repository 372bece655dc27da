"""The published 260K-parameter TinyStories model as ours, read from a Hugging Face folder without safetensors."""

import json
from pathlib import Path

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.model.transformer import Transformer
from tests.parity.numpy_llama import hf_to_ours

FOLDER = "stories260K_hf_fp16"


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every array of a safetensors file: eight bytes of header length, a JSON header, then the bytes it points into."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    types = {"F16": np.float16, "F32": np.float32}

    def array(dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
        first, end = (start + offset for offset in data_offsets)
        return np.frombuffer(content[first:end], types[dtype]).reshape(shape)

    return {name: array(**entry) for name, entry in header.items()}


def load_stories260k(shared: Path) -> Transformer:
    """The model in float32 (its file holds float16).

    Args:
      shared: the folder of shared data (the fixture of that name).
    """
    fields = json.loads((shared / FOLDER / "config.json").read_text())
    config = LlamaConfig(
        dim=fields["hidden_size"],
        n_layers=fields["num_hidden_layers"],
        n_heads=fields["num_attention_heads"],
        n_kv_heads=fields["num_key_value_heads"],
        ffn_dim=fields["intermediate_size"],
        vocab_size=fields["vocab_size"],
        context_length=fields["max_position_embeddings"],
        head_dim=fields["head_dim"],
        norm_eps=fields["rms_norm_eps"],
        rope_theta=fields["rope_parameters"]["rope_theta"],
    )
    return hf_to_ours(read_safetensors(shared / FOLDER / "model.safetensors"), config)
