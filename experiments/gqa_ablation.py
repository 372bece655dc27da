"""Multi-head, multi-query and grouped-query attention at nearly equal parameters (paper A.2.1, Table 18), at toy scale.

Claim: with the feed-forward widened by 1.33 and 1.3 to make up for the smaller attention, the three end at nearly the
same held-out loss, while the cache of keys and values shrinks by the number of heads that share one.
The paper's own run: 30B parameters, 150B tokens; its scores differ by a point or two without a clear winner.
Command: python -m experiments.gqa_ablation --source "text:books/*.txt" --out runs/gqa_ablation
Cost: three times tiny_end_to_end. Measured: see docs/experiments.md.
"""

from dataclasses import replace
from pathlib import Path

import tyro

from experiments.tiny_end_to_end import config as parent
from llama_jax.cli import end_of
from llama_jax.stages import pretrain
from llama_jax.training.metrics import read_metrics


def variant(n_kv_heads: int, ffn_scale: float) -> pretrain.PretrainConfig:
    """The parent's recipe with so many key/value heads, and its feed-forward widened, to a multiple of 32."""
    ffn_dim = round(parent.model.ffn_dim * ffn_scale / 32) * 32
    return replace(parent, model=replace(parent.model, n_kv_heads=n_kv_heads, ffn_dim=ffn_dim))


variants = {
    "MHA": variant(parent.model.n_heads, 1.0),
    "MQA": variant(1, 1.33),
    "GQA": variant(parent.model.n_heads // 3, 1.3),
}
config = variants["GQA"]


def main(source: str, out: str = "runs/gqa_ablation", train_tokens: int = parent.train_tokens) -> None:
    """Trains all three and prints their held-out loss beside parameters and cache.

    Args:
      source: what to train on, such as text:books/*.txt; every variant trains its tokenizer on it anew, to the same one.
      out: the folder of the three runs; an interrupted ablation goes on there.
      train_tokens: for each.
    """
    rows = []
    for name, recipe in variants.items():
        folder = f"{out}/{name}"
        data = replace(recipe.data, sources=(source,))
        pretrain.run(replace(recipe, data=data, out=folder, train_tokens=train_tokens, sample_prompts=()))
        score = [record for record in read_metrics(Path(folder)) if "eval/loss" in record][-1]
        m = recipe.model
        cache = 2 * 2 * m.n_layers * m.n_kv_heads * m.head_dim
        rows.append(
            f"| {name} | {m.n_params:,} | {cache:,} | {score['eval/loss']:.3f} | {score['eval/bits_per_byte']:.3f} |"
        )
    print("| attention | parameters | cache bytes per token, bf16 | held-out nats per token | bits per byte |")
    print("|---|---|---|---|---|\n" + "\n".join(rows))


if __name__ == "__main__":
    raise SystemExit(end_of(lambda: tyro.cli(main)))
