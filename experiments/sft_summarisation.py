"""A long text in, a short one out (paper 3.1, with adapters).

Claim: the loss on held-out summaries falls; how faithful a 7B model's summaries are is not measured here.
A row: {"text": "\\n\\nHuman: Summarise in one sentence:\\n\\n...\\n\\nAssistant: ..."}; the other shapes do as well. Use one
  instruction for each length or form of summary, and put into a summary nothing that the text does not say.
Command: llama-jax sft sft_summarisation --checkpoint Llama-2-7b-hf --data mine.jsonl --out runs/summarisation
  The example's texts are short; --length 512 gives them more steps.
Cost: planned for a T4, a free notebook's GPU (`llama-jax plan sft_summarisation --topology t4:1 --model-preset llama2-7b`): 12.7 of
  14.4 GB with rows of 4,096 tokens, 21 s a step at the least. Time: not measured.
Check: read ten summaries beside their texts. A program can look for numbers and names that the text does not have.
"""

from dataclasses import replace

from experiments.sft_domain_qa import config as parent
from experiments.sft_domain_qa import example

config = replace(
    parent,
    data=example("summarisation"),
    # The whole context: a text that does not fit with its summary is left out, and counted, rather than cut. A row
    # holds two or three long texts and fills a small card by itself: from some hundred texts on, --rows 8
    # --micro-batches 8 makes batches of eight rows that are read one after the other.
    length=4096,
    # The text says what to write and only the form is new: as few passes as a large file needs, half the rate.
    epochs=3,
    optimizer=replace(parent.optimizer, peak_lr=1e-4),
    out="runs/summarisation",
)
