"""Writes golden/*.npz: logits and gradient norms that Hugging Face's LlamaForCausalLM gives, for machines without PyTorch.

  python -m tests.parity.make_golden

Weights and tokens come from seeds of NumPy's generator, so a file holds what was computed and the case that it was computed for, nothing else.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from llama_jax.config import LlamaConfig, RopeScaling
from tests.parity.numpy_llama import random_weights, to_hf

GOLDEN = Path(__file__).parent / "golden"
LENGTH = 48
ROWS = 2
SEED = 7
BASE = LlamaConfig(dim=64, n_layers=2, n_heads=8, n_kv_heads=2, ffn_dim=96, vocab_size=97, head_dim=16)
CASES = {
    "heads_8_2": BASE,
    "heads_8_8": replace(BASE, n_kv_heads=8),
    "heads_8_1": replace(BASE, n_kv_heads=1),
    "scaled_rope_tied": replace(
        BASE, rope_theta=5e5, rope_scaling=RopeScaling(factor=8.0, original_context=32), tie_embeddings=True
    ),
    "code_llama_theta": replace(BASE, rope_theta=1e6),
}


def inputs(config: LlamaConfig, length: int = LENGTH) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Weights in Meta's layout, and token ids (ROWS, length + 1)."""
    tokens = np.random.default_rng(SEED).integers(0, config.vocab_size, (ROWS, length + 1))
    # A tied embedding is the head too: at sigma 1 it would make every softmax a certainty.
    return random_weights(config, SEED, embedding_scale=config.dim**-0.5 if config.tie_embeddings else 1.0), tokens


def hf_config(config: LlamaConfig):
    """The configuration as Hugging Face's."""
    import transformers

    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (s := config.rope_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_context,
        }
    return transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.context_length,
        rms_norm_eps=config.norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=config.tie_embeddings,
        attn_implementation="eager",
    )


def hf_run(
    config: LlamaConfig, weights: dict[str, np.ndarray], tokens: np.ndarray
) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
    """What Hugging Face's model gives in float32 on CPU.

    Args:
      config: the shape.
      weights: in Meta's names and layout.
      tokens: ids (B, T + 1), the targets being one later than the inputs.

    Returns:
      logits (B, T, V), mean cross-entropy in nats, and its gradient for every parameter under Hugging Face's names.
    """
    import torch
    import transformers

    model = transformers.LlamaForCausalLM(hf_config(config)).float()
    state = {name: torch.tensor(w, dtype=torch.float32) for name, w in to_hf(weights, config).items()}
    if config.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    tokens = torch.tensor(tokens)
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    gradients = {name: p.grad.numpy().astype(np.float64) for name, p in model.named_parameters()}
    return logits.detach().numpy().astype(np.float64), float(loss.detach()), gradients


def main() -> None:
    """Writes one file per case."""
    import torch
    import transformers

    GOLDEN.mkdir(exist_ok=True)
    for name, config in CASES.items():
        logits, loss, gradients = hf_run(config, *inputs(config))
        about = {"case": asdict(config), "torch": torch.__version__, "transformers": transformers.__version__}
        norms = {f"norm.{name}": np.sqrt(np.sum(g * g)) for name, g in gradients.items()}
        np.savez_compressed(
            GOLDEN / f"{name}.npz", logits=logits.astype(np.float32), loss=loss, about=json.dumps(about), **norms
        )
        print(f"{name}: loss {loss:.6f}, {(GOLDEN / f'{name}.npz').stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
