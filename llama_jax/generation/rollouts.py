"""Answers to learn from: drawn at full support, each token with its log-probability, EOS included (paper 3.2.3).

So many rows are under way at once; those that ended take the next prompts, so that a long answer holds nobody up. What a
prompt draws depends on its own tokens and seed alone. Our choice: a refill waits until a quarter of the rows are free, since
reading a few prompts takes a device as long as reading one.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from llama_jax.config import LlamaConfig
from llama_jax.errors import UserError
from llama_jax.generation.cache import KV_AXES, Cache, init_cache, slots_for
from llama_jax.generation.llama import Llama
from llama_jax.generation.sampler import NO_TOKEN, Decoding, Sampling, begin, decode, row_keys
from llama_jax.model.transformer import Transformer, layers_apart, scan_copies, split_layers
from llama_jax.parallel.mesh import constrain, generation_layout, partition_spec, per_device, ways

DECODE_CHUNK = 64  # tokens per dispatch at most
REFILL_SHARE = 4  # one of so many rows is refilled at once


class Rollout(NamedTuple):
    """What a model drew behind one prompt; nothing is added or rewritten."""

    ids: list[int]
    """The drawn tokens; the last is EOS where the model ended its answer."""
    log_probs: list[float]
    """Of each, EOS too, nats, under the distribution that it was drawn from."""
    ended: bool
    """False where max_new_tokens cut the answer."""


def make_gather(model: Transformer, dtype: Any) -> Callable[[Transformer], Transformer]:
    """Makes the function that casts trained weights and lays them to generate, compiled once for models that lie as this one.

    Over a mesh, every device gets whole what training splits over `fsdp` and `context`; the narrow type is what travels. The
    layers come apart where that decodes faster (`scan_copies`).
    What it gives takes memory beside the trained weights as long as it is held. Where neither dtype nor layout changes it may
    be the very same buffers, which a training step that donates its state then deletes: gather again behind each step.

    Args:
      model: on devices; plain, quantised or adapted weights. Quantised ones keep their bits.
      dtype: of the computation.
    """

    return jax.jit(partial(_laid, dtype=dtype, apart=_apart(model)), out_shardings=_layouts(model))


def laid_to_generate(model: Transformer, dtype: Any) -> Transformer:
    """What the function of `make_gather` would make of a model that is described by shapes with shardings, so described."""
    laid = jax.eval_shape(partial(_laid, dtype=dtype, apart=_apart(model)), model)
    return jax.tree.map(
        lambda weight, layout: jax.ShapeDtypeStruct(weight.shape, weight.dtype, sharding=layout), laid, _layouts(model)
    )


def _laid(model: Transformer, dtype: Any, apart: bool) -> Transformer:
    return layers_apart(model.cast(dtype)) if apart else model.cast(dtype)


def _apart(model: Transformer) -> bool:
    return scan_copies(model.embedding_VD.sharding)


def _layouts(model: Transformer) -> Transformer:
    """Where each weight lies to generate."""

    def whole(weight: jax.Array) -> Sharding:
        return generation_layout(weight.sharding) if isinstance(weight.sharding, NamedSharding) else weight.sharding

    def of_layers(layout: Sharding) -> list[Sharding]:
        if isinstance(layout, NamedSharding):
            layout = NamedSharding(layout.mesh, PartitionSpec(*layout.spec[1:]))
        return [layout] * model.config.n_layers

    layouts = jax.tree.map(whole, model)
    return split_layers(layouts, of_layers) if _apart(model) else layouts


def sample_rollouts(
    llama: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    rows: int = 64,
    slots: int | None = None,
) -> list[Rollout]:
    """Draws one answer to each prompt, each until EOS or `max_new_tokens`.

    Every process of a run calls it with the same arguments, and gets the same.

    Args:
      llama: the model; over a mesh best as `make_gather` lays it.
      prompts: token ids, read as they are.
      seeds: one for each prompt. The same seed gives the same answer, whatever else is drawn beside it.
      max_new_tokens: of an answer, EOS included; 1 or more.
      temperature: divides the logits; above 0.
      rows: answers under way at once; rounded up to what divides over the mesh.
      slots: tokens that a row has room for; what the longest prompt needs if none. Calls with the same share their programs.

    Raises:
      UserError: a setting out of range, or a prompt that leaves no room for `max_new_tokens`.
    """
    prompts = [list(map(int, ids)) for ids in prompts]
    slots = _checked(llama, prompts, seeds, max_new_tokens, temperature, rows, slots)
    rollouts: list[Any] = [None] * len(prompts)
    budgets = [max_new_tokens] * len(prompts)
    for number, rollout in draw(llama, prompts, seeds, budgets, Sampling(float(temperature), 1.0, 0), rows, slots):
        rollouts[number] = rollout
    return rollouts


def draw(
    llama: Llama,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    budgets: Sequence[int],
    sampling: Sampling,
    rows: int,
    slots: int,
    is_whole: Callable[[int, list[int]], bool] = lambda number, ids: False,
    steps: int = DECODE_CHUNK,
) -> Iterator[tuple[int, Rollout]]:
    """Draws one answer to each prompt, and gives each with its prompt's number as soon as it is whole.

    Args:
      llama: the model.
      prompts: token ids, one or more each.
      seeds: one for each prompt.
      budgets: tokens of each answer at most, EOS included; 1 or more.
      sampling: how to draw.
      rows: answers under way at once; rounded up to what divides over the mesh.
      slots: tokens that a row has room for; no prompt with its budget needs more.
      is_whole: whether what a prompt has drawn, its tokens so far, needs no more; asked after `steps` tokens, so it may have some more.
      steps: tokens per dispatch at most.
    """
    if not prompts:
        return
    eos_id = llama.tokenizer.eos_id
    with llama.on_mesh():
        table = _Table(budgets, rows, ways("batch"))
        apart = isinstance(llama.model.layers, tuple)
        state = _idle(llama.model.config, table.prompt_of.size, slots, llama.dtype, apart)
        while not table.is_done:
            for numbers, places in table.refills():
                ids = [prompts[number] if number >= 0 else [] for number in numbers.flat]
                row_seeds = [seeds[number] if number >= 0 else 0 for number in numbers.flat]
                budget_B = np.array([budgets[number] if number >= 0 else 0 for number in numbers.flat], np.int32)
                new, token_B, log_prob_B = _begin(llama, ids, row_seeds, budget_B, sampling)
                state = _put(state, new, places.ravel())
                table.take(numbers, *_fetch((token_B[:, None], log_prob_B[:, None])), eos_id)
            state, *drawn = decode(llama.model, state, sampling, eos_id, steps, table.enough)
            table.take(table.prompt_of, *_fetch(drawn), eos_id)
            stopped_B = table.stop(is_whole)
            if stopped_B.any():
                state = state._replace(left_B=_without(state.left_B, stopped_B))
            while table.whole:
                number = table.whole.popleft()
                ids, log_probs = table.drawn[number]
                yield number, Rollout(ids, log_probs, ids[-1] == eos_id)


def _checked(
    llama: Llama,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    rows: int,
    slots: int | None,
) -> int:
    """The slots of a row. Raises UserError for a setting out of range, or a prompt that does not fit."""
    vocab_size, context = llama.tokenizer.vocab_size, llama.model.config.context_length
    if len(seeds) != len(prompts):
        raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts; expected one for each")
    if max_new_tokens < 1 or rows < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens} and rows {rows}; both must be 1 or more")
    if not 0 < temperature < float("inf"):
        raise UserError(f"--temperature is {temperature}; it must be above 0 to draw answers to learn from")
    for ids in prompts:
        if not ids or not all(0 <= token < vocab_size for token in ids):
            raise UserError(f"a prompt is empty or has a token outside the vocabulary, 0 to {vocab_size - 1}")
    longest = max(map(len, prompts), default=1)
    slots = min(slots_for(longest + max_new_tokens), context) if slots is None else slots
    if longest + max_new_tokens > min(slots, context):
        raise UserError(
            f"a prompt of {longest} tokens and --max-new-tokens {max_new_tokens} do not fit in {min(slots, context)} tokens "
            f"(the model's context is {context}); shorten or leave out the prompt, or lower --max-new-tokens"
        )
    return slots


class _Table:
    """Whose each row is, and what each prompt has drawn; on the host alone."""

    def __init__(self, budgets: Sequence[int], rows: int, devices: int):
        own = -(-min(rows, len(budgets)) // devices)
        self.prompt_of = np.full((devices, own), -1)
        """The prompt of each row of each part of the mesh that holds rows of its own; -1: free."""
        self.drawn: list[tuple[list[int], list[float]]] = [([], []) for _ in budgets]
        self.whole: deque[int] = deque()
        """Prompts whose answer has become whole and was not given out yet."""
        self._budgets = budgets
        self._waiting = deque(range(len(budgets)))
        self._at_once = -(-own // REFILL_SHARE)

    @property
    def is_done(self) -> bool:
        """Whether every prompt has its answer."""
        return not self._waiting and bool((self.prompt_of < 0).all())

    @property
    def enough(self) -> int:
        """How many rows may go on when the next refill is due."""
        return self.prompt_of.size - self._at_once * len(self.prompt_of) if self._waiting else 0

    def refills(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Gives free rows to waiting prompts, once enough rows are free for a refill.

        Yields:
          prompts (devices, rows refilled at once), -1 for none, and the row of the device that each takes; as often as rows
          are free and prompts waiting.
        """
        due = (self.prompt_of >= 0).sum() <= self.enough
        while due and self._waiting and (self.prompt_of < 0).any():
            numbers = np.full((len(self.prompt_of), self._at_once), -1)
            places = np.full_like(numbers, -1)
            # Over the devices first, so that few prompts do not all go to one.
            for place in range(self._at_once):
                for device, own in enumerate(self.prompt_of):
                    free = np.flatnonzero(own < 0)
                    if len(free) and self._waiting:
                        numbers[device, place], places[device, place] = self._waiting.popleft(), free[0]
                        own[free[0]] = numbers[device, place]
            yield numbers, places.astype(np.int32)

    def take(self, numbers: np.ndarray, tokens_BT: np.ndarray, log_probs_BT: np.ndarray, eos_id: int) -> None:
        """Adds what the rows of these prompts drew, and frees the rows whose answer is whole."""
        for number, tokens_T, log_probs_T in zip(numbers.ravel().tolist(), tokens_BT, log_probs_BT, strict=True):
            if number >= 0:
                ids, log_probs = self.drawn[number]
                count = int((tokens_T != NO_TOKEN).sum())
                ids += tokens_T[:count].tolist()
                log_probs += log_probs_T[:count].tolist()
                if len(ids) == self._budgets[number] or ids[-1] == eos_id:
                    self._free(number)

    def stop(self, is_whole: Callable[[int, list[int]], bool]) -> np.ndarray:
        """Frees the rows whose answer needs no more though it did not end, and says which rows of all these are."""
        numbers = self.prompt_of.ravel().tolist()
        stopped_B = np.array([number >= 0 and is_whole(number, self.drawn[number][0]) for number in numbers])
        for number in self.prompt_of.ravel()[stopped_B].tolist():
            self._free(number)
        return stopped_B

    def _free(self, number: int) -> None:
        self.prompt_of[self.prompt_of == number] = -1
        self.whole.append(number)


