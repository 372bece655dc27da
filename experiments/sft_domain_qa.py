"""Questions and answers about something of one's own: a handbook, a product, a set of rules (paper 3.1, with adapters).

Claim: the loss on held-out questions falls; how much of a handbook a 7B model then gets right is not measured here.
A row: {"prompt": "Can I renew a loan?", "response": "Yes, twice, by three weeks each time ..."}. Ask each fact in several
  ways, and add questions that your text does not answer, with the answer that says so: a model trained on answers alone
  learns to always have one. The example is a library that does not exist, so that no model knows it already.
Command: llama-jax sft sft_domain_qa --checkpoint Llama-2-7b-hf --data mine.jsonl --out runs/domain_qa
Cost: planned for a T4, a free notebook's GPU (`llama-jax plan sft_domain_qa --topology t4:1 --model-preset llama2-7b`): 9.1 of 14.4
  GB, 2.4 s a step of 512 tokens at the least. Time: not measured.
Check: `llama-jax chat runs/domain_qa --temperature 0` with questions that were kept out of the file.
"""

from pathlib import Path

from llama_jax.data.examples import DialogueConfig
from llama_jax.model.lora import LoraConfig
from llama_jax.stages.sft import SFTConfig
from llama_jax.training.loop import LoopConfig
from llama_jax.training.optimizer import OptimizerConfig


def example(name: str) -> DialogueConfig:
    """The example data of a recipe, a tenth of it held out."""
    return DialogueConfig(sources=(str(Path(__file__).with_name("data") / f"{name}.jsonl"),), held_out=0.1)


config = SFTConfig(
    checkpoint="Llama-2-7b-hf",
    data=example("domain_qa"),
    # Facts must be met often, and these are few. From a thousand rows on, 3 epochs and --rows 8 --micro-batches 8.
    epochs=10,
    # One row holds about eight short pairs, packed; a batch of more would leave a small file too few steps.
    rows=1,
    length=512,
    # The paper's 2e-5 is for every weight; adapters begin at nothing and need ten times that.
    optimizer=OptimizerConfig(peak_lr=2e-4, warmup_steps=0),
    train="lora",
    # All seven matrices: what is known, rather than how it is said, lies in the feed-forward layers too.
    lora=LoraConfig(rank=16, alpha=32.0),
    nf4=True,
    loop=LoopConfig(log_every=5, eval_every=10, save_every=50),
    out="runs/domain_qa",
)
