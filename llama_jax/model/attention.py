"""Causal grouped-query attention behind one signature (paper 2.2, A.2.1): XLA anywhere, cuDNN on GPU, splash attention on TPU.

Under a mesh every device attends for its own sequences, heads and query positions, to keys and values gathered along the sequence: queries are
split over the context axis, and the causal mask knows where each device's queries begin. Our choice: contiguous spans of queries; the device that
holds the last span does most of the work.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax.errors import UserError
from llama_jax.model.splash import splash_attention
from llama_jax.parallel.mesh import compute_capability, partition_spec, per_device, platform

MASKED = -1e30  # finite: a difference of two infinities would be NaN


def causal_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    *,
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention of each token to itself and the earlier tokens of its segment.

    What its backward pass needs is named "attention_out" for `jax.checkpoint` policies, except under cuDNN, whose residuals cannot be named.

    Args:
      q_BTNH: rotated queries.
      k_BSKH: rotated keys, S = T; query head n reads key/value head n // (N / K).
      v_BSKH: values.
      segment_ids_BT: int32; tokens of different segments do not see each other. One segment if none.
      implementation: see `Compute.attention`.

    Returns:
      (B, T, N, H) in q's dtype; scores and softmax are float32.

    Raises:
      UserError: cuDNN was asked for in float32, which it does not have.
    """
    if implementation == "auto":
        implementation = best_implementation(q_BTNH.dtype, q_BTNH.shape[1], q_BTNH.shape[3])
    if implementation == "splash":
        return splash_attention(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)
    if implementation == "cudnn" and lacks_cudnn(q_BTNH.dtype):
        raise UserError(
            f"cuDNN attention has no {q_BTNH.dtype}; use --compute.dtype bfloat16 or --compute.attention xla"
        )

    segments = () if segment_ids_BT is None else (segment_ids_BT, segment_ids_BT)
    segment_specs = (partition_spec(("batch", "length")), partition_spec(("batch", "kv_length")))
    q_spec = partition_spec(("batch", "length", "heads", "head_dim"))
    kv_spec = partition_spec(("batch", "kv_length", "kv_heads", "head_dim"))
    attend = per_device(
        cudnn_attention if implementation == "cudnn" else xla_attention,
        in_specs=(q_spec, kv_spec, kv_spec, partition_spec(("length",)), segment_specs[: len(segments)]),
        out_specs=q_spec,
    )
    return attend(q_BTNH, k_BSKH, v_BSKH, jnp.arange(q_BTNH.shape[1]), segments)


def best_implementation(dtype: jnp.dtype, length: int, head_dim: int) -> str:
    """The fastest kernel that the devices in use (the ambient mesh's, or else the default ones) have for these queries."""
    match platform():
        case "tpu":
            return "splash"
        case "gpu":
            # cuDNN's own limits: 16 bits, Ampere or later, and with a mask an even length.
            fits = not lacks_cudnn(dtype) and head_dim % 8 == 0 and head_dim <= 128 and length % 2 == 0
            return "cudnn" if fits and compute_capability() >= 8 else "xla"
        case _:
            return "xla"


def lacks_cudnn(dtype: jnp.dtype) -> bool:
    """Whether cuDNN's attention does not know this precision; it knows the 16-bit ones."""
    return dtype.itemsize != 2


def cudnn_attention(q_BTNH, k_BSKH, v_BSKH, positions_T, segments) -> jax.Array:
    """One device's part of `causal_attention` through cuDNN; arguments as `xla_attention`.

    The segments reach the kernel as a mask, one for all heads: T x S numbers of 16 bits per sequence. cuDNN can also be told the segments' offsets,
    but only up to a fixed number of them, beyond which it would be silently wrong, at a cost in memory that grows with that number.
    """
    whole = q_BTNH.shape[1] == k_BSKH.shape[1]
    mask_BTS = None if whole and not segments else _mask(positions_T, segments, k_BSKH.shape[1])
    mask = None if mask_BTS is None else jnp.broadcast_to(mask_BTS, (q_BTNH.shape[0], *mask_BTS.shape[1:]))[:, None]
    # is_causal lets the kernel skip what lies above the diagonal; it counts from the first query, which is the first token only where all are here.
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask, is_causal=whole, implementation="cudnn")


