"""One label from a fixed list for each text: where a message goes, what a review says (paper 3.1, with adapters).

Claim: ranking the labels by `Llama.score` gets better than chance; a 7B model's accuracy is not measured here.
A row: {"instruction": "Which department is this message for? ...", "input": "My parcel ...", "output": "delivery"}, with
  the same instruction in every row, the label alone as output, and about equally many rows of each label.
Command: llama-jax sft sft_classification --checkpoint Llama-2-7b-hf --data mine.jsonl --out runs/classification
Cost: planned for a T4, a free notebook's GPU (`llama-jax plan sft_classification --topology t4:1 --model-preset llama2-7b`), in 8
  bits: 8.4 of 14.4 GB, 2.4 s a step of 512 tokens at the least. Time: not measured.
Check: accuracy on rows that were kept out of the file, eight lines of Python in docs/finetuning.md.
"""

from dataclasses import replace

from experiments.sft_domain_qa import config as parent
from experiments.sft_domain_qa import example

config = replace(
    parent,
    data=example("classification"),
    # A program asks, not a person: no chat format, so that prompt and label are two plain texts to score.
    plain=True,
    # Two or three trained tokens a row are little to learn from, so more passes than the paper's two.
    epochs=6,
    rows=2,
    length=256,
    # Rows are short, so there is room for 8 bits, whose rounding moves close calls between labels less than 4 bits do.
    nf4=False,
    int8=True,
    out="runs/classification",
)
