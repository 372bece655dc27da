"""Llama 2 7B on 2.0T tokens (paper 2.2, Tables 1 and 2, Figure 5).

Claim: final training loss about 1.75 nats per token (read off Figure 5); held-out scores as Table 3.
Data: the paper does not disclose its mix; this is Llama 1's (its Table 1), on token shards that you prepare for each
of the seven sources, for example: llama-jax tokenize tfds:c4/en --tokenizer tokenizer.model --out corpus/c4
Command: llama-jax pretrain experiments/pretrain_7b.py --tokenizer tokenizer.model --out runs/7b
Cost: 184,320 A100 hours in the paper. Measured here: not yet; --dry-run prints the memory per device.
"""

from llama_jax.config import LLAMA2_7B
from llama_jax.data.pipeline import DataConfig
from llama_jax.stages.pretrain import PretrainConfig
from llama_jax.training.loop import LoopConfig
from llama_jax.training.optimizer import OptimizerConfig

# Share of the sampled tokens in percent (Llama 1, Table 1).
LLAMA1_MIX = {
    "tokens:corpus/ccnet": 67.0,
    "tokens:corpus/c4": 15.0,
    "tokens:corpus/github": 4.5,
    "tokens:corpus/wikipedia": 4.5,
    "tokens:corpus/books": 4.5,
    "tokens:corpus/arxiv": 2.5,
    "tokens:corpus/stackexchange": 2.0,
}

config = PretrainConfig(
    model=LLAMA2_7B,
    data=DataConfig(sources=tuple(LLAMA1_MIX), weights=tuple(LLAMA1_MIX.values()), held_out=1e-4),
    train_tokens=2_000_000_000_000,
    batch_tokens=4 * 2**20,
    optimizer=OptimizerConfig(
        peak_lr=3e-4,
        warmup_steps=2000,
        final_lr_ratio=0.1,
        b1=0.9,
        b2=0.95,
        eps=1e-5,
        weight_decay=0.1,
        clip_norm=1.0,
    ),
    loop=LoopConfig(save_every=1000, keep_last=3, keep_every=25_000),
    out="runs/7b",
)
