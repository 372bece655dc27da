"""A model and batches small enough that a step takes a millisecond, with every kind of segment and mask in them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llama_jax.config import Compute, LlamaConfig
from llama_jax.data.packing import Batch
from llama_jax.parallel.mesh import global_array
from llama_jax.training.optimizer import OptimizerConfig, make_optimizer

MODEL = LlamaConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, vocab_size=320, head_dim=8, context_length=16
)
FP32 = Compute(dtype="float32", attention="xla", remat="none", loss_chunk=8)
OPTIMIZER = OptimizerConfig(peak_lr=1e-2, warmup_steps=2)
STEPS = 20
# Its moments are the gradient itself, so that gradients can be compared without Adam's division.
KEEP_GRADIENT = optax.GradientTransformation(
    lambda trained: jax.tree.map(jnp.zeros_like, trained), lambda gradient, _, trained: (gradient, gradient)
)


def optimizer(config: OptimizerConfig = OPTIMIZER):
    return make_optimizer(config, MODEL, STEPS)


def batch(seed: int, rows: int = 8, length: int = 16) -> Batch:
    """Random tokens; each row two segments of unequal length, and a mask that leaves each row another share."""
    random = np.random.default_rng(seed)
    tokens = random.integers(3, MODEL.vocab_size, (rows, length + 1), dtype=np.int32)
    cut_B = random.integers(1, length, (rows, 1))
    place_T = np.arange(length)
    second_BT = place_T >= cut_B
    return Batch(
        tokens[:, :-1],
        tokens[:, 1:],
        1 + second_BT.astype(np.int32),
        np.where(second_BT, place_T - cut_B, place_T).astype(np.int32),
        random.random((rows, length)) < np.linspace(0.1, 0.9, rows)[:, None],
    )


def on_mesh(mesh, batch: Batch) -> Batch:
    return Batch(*(global_array(mesh, array, "batch", "length", rows=len(array)) for array in batch))


def named(tree) -> dict[str, np.ndarray]:
    """The leaves of a tree on the host, by path."""
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same(ours, theirs) -> None:
    """Every leaf equal to the bit (NaN equal to NaN)."""
    ours, theirs = named(ours), named(theirs)
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[name], err_msg=name)


def relative_error(ours, theirs) -> float:
    """The largest difference of a leaf, as a share of that leaf's largest value."""
    ours, theirs = named(ours), named(theirs)
    assert ours.keys() == theirs.keys()
    return max(
        float(np.max(np.abs(ours[name] - theirs[name])) / max(np.max(np.abs(theirs[name])), 1e-30)) for name in theirs
    )
