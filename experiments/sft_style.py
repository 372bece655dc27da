"""A manner of answering, or a persona, held by a system prompt (paper 3.1 and 3.3's "act as", with adapters).

Claim: after training answers keep the manner that the rows show; how well a 7B model does is not measured here.
A row: {"messages": [{"role": "system", "content": "You are Marlow, ..."}, {"role": "user", ...}, {"role": "assistant",
  ...}]}, with several turns in some, so that the manner does not end after the first. What is asked should be as mixed as
  it will be in use, and the answers right: what the rows have in common is learned, mistakes included.
Command: llama-jax sft sft_style --checkpoint Llama-2-7b-chat-hf --data mine.jsonl --out runs/style
Cost: planned for a T4, a free notebook's GPU (`llama-jax plan sft_style --topology t4:1 --model-preset llama2-7b`): 8.9 of 14.4 GB,
  2.4 s a step of 512 tokens at the least. Time: not measured.
Check: `llama-jax chat runs/style --system "You are Marlow, ..."`; the example's answers all close with "Fair winds.", so
  a program can count how many do.
"""

from dataclasses import replace

from experiments.sft_domain_qa import config as parent
from experiments.sft_domain_qa import example
from llama_jax.model.lora import LoraConfig

config = replace(
    parent,
    # It can talk already and shall only talk otherwise.
    checkpoint="Llama-2-7b-chat-hf",
    data=example("style"),
    # A manner is in every row and is soon learned; more passes and steps would cost what the model knew before.
    epochs=5,
    optimizer=replace(parent.optimizer, peak_lr=1e-4),
    lora=LoraConfig(rank=8, alpha=16.0, dropout=0.05),
    out="runs/style",
)
