"""A Llama 2 with grouped-query attention, small enough for a laptop, by the same code as the 70B (paper 2.2).

Claim: in five minutes on two CPU cores it predicts held-out text better than gzip -9 and xz -9 compress it.
Command: llama-jax demo, or llama-jax pretrain experiments/tiny_end_to_end.py --data.sources "text:books/*.txt"
"""

from llama_jax.config import Compute, LlamaConfig
from llama_jax.data.pipeline import DataConfig
from llama_jax.stages.pretrain import PretrainConfig
from llama_jax.training.loop import LoopConfig
from llama_jax.training.optimizer import OptimizerConfig

config = PretrainConfig(
    model=LlamaConfig(
        dim=192,
        n_layers=6,
        n_heads=6,
        n_kv_heads=2,
        head_dim=32,
        ffn_dim=512,
        vocab_size=4096,
        context_length=256,
    ),
    data=DataConfig(held_out=0.02, eval_documents=50),
    train_tokens=1_400_000,
    batch_tokens=4 * 256,
    optimizer=OptimizerConfig(peak_lr=2e-3, warmup_steps=60),
    compute=Compute(dtype="float32", remat="none", loss_chunk=64),
    loop=LoopConfig(log_every=20, eval_every=400, save_every=400),
    out="runs/tiny",
)