def _begin(
    llama: Llama, prompts: list[list[int]], seeds: list[int], budget_B: np.ndarray, sampling: Sampling
) -> tuple[Decoding, jax.Array, jax.Array]:
    """Reads prompts into a cache of their own and draws the first token of each."""
    cache, logits_BV = llama.read(prompts, max(map(len, prompts)))
    seed_B = np.array([seed & 0xFFFFFFFF for seed in seeds], np.uint32)
    key_B = row_keys(seed_B, np.zeros_like(seed_B))  # as of `Llama.generate` with a seed for each text
    return begin(logits_BV, cache, budget_B, key_B, sampling, eos_id=llama.tokenizer.eos_id)


@partial(jax.jit, static_argnames=("config", "rows", "slots", "dtype", "apart"))
def _idle(config: LlamaConfig, rows: int, slots: int, dtype: Any, apart: bool) -> Decoding:
    """Rows of which none has anything to draw."""
    none_B = constrain(jnp.zeros(rows, jnp.int32), "batch")
    return Decoding(init_cache(config, rows, slots, dtype, apart), none_B, none_B, row_keys(none_B, none_B))


@jax.jit
def _without(left_B: jax.Array, stopped_B: jax.Array) -> jax.Array:
    """What rows may still draw, those that were stopped nothing."""
    return constrain(jnp.where(stopped_B, 0, left_B), "batch")


