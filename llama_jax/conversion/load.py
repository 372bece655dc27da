"""A checkpoint of any form straight onto a mesh: one weight at a time on the host, its shards on their devices."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.conversion import layout, source
from llama_jax.conversion.adapted import holds_adapters
from llama_jax.conversion.convert import Form, locate, open_source, recognise
from llama_jax.conversion.source import Overrides, Source
from llama_jax.errors import UserError
from llama_jax.model import quantize, transformer
from llama_jax.model.nf4 import Nf4, nf4_abstract, quantize_nf4, widen
from llama_jax.model.transformer import Transformer
from llama_jax.parallel.mesh import make_mesh
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training import checkpoint

Narrow = quantize.Int8 | Nf4


def load_model(
    path: str | Path,
    mesh: Mesh | None = None,
    dtype: Any = None,
    *,
    int8: bool = False,
    nf4: bool = False,
    form: Form | None = None,
    overrides: Overrides = Overrides(),
) -> tuple[Transformer, Tokenizer]:
    """Reads a model and its tokenizer, for inference or as a beginning.

    Args:
      path: a run or one of its checkpoints, a Hugging Face or Meta folder, a llama2.c file, or hub:ID.
      mesh: where the parameters go; one device if none.
      dtype: what they are cast to; as stored if none.
      int8: keep the matrices as int8 with a scale per output, quantised as each is read.
      nf4: keep the blocks' matrices in 4 bits, in the same way; for adapters to be trained beside.
      form: hf, meta, ours or llama2c; recognised if none.
      overrides: what the files leave out or have wrong.

    Raises:
      UserError: it is not a whole checkpoint, or has no tokenizer.model.
    """
    mesh = mesh or make_mesh(devices=jax.local_devices()[:1])
    path = locate(path)
    form = form or recognise(path)
    plain = form == "ours" and not holds_adapters(path)
    if plain and overrides == Overrides() and not (int8 or nf4):
        model, tokenizer = checkpoint.restore_model(path, mesh, dtype)
    else:
        opened = open_source(path, form, overrides)
        for note in opened.notes:
            if jax.process_index() == 0:
                print(f"note: {note}", file=sys.stderr)
        model = place(opened, mesh, dtype, int8, nf4)
        found = opened.assets.get(source.TOKENIZER)
        tokenizer = None if found is None else Tokenizer(found, f"{path}/{source.TOKENIZER}")
    if tokenizer is None:
        raise UserError(f"{path} has no {source.TOKENIZER}; copy the model's own beside its weights")
    return model, tokenizer


def place(opened: Source, mesh: Mesh, dtype: Any = None, int8: bool = False, nf4: bool = False) -> Transformer:
    """Reads every weight once, and only its own slices for each device of this process.

    Host memory holds one layer's matrix at a time; stacked parameters grow on their devices, in place.

    Args:
      opened: the checkpoint.
      mesh: where the parameters go.
      dtype: what they are cast to; as stored if none.
      int8: quantise the matrices to 8 bits, and print what that changed.
      nf4: quantise them to 4 bits.
    """
    abstract = transformer.abstract(opened.config, mesh)
    narrow = nf4_abstract(abstract) if nf4 else quantize.quantize_abstract(abstract) if int8 else abstract
    leaves: dict[str, Any] = {}
    errors: dict[layout.Weight, jax.Array] = {}
    for name, like in checkpoint.flat(narrow, is_leaf=_is_narrow).items():
        if _is_narrow(like):
            leaves[name], its_errors = _read_narrow(opened, name, like)
            errors |= its_errors
        else:
            leaves[name] = _read(opened, name, like.update(dtype=dtype or opened.dtypes[name]))
    opened.finish()
    if errors and jax.process_index() == 0:
        print(_describe("nf4" if nf4 else "int8", errors), file=sys.stderr)
    return checkpoint.unflat(abstract, leaves)


def _read(opened: Source, name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
    if not layout.is_stacked(name):
        return jax.block_until_ready(_cast(_put(opened, name, None, like.sharding), like.dtype, like.sharding))
    stack = _zeros(like.shape, like.dtype, like.sharding)
    for layer in range(opened.config.n_layers):
        w = _put(opened, name, layer, _of_layer(like.sharding))
        stack = jax.block_until_ready(_set_layer(stack, w, layer, like.sharding))
    return stack


def _read_narrow(opened: Source, name: str, like: Narrow) -> tuple[Narrow, dict[layout.Weight, jax.Array]]:
    """One parameter quantised, and the relative error of each of its matrices."""
    kind = ("nf4", like.axis) if isinstance(like, Nf4) else ("int8", quantize.input_axes(name))
    # A weight lies as its codes do.
    lies = tuple(leaf.sharding for leaf in jax.tree.leaves(like))
    if not layout.is_stacked(name):
        quantized, error = jax.block_until_ready(_narrow(_put(opened, name, None, lies[0]), kind, lies))
        return quantized, {(name, None): error}
    stack = jax.tree.map(lambda part: _zeros(part.shape, part.dtype, part.sharding), like)
    errors = {}
    for layer in range(opened.config.n_layers):
        w = _put(opened, name, layer, _of_layer(lies[0]))
        stack, errors[name, layer] = jax.block_until_ready(_set_narrow_layer(stack, w, layer, kind, lies))
    return stack, errors


# Compiled once for every shape and layout, whichever parameter or checkpoint has it. Each copies, and is waited for: on a CPU what
# `device_put` gives is the memory map itself (`may_alias=False` or not), which changes with the file, and what is not waited for piles up.


@partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@partial(jax.jit, static_argnums=(1, 2))
def _cast(w: jax.Array, dtype: Any, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(w.astype(dtype), sharding)


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def _set_layer(stack: jax.Array, w: jax.Array, layer: int, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(stack.at[layer].set(w.astype(stack.dtype)), sharding)


@partial(jax.jit, static_argnums=(1, 2))
def _narrow(w: jax.Array, kind: tuple[str, int], lies: tuple[NamedSharding, ...]) -> tuple[Narrow, jax.Array]:
    quantized, error = _quantize(w, *kind)
    return _constrained(quantized, lies), error


@partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _set_narrow_layer(
    stack: Narrow, w: jax.Array, layer: int, kind: tuple[str, int], lies: tuple[NamedSharding, ...]
) -> tuple[Narrow, jax.Array]:
    quantized, error = _quantize(w, *kind)
    return _constrained(jax.tree.map(lambda whole, part: whole.at[layer].set(part), stack, quantized), lies), error


def _quantize(w: jax.Array, form: str, axes: int) -> tuple[Narrow, jax.Array]:
    """A matrix in 4 or 8 bits, and the root mean square of what that changed, relative to the matrix's own."""
    w = w.astype(jnp.float32)
    if form == "nf4":
        quantized = quantize_nf4(w, axes)
        wide = widen(quantized, jnp.float32)
    else:
        quantized = quantize.quantize(w, axes)
        wide = quantize.dequantize(quantized)
    return quantized, jnp.sqrt(jnp.sum((wide - w) ** 2) / jnp.sum(w**2))


def _constrained(q: Narrow, lies: tuple[NamedSharding, ...]) -> Narrow:
    leaves, tree = jax.tree.flatten(q)
    return tree.unflatten(map(jax.lax.with_sharding_constraint, leaves, lies))


def _put(opened: Source, name: str, layer: int | None, sharding: NamedSharding) -> jax.Array:
    """One weight as stored, every shard read from its own part of the file."""
    weight = opened.read(name, layer)
    shards = [
        jax.device_put(weight[index], device)
        for device, index in sharding.addressable_devices_indices_map(weight.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(weight.shape, sharding, shards)


def _is_narrow(leaf: Any) -> bool:
    return isinstance(leaf, Narrow)


def _of_layer(sharding: NamedSharding) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def _describe(form: str, errors: dict[layout.Weight, jax.Array]) -> str:
    values = {weight: float(error) for weight, error in errors.items()}
    (name, layer), worst = max(values.items(), key=lambda item: item[1])
    mean = sum(values.values()) / len(values)
    return (
        f"{form}: matrices differ from the stored ones by {mean:.2%} (RMS), at most {worst:.2%} ({name}, layer {layer})"
    )
