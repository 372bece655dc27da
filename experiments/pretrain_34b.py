"""Llama 2 34B on 2.0T tokens (paper 2.2, Tables 1 and 2, Figure 5).

Claim: final training loss about 1.57 nats per token (read off Figure 5). As 7B but for the size, grouped-query
  attention and half the learning rate.
Command: llama-jax pretrain experiments/pretrain_34b.py --tokenizer tokenizer.model --out runs/34b
Cost: 1,038,336 A100 hours in the paper. Measured here: not yet; --dry-run prints the memory per device.
"""

from dataclasses import replace

from experiments.pretrain_7b import config as parent
from llama_jax.config import LLAMA2_34B

config = replace(parent, model=LLAMA2_34B, optimizer=replace(parent.optimizer, peak_lr=1.5e-4), out="runs/34b")
