"""Functions written, repaired and explained in one's own conventions (paper 3.1, with adapters).

Claim: the loss on held-out answers falls; the share of a 7B model's answers that run is not measured here.
A row: {"conversations": [{"from": "human", "value": "Write a Python function ..."}, {"from": "gpt", "value":
  "```python ..."}]}, some with a second turn that asks for a change. Every answer holds its own test as a doctest; run
  them before training on them (the project's tests do so with the example), as a model copies bugs too.
Command: llama-jax sft sft_code --checkpoint Llama-2-7b-hf --data mine.jsonl --out runs/code
Cost: planned for a T4, a free notebook's GPU (`llama-jax plan sft_code --topology t4:1 --model-preset llama2-7b`): 10.1 of 14.4 GB,
  10 s a step of 2,048 tokens at the least. Time: not measured.
Check: generate at --temperature 0.1 (the paper's for one try), save the answers' code and run `python -m doctest` on it:
  the share that passes is the score. It is a program that a model wrote: run it in a sandbox.
"""

from dataclasses import replace

from experiments.sft_domain_qa import config as parent
from experiments.sft_domain_qa import example

config = replace(
    parent,
    data=example("code"),
    # Code takes more tokens than prose, as indentation and names are cut into small pieces, and a change quotes it anew.
    length=2048,
    epochs=5,
    # A model that programs shall only take on conventions: half the rate, so that it keeps the rest.
    optimizer=replace(parent.optimizer, peak_lr=1e-4),
    out="runs/code",
)