def xla_attention(q_BTNH, k_BSKH, v_BSKH, positions_T, segments) -> jax.Array:
    """One device's part of `causal_attention` in plain matmuls, a chunk of queries at a time against the keys up to its end.

    Half of the T x T scores are never computed, and none is kept for the backward pass, which computes them again from the log of their sum.

    Args:
      q_BTNH: this device's queries.
      k_BSKH, v_BSKH: every key and value of the sequence.
      positions_T: where the queries stand among the keys.
      segments: () or the segment ids of the queries (B, T) and of the keys (B, S).
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    # Heads before positions: each head's matmuls then read contiguous memory.
    q_BKGTH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    # Our choice: at most four chunks, so that compile time does not grow with T; measured on a CPU, chunks below 128 gain nothing.
    chunk = max(128, -(-T // 4))
    outs = []
    for start in range(0, T, chunk):
        rows = slice(start, start + chunk)
        seen = slice(0, min(start + chunk, S) if T == S else S)
        segments_here = tuple(ids[:, span] for ids, span in zip(segments, (rows, seen), strict=False))
        outs.append(
            _rows(q_BKGTH[..., rows, :], k_BKSH[:, :, seen], v_BKSH[:, :, seen], positions_T[rows], segments_here)
        )
    return jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _rows(q_BKGTH, k_BKSH, v_BKSH, positions_T, segments):
    return _rows_forward(q_BKGTH, k_BKSH, v_BKSH, positions_T, segments)[0]


def _rows_forward(q_BKGTH, k_BKSH, v_BKSH, positions_T, segments):
    scores = _masked_scores(q_BKGTH, k_BKSH, positions_T, segments)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    out_BKGTH = (_einsum("BKGTS,BKSH->BKGTH", weights.astype(v_BKSH.dtype), v_BKSH) / total).astype(q_BKGTH.dtype)
    out_BKGTH, log_total = checkpoint_name((out_BKGTH, top + jnp.log(total)), "attention_out")
    return out_BKGTH, (q_BKGTH, k_BKSH, v_BKSH, positions_T, segments, out_BKGTH, log_total)


def _rows_backward(residuals, dout_BKGTH):
    q_BKGTH, k_BKSH, v_BKSH, positions_T, segments, out_BKGTH, log_total = residuals
    weights = jnp.exp(_masked_scores(q_BKGTH, k_BKSH, positions_T, segments) - log_total)
    dweights = _einsum("BKGTH,BKSH->BKGTS", dout_BKGTH, v_BKSH)
    # The softmax's own term, sum over S of weights * dweights, is also the product of the output and its gradient.
    mean = _einsum("BKGTH,BKGTH->BKGT", out_BKGTH, dout_BKGTH)[..., None]
    dscores = (weights * (dweights - mean)).astype(q_BKGTH.dtype)
    dq_BKGTH = _einsum("BKGTS,BKSH->BKGTH", dscores, k_BKSH)
    dk_BKSH = _einsum("BKGTS,BKGTH->BKSH", dscores, q_BKGTH)
    dv_BKSH = _einsum("BKGTS,BKGTH->BKSH", weights.astype(v_BKSH.dtype), dout_BKGTH)
    return dq_BKGTH.astype(q_BKGTH.dtype), dk_BKSH.astype(k_BKSH.dtype), dv_BKSH.astype(v_BKSH.dtype), None, None


_rows.defvjp(_rows_forward, _rows_backward)


def _masked_scores(q_BKGTH, k_BKSH, positions_T, segments):
    """Scores (B, K, G, T, S) in float32 of queries that are already scaled."""
    scores = _einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH)
    return jnp.where(_mask(positions_T, segments, k_BKSH.shape[2])[:, None, None], scores, MASKED)


def _mask(positions_T, segments, S) -> jax.Array:
    """True where a query sees a key: (B, T, S), or (1, T, S) without segments."""
    mask_BTS = (positions_T[:, None] >= jnp.arange(S))[None]
    if segments:
        q_segments_BT, kv_segments_BS = segments
        mask_BTS = mask_BTS & (q_segments_BT[:, :, None] == kv_segments_BS[:, None, :])
    return mask_BTS


def attend_with_cache(
    q_BTNH: jax.Array,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    cached_k_BKSH: jax.Array,
    cached_v_BKSH: jax.Array,
    length_B: jax.Array,
) -> jax.Array:
    """Attention of T new tokens to the first `length_B` cached ones and, causally, to each other.

    The two parts are scored apart and share one softmax, so that the cache is read where it lies and never copied. Heads come before positions, so
    that a matmul reads a head's keys in one piece.

    Args:
      q_BTNH: rotated queries of the new tokens.
      k_BKTH, v_BKTH: rotated keys and values of the new tokens.
      cached_k_BKSH, cached_v_BKSH: the cache.
      length_B: int32, filled slots of the cache, per sequence.

    Returns:
      (B, T, N, H) in q's dtype.
    """
    S, T = cached_k_BKSH.shape[2], q_BTNH.shape[1]
    q_BKGTH = _by_head(q_BTNH, cached_k_BKSH.shape[1])
    filled_BS = jnp.arange(S) < length_B[:, None]
    old = jnp.where(filled_BS[:, None, None, None], _scores(q_BKGTH, cached_k_BKSH), MASKED)
    new = jnp.where(jnp.tril(jnp.ones((T, T), bool)), _scores(q_BKGTH, k_BKTH), MASKED)
    # A token always sees itself, so the maximum is a real score and the denominator at least one.
    top = jnp.maximum(old.max(-1, keepdims=True, initial=MASKED), new.max(-1, keepdims=True))
    old, new = jnp.exp(old - top), jnp.exp(new - top)
    total = old.sum(-1, keepdims=True) + new.sum(-1, keepdims=True)
    heads_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", (old / total).astype(v_BKTH.dtype), cached_v_BKSH)
    heads_BKGTH += jnp.einsum("BKGTS,BKSH->BKGTH", (new / total).astype(v_BKTH.dtype), v_BKTH)
    return heads_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


def _by_head(q_BTNH: jax.Array, n_kv_heads: int) -> jax.Array:
    """Query heads by the key/value head they read, before positions: (B, K, G, T, H)."""
    B, T, N, H = q_BTNH.shape
    return q_BTNH.reshape(B, T, n_kv_heads, N // n_kv_heads, H).transpose(0, 2, 3, 1, 4)


def _scores(q_BKGTH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
    """Scaled scores (B, K, G, T, S), accumulated and kept in float32."""
    return _einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH) * q_BKGTH.shape[-1] ** -0.5


def attend_to_cache(
    q_BTNH: jax.Array, cached_k_BKSH: jax.Array, cached_v_BKSH: jax.Array, positions_BT: jax.Array
) -> jax.Array:
    """Attention of new tokens to a cache that their own keys and values stand in already.

    Args:
      q_BTNH: rotated queries.
      cached_k_BKSH, cached_v_BKSH: the cache.
      positions_BT: int32; a query sees the slots up to its own position.

    Returns:
      (B, T, N, H) in q's dtype.
    """
    q_BKGTH = _by_head(q_BTNH, cached_k_BKSH.shape[1])
    seen_BTS = jnp.arange(cached_k_BKSH.shape[2]) <= positions_BT[..., None]
    scores = jnp.where(seen_BTS[:, None, None], _scores(q_BKGTH, cached_k_BKSH), MASKED)
    weights = jax.nn.softmax(scores).astype(cached_v_BKSH.dtype)
    heads_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", weights, cached_v_BKSH)
    return heads_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)
