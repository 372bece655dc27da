"""Llama 2 13B on 2.0T tokens (paper 2.2, Tables 1 and 2, Figure 5).

Claim: final training loss about 1.67 nats per token (read off Figure 5). As 7B but for the size.
Command: llama-jax pretrain experiments/pretrain_13b.py --tokenizer tokenizer.model --out runs/13b
Cost: 368,640 A100 hours in the paper. Measured here: not yet; --dry-run prints the memory per device.
"""

from dataclasses import replace

from experiments.pretrain_7b import config as parent
from llama_jax.config import LLAMA2_13B

config = replace(parent, model=LLAMA2_13B, out="runs/13b")