@partial(jax.jit, donate_argnames="state")
def _put(state: Decoding, new: Decoding, place_F: jax.Array) -> Decoding:
    """Rows that have begun in the place of free ones, of the state, which is donated.

    Args:
      state: B rows.
      new: F rows, on the same devices.
      place_F: int32, the row that each takes among those of its device; behind these -1: none.
    """
    kv, row = partition_spec(KV_AXES), partition_spec(("batch",))
    specs = Decoding(Cache(kv, kv, row), row, row, row)
    return per_device(_put_rows, in_specs=(specs, specs, row), out_specs=specs)(state, new, place_F)


def _put_rows(state: Decoding, new: Decoding, place_F: jax.Array) -> Decoding:
    """`_put` as each device does it."""

    def put_row(old_LBKSH: jax.Array, new_LFKSH: jax.Array) -> jax.Array:
        S = min(old_LBKSH.shape[3], new_LFKSH.shape[3])  # no prompt is longer

        def put(f: jax.Array, old_LBKSH: jax.Array) -> jax.Array:
            row_L1KSH = jax.lax.dynamic_slice_in_dim(new_LFKSH, f, 1, axis=1)[:, :, :, :S]
            return jax.lax.dynamic_update_slice(old_LBKSH, row_L1KSH, (0, place_F[f], 0, 0, 0))

        return jax.lax.fori_loop(0, jnp.sum(place_F >= 0), put, old_LBKSH)

    takes_FB = place_F[:, None] == jnp.arange(len(state.token_B))
    taken_B, source_B = takes_FB.any(0), takes_FB.argmax(0)
    cache = jax.tree.map(put_row, state.cache[:2], new.cache[:2])
    old_rows = (state.cache.length_B, *state[1:])
    new_rows = (new.cache.length_B, *new[1:])
    length_B, *rest = (
        jnp.where(taken_B, new_B[source_B], old_B) for old_B, new_B in zip(old_rows, new_rows, strict=True)
    )
    return Decoding(Cache(*cache, length_B), *rest)


def _fetch(drawn: tuple) -> tuple[np.ndarray, ...]:
    """Tokens and log-probabilities whole on every process, whose own devices may hold a part of the rows only."""
    return tuple(map(np.asarray, _replicated(tuple(drawn))))


@jax.jit
def _replicated(drawn: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(constrain(x_BT, None, None) for x_BT in drawn)
