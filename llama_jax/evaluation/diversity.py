"""How alike a model's samples are: Self-BLEU (paper 5.1, Figure 21, on temperature; the measure is from arXiv 1802.01886)."""

import math
from collections.abc import Sequence

from llama_jax.errors import UserError


def self_bleu(texts: Sequence[str]) -> float:
    """The mean BLEU of each text with all others as its references: 100 if all are equal, 0 if no two share a word.

    Our choice, where the paper is silent: BLEU-4 of sentences, as sacrebleu has it (its own tokens and smoothing; orders
    longer than a text are left out). Equal texts count 100 even where they are empty, which BLEU leaves undefined.

    Args:
      texts: samples of one prompt, in any order.

    Returns:
      from 0 to 100; low is diverse.

    Raises:
      UserError: there are fewer than two texts, or sacrebleu is not installed.
    """
    if len(texts) < 2:
        raise UserError(f"Self-BLEU compares texts with each other and got {len(texts)}; give it at least 2 samples")
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise UserError("Self-BLEU needs sacrebleu, which is not installed: pip install sacrebleu") from None
    texts = [" ".join(text.split()) for text in texts]
    bleu = BLEU(effective_order=True)

    def of_one(number: int) -> float:
        others = [*texts[:number], *texts[number + 1 :]]
        return 100.0 if texts[number] in others else bleu.sentence_score(texts[number], others).score

    return math.fsum(map(of_one, range(len(texts)))) / len(texts)
