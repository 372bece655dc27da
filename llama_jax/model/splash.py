"""Causal attention on TPU through JAX's Pallas kernel, splash attention, which skips the blocks above the diagonal."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from llama_jax.parallel.mesh import partition_spec, per_device, platform, sharding, ways

LANES = 128  # lanes of a TPU vector register: the kernel's blocks are multiples of it
BLOCK = 512  # our choice: one block's scores take 1 MB of float32, well within the 16 MB of vector memory that a kernel of a v5e may use


def splash_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_ids_BT: jax.Array | None
) -> jax.Array:
    """`causal_attention` through the splash kernel; on other platforms than TPU it is interpreted, which is exact and slow.

    Sequences are padded to whole blocks. The padding follows every real token, so none sees it.
    """
    _, T, N, H = q_BTNH.shape
    spans = ways("length")
    pad = -T % (LANES * spans)
    # Scaled in float32, then rounded: the kernel itself does not scale.
    q_BNTH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)
    q_BNTH, k_BKSH, v_BKSH = (
        jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, pad), (0, 0))) for x in (q_BNTH, k_BSKH, v_BSKH)
    )
    segments = None
    if segment_ids_BT is not None:
        ids = jnp.pad(segment_ids_BT, ((0, 0), (0, pad)), mode="edge")
        segments = splash.SegmentIds(q=ids, kv=ids)

    kernel, kernel_spec = _kernel(N, T + pad, spans)
    q_spec = partition_spec(("batch", "heads", "length", "head_dim"))
    kv_spec = partition_spec(("batch", "kv_heads", "kv_length", "head_dim"))
    segments_spec = segments and splash.SegmentIds(
        q=partition_spec(("batch", "length")), kv=partition_spec(("batch", "kv_length"))
    )

    def attend(kernel, q_BNTH, k_BKSH, v_BKSH, segments):
        return jax.vmap(kernel, in_axes=(0, 0, 0, segments and 0))(q_BNTH, k_BKSH, v_BKSH, segments)

    run = per_device(attend, in_specs=(kernel_spec, q_spec, kv_spec, kv_spec, segments_spec), out_specs=q_spec)
    out_BNTH = run(kernel, q_BNTH, k_BKSH, v_BKSH, segments)
    return out_BNTH[:, :, :T].transpose(0, 2, 1, 3)


def _kernel(n_heads: int, length: int, spans: int):
    """The kernel for `length` tokens whose queries are split into `spans`, and how its tables are laid out on the ambient mesh."""
    block_q, block_kv = _block(length // spans), _block(length)
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((length, length))] * n_heads),
        block_sizes=sizes,
        head_shards=1,  # every head has the same mask: one table serves them all, however they are split
        q_seq_shards=spans,
        residual_checkpoint_name="attention_out",
        interpret=platform() != "tpu",
    )
    mesh = jax.sharding.get_abstract_mesh()
    return kernel, None if mesh.empty else kernel.manual_sharding_spec(sharding(mesh, None, "length"))


def _block(length: int) -> int:
    """The largest multiple of 128 up to BLOCK that divides the length."""
    return max(block for block in range(LANES, BLOCK + 1, LANES) if length % block == 0)
