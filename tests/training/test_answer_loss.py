"""The loss of packed dialogues is the sum of the losses of each dialogue by itself."""

import jax
import numpy as np

from llama_jax.data.examples import Examples, Packing, make_batch
from llama_jax.model import transformer
from llama_jax.text.chat import Encoded
from llama_jax.training.step import batch_loss
from tests.training.tiny import FP32, MODEL

LENGTH = 16


def random_examples(count: int) -> Examples:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, LENGTH + 2, count).tolist()
    ids = [rng.integers(3, MODEL.vocab_size, n).tolist() for n in lengths]
    return Examples.of([[Encoded(i, [False, *(rng.random(len(i) - 1) < 0.5).tolist()]) for i in ids]], MODEL.vocab_size)


def test_packed_loss_is_the_sum_of_unpacked_losses():
    examples = random_examples(24)
    # Weights larger than a model begins with, so that what a token sees matters.
    model = jax.tree.map(lambda leaf: 5 * leaf, transformer.init(MODEL, jax.random.key(0)))

    @jax.jit
    def loss(batch):
        return batch_loss(model, batch, batch.loss_mask_BT.astype("float32"), FP32).loss

    packed = make_batch(examples, Packing(examples, LENGTH).epoch(0), LENGTH)
    alone = make_batch(examples, [[number] for number in range(len(examples))], LENGTH)
    assert len(packed.tokens_BT) < len(alone.tokens_BT) == 24
    assert packed.loss_mask_BT.sum() == alone.loss_mask_BT.sum() == examples.answer_mask.sum()
    np.testing.assert_allclose(loss(packed), loss(alone), rtol=1e-6)
    # The mutants: examples that see each other; positions that are wrong within an example.
    together = packed._replace(segment_ids_BT=np.minimum(packed.segment_ids_BT, 1))
    stretched = packed._replace(positions_BT=packed.positions_BT * 2)
    for mutant in (together, stretched):
        assert abs(loss(mutant) / loss(alone) - 1) > 1e-3
