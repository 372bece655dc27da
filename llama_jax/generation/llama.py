"""A model and its tokenizer, prompts in, text out, as a batch or as a stream (paper 3.1's generation settings are the reference's).

Prompts of unequal length are padded on the right and share one program; lengths are rounded up to a few sizes, so that few programs are compiled.
What a row gives depends on its own prompt and seed only. Our choice: a prompt is read 512 tokens at a time, so that the scores of a long one never
exist at once.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llama_jax.conversion.convert import Form
from llama_jax.conversion.load import load_model
from llama_jax.conversion.source import Overrides
from llama_jax.errors import UserError
from llama_jax.generation.cache import Cache, Kept, init_cache, repeat, slots_for, widen
from llama_jax.generation.sampler import NO_TOKEN, Sampling, begin, decode, prefill, row_keys
from llama_jax.generation.scoring import Score, rounded_up, score_tokens
from llama_jax.generation.session import Chat
from llama_jax.model.transformer import Transformer, layers_apart, scan_copies
from llama_jax.parallel.mesh import make_mesh, ways
from llama_jax.text.chat import Llama2Chat, Template
from llama_jax.text.tokenizer import Tokenizer

PREFILL_CHUNK = 512  # prompt tokens read per dispatch
SHARED_TOKENS = 64  # that all prompts of a batch begin with, as examples before a question, are read once
DECODE_CHUNK = 32  # tokens per dispatch of a batch; a stream gets each token by itself


@dataclass(frozen=True)
class Completion:
    """What a model made of one prompt."""

    text: str
    """The continuation; the prompt is not repeated."""
    ids: list[int]
    """Its tokens, without the EOS that ended them."""
    log_probs: list[float]
    """Of each token, under the distribution that it was drawn from (so 0 at temperature 0)."""
    finish_reason: Literal["eos", "length"]
    """Whether the model ended the text, or max_new_tokens or the context did."""


class Llama:
    """Generates text with one model; its weights are cast once, here, to the precision they compute in."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, compute_dtype: Any = None):
        """Takes a model where it lies: on one device, or sharded over a mesh.

        Args:
          model: its context_length bounds prompt and continuation together; layers stacked or apart.
          tokenizer: the one it was trained with.
          compute_dtype: of weights, cache and matmuls; if none, float32 on a CPU, which has no fast bfloat16, and bfloat16 elsewhere.

        Raises:
          UserError: the tokenizer and the model differ in their number of tokens.
        """
        if model.config.vocab_size != tokenizer.vocab_size:
            raise UserError(
                f"The model has {model.config.vocab_size} tokens and the tokenizer {tokenizer.vocab_size}; "
                "use the tokenizer that the model was trained with"
            )
        layout = model.embedding_VD.sharding
        self._mesh = layout.mesh if isinstance(layout, NamedSharding) else None
        platform = next(iter(layout.device_set)).platform
        self.dtype = jnp.dtype(compute_dtype or _fast_dtype(platform))
        model = model if model.embedding_VD.dtype == self.dtype else jax.jit(lambda m: m.cast(self.dtype))(model)
        stacked = not isinstance(model.layers, tuple)
        self.model = layers_apart(model) if stacked and scan_copies(layout) else model
        self.tokenizer = tokenizer

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        mesh: Mesh | str | None = None,
        dtype: Any = None,
        int8: bool = False,
        form: Form | None = None,
        overrides: Overrides = Overrides(),
    ) -> "Llama":
        """Reads a checkpoint of any form, ready to speak.

        Args:
          path: a run or one of its checkpoints, a Hugging Face or Meta folder, a llama2.c file, or hub:ID.
          mesh: where it lies: a mesh, or its description, such as "auto" or "fsdp=4,tensor=2"; one device if none.
          dtype: of weights, cache and matmuls; if none, float32 on a CPU and bfloat16 elsewhere.
          int8: keep the matrices in 8 bits, half the memory of bfloat16; what that changes is printed.
          form: hf, meta, ours or llama2c; recognised if none.
          overrides: what the files leave out or have wrong.

        Raises:
          UserError: it is not a whole checkpoint, or has no tokenizer.model.
        """
        mesh = make_mesh(mesh) if isinstance(mesh, str) else mesh
        platform = (jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]).platform
        dtype = jnp.dtype(dtype or _fast_dtype(platform))
        model, tokenizer = load_model(path, mesh, dtype, int8=int8, form=form, overrides=overrides)
        if scan_copies(model.embedding_VD.sharding):
            model = layers_apart(model, consume=True)
        return cls(model, tokenizer, dtype)

    def chat(self, system: str | None = None, *, template: Template | None = None, **settings: Any) -> Chat:
        """Begins a conversation, for a model that was trained on dialogues.

        Args:
          system: the system prompt, if any.
          template: the format it was trained with, such as `Plain()` for pairs of prompt and completion; Llama 2's if none.
          **settings: max_new_tokens (here the rest of the context if not given), temperature, top_p, top_k and seed, as in `generate`.

        Raises:
          UserError: a setting out of range, or a system prompt that holds one of the template's tags.
        """
        return Chat(self, template or Llama2Chat(), system, **settings)

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 200,
        temperature: float = 0.6,
        top_p: float = 0.9,
        top_k: int = 0,
        seed: int = 0,
        kept: Kept | None = None,
    ) -> Iterator[str]:
        """Continues one prompt, piece by piece as the tokens come; the pieces joined are what `generate` gives as text.

        A piece never ends inside a character. The prompt is not repeated. Arguments and errors as `generate`; errors are raised at once.
        What stands in `kept` already, from the stream before, is not read again; that changes no more than rounding.
        """
        sampling = checked(Sampling(temperature, top_p, top_k))
        ids = self._ids(prompt)
        chunks = self._draw([ids], [self._budget(ids, max_new_tokens)], sampling, seed, steps=1, kept=kept)
        decoder = self.tokenizer.stream(continues=len(ids) > 1)

        def pieces() -> Iterator[str]:
            for tokens_BT, _ in chunks:
                for token in tokens_BT[0]:
                    if token not in (NO_TOKEN, self.tokenizer.eos_id) and (piece := decoder.push(token)):
                        yield piece
            if piece := decoder.finish():
                yield piece

        return pieces()

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int = 200,
        temperature: float = 0.6,
        top_p: float = 0.9,
        top_k: int = 0,
        seed: int | Sequence[int] = 0,
        samples: int = 1,
    ) -> list[Completion]:
        """Continues a batch of prompts, each until EOS, `max_new_tokens` or the end of the model's context.

        Args:
          prompts: texts, or token ids; each begins with BOS, which is put before it where it is missing. An empty one is BOS alone.
          max_new_tokens: per prompt.
          temperature: divides the logits; 0 takes the likeliest token.
          top_p: draws from the likeliest tokens that together hold this probability; 1 for all.
          top_k: draws from this many likeliest tokens; 0 for all.
          seed: the same seed gives the same texts, and equal prompts get different ones. One seed per text makes each independent of its place.
          samples: continuations of each prompt, side by side in what is returned; a prompt is read once for all of them.

        Raises:
          UserError: a setting out of range, a prompt longer than the context, or an id that is no token.
        """
        sampling = checked(Sampling(temperature, top_p, top_k))
        if samples < 1:
            raise UserError(f"samples is {samples}; it must be 1 or more")
        read = [self._ids(prompt) for prompt in prompts]
        if not read:
            return []
        budgets = [self._budget(ids, max_new_tokens) for ids in read]
        chunks = list(self._draw(read, budgets, sampling, seed, steps=DECODE_CHUNK, samples=samples))
        rows = [ids for ids in read for _ in range(samples)]
        if not chunks:
            return [Completion("", [], [], "length") for _ in rows]
        tokens_BT, log_probs_BT = (np.concatenate(parts, axis=1) for parts in zip(*chunks, strict=True))
        return [self._completion(*row) for row in zip(rows, tokens_BT, log_probs_BT, strict=True)]

    def logprobs(self, texts: Sequence[str | Sequence[int]]) -> list[np.ndarray]:
        """The log-probability, in nats, of each token of each text after its first, given those before it.

        Args:
          texts: texts, or token ids; each begins with BOS, as in `generate`, so that a text of n tokens beside BOS has n log-probabilities.

        Returns:
          a float32 array (n,) per text. It does not depend on the other texts.

        Raises:
          UserError: a text longer than the context (its last token, which is only predicted, is not counted), or an id that is no token.
        """
        rows = [self._ids(text, name="text", beyond=1) for text in texts]
        with self.on_mesh():
            return [log_probs for log_probs, _ in score_tokens(self.model, rows)]

    def score(self, pairs: Sequence[tuple[str, str] | tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """How likely each continuation is after its prompt, as a harness asks that ranks answers.

        Texts are joined and encoded together, because a text's pieces depend on what follows: the continuation's tokens are those of prompt and
        continuation behind as many as the prompt has alone (a token that reaches over the border is the prompt's). White space at the end of a prompt
        is counted to the continuation, since a word's piece begins with its space.

        Args:
          pairs: prompt and continuation, both as text or both as token ids, which are only joined; the prompt begins with BOS, as in `generate`.

        Returns:
          per pair the sum of log-probabilities, the number of tokens, and whether greedy decoding would give them.

        Raises:
          UserError: a pair longer than the context, or an id that is no token. Nothing is cut.
        """
        rows, starts = zip(*map(self._pair_ids, pairs), strict=True) if pairs else ((), ())
        with self.on_mesh():
            scored = score_tokens(self.model, rows)
        scores = []
        for start, (log_probs, is_greedy) in zip(starts, scored, strict=True):
            parts = log_probs[start - 1 :], is_greedy[start - 1 :]
            scores.append(Score(float(parts[0].sum(dtype=np.float64)), len(parts[0]), bool(parts[1].all())))
        return scores

    def _pair_ids(self, pair: tuple) -> tuple[list[int], int]:
        """The tokens of prompt and continuation together, and where the continuation's begin."""
        prompt, continuation = pair
        if isinstance(prompt, str) != isinstance(continuation, str):
            raise UserError("a prompt and its continuation are of two kinds; give both as text or both as token ids")
        if isinstance(prompt, str):
            kept = prompt.rstrip()
            return self._ids(prompt + continuation, name="text", beyond=1), len(self._ids(kept, name="prompt"))
        before = self._ids(prompt, name="prompt")
        return self._ids([*before, *continuation], name="text", beyond=1), len(before)

    def _completion(self, prompt: list[int], tokens_T: np.ndarray, log_probs_T: np.ndarray) -> Completion:
        ids = tokens_T[tokens_T != NO_TOKEN].tolist()
        ended = bool(ids) and ids[-1] == self.tokenizer.eos_id
        ids = ids[:-1] if ended else ids
        decoder = self.tokenizer.stream(continues=len(prompt) > 1)
        text = "".join(map(decoder.push, ids)) + decoder.finish()
        return Completion(text, ids, log_probs_T[: len(ids)].tolist(), "eos" if ended else "length")

    def _ids(self, prompt: str | Sequence[int], *, name: str = "prompt", beyond: int = 0) -> list[int]:
        """The prompt's tokens, BOS first. Raises UserError if they do not fit the vocabulary, or the context and `beyond` tokens more."""
        bos, context = self.tokenizer.bos_id, self.model.config.context_length
        ids = self.tokenizer.encode(prompt, bos=False) if isinstance(prompt, str) else [int(i) for i in prompt]
        if outside := [i for i in ids if not 0 <= i < self.tokenizer.vocab_size]:
            raise UserError(
                f"{name} token {outside[0]} is outside the vocabulary, 0 to {self.tokenizer.vocab_size - 1}"
            )
        ids = ids if ids[:1] == [bos] else [bos, *ids]
        if len(ids) > context + beyond:
            raise UserError(f"the {name} has {len(ids)} tokens and the model's context {context}; shorten the {name}")
        return ids

    def _budget(self, prompt: list[int], max_new_tokens: int) -> int:
        if max_new_tokens < 0:
            raise UserError(f"--max-new-tokens is {max_new_tokens}; it must be 0 or more")
        return min(max_new_tokens, self.model.config.context_length - len(prompt))

    def _draw(
        self,
        prompts: list[list[int]],
        budgets: list[int],
        sampling: Sampling,
        seed: int | Sequence[int],
        steps: int,
        kept: Kept | None = None,
        samples: int = 1,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens and log-probabilities (B, up to `steps`) as they are drawn; `NO_TOKEN` behind a row's end, which EOS is the last token before."""
        B, most = len(prompts) * samples, max(budgets)
        if most == 0:
            return
        with self.on_mesh():
            spare = -len(prompts) % ways("batch")  # rows that only make the batch divide over the mesh
            key_B = row_keys(*_seeds(seed, B, spare * samples))
            kept = kept if B + spare == 1 else None
            cache, logits_BV = self.read([*prompts, *[[]] * spare], max(map(len, prompts)) + most, kept)
            if samples > 1:
                cache, logits_BV = repeat(cache, logits_BV, samples)
            left_B = np.repeat(np.array(budgets + [0] * spare, np.int32), samples)
            state, token_B, log_prob_B = begin(logits_BV, cache, left_B, key_B, sampling, eos_id=self.tokenizer.eos_id)
        ready, drawn = (token_B[:, None], log_prob_B[:, None]), 1
        ended_B = left_B[:B] == 0
        seen = list(prompts[0])
        try:
            while ready is not None:
                following = None
                if drawn < most:
                    # Dispatched before the last tokens are looked at, so that the device does not wait for the host; once all
                    # rows have ended it returns at once.
                    with self.on_mesh():
                        state, *following = decode(self.model, state, sampling, self.tokenizer.eos_id, steps)
                    drawn += steps
                tokens_BT, log_probs_BT = (np.asarray(x)[:B] for x in ready)
                seen += tokens_BT[0].tolist()
                yield tokens_BT, log_probs_BT
                ended_B |= ((tokens_BT == NO_TOKEN) | (tokens_BT == self.tokenizer.eos_id)).any(-1)
                ready = None if ended_B.all() else following
        finally:  # also where the reader stops
            if kept is not None:
                kept.put(seen, state.cache)

    def read(self, prompts: list[list[int]], room: int, kept: Kept | None = None) -> tuple[Cache, jax.Array]:
        """The prompts in a cache with `room` slots or more, and the logits (B, V) behind each prompt's last token.

        Args:
          prompts: token ids, as many as divide over the mesh, which is the ambient one; an empty row's logits mean nothing.
          room: tokens that a row shall hold, at most the model's context.
          kept: the cache of a single row, whose tokens are not read again.
        """
        cache, known = kept.take(prompts[0]) if kept is not None else (None, 0)
        slots = min(slots_for(room), self.model.config.context_length)
        if cache is None:
            known, rows = _shared(prompts), ways("batch")
            if known < SHARED_TOKENS or len(prompts) <= rows:
                known, rows = 0, len(prompts)
            apart = isinstance(self.model.layers, tuple)
            cache = init_cache(self.model.config, rows, slots, self.dtype, apart)
            if known:
                longest = max(prompts, key=len)
                cache, logits_BV = self._read_on(cache, [longest[:known]] * rows)
                cache, _ = repeat(cache, logits_BV, len(prompts) // rows)
        elif cache.slots < slots:
            cache = widen(cache, slots)
        return self._read_on(cache, [ids[known:] for ids in prompts])

    def _read_on(self, cache: Cache, prompts: list[list[int]]) -> tuple[Cache, jax.Array]:
        """`read`, of what stands behind the tokens in the cache."""
        longest = max(map(len, prompts))
        chunks = -(-longest // PREFILL_CHUNK)
        T = min(rounded_up(-(-longest // chunks), least=16), PREFILL_CHUNK)  # equal chunks, lest the last be padding
        logits_BV = None
        for start in range(0, longest, T):
            pieces = [ids[start : start + T] for ids in prompts]
            count_B = np.array([len(ids) for ids in pieces], np.int32)
            tokens_BT = np.array([ids + [0] * (T - len(ids)) for ids in pieces], np.int32)
            cache, new_BV = prefill(self.model, tokens_BT, count_B, cache)
            logits_BV = new_BV if logits_BV is None else jnp.where(count_B[:, None] > 0, new_BV, logits_BV)
        return cache, logits_BV

    def on_mesh(self) -> AbstractContextManager:
        """The mesh that the model lies on as the ambient one, if it lies on one."""
        return nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)


def _shared(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with, each with one more behind them; rows without a prompt aside."""
    prompts = [ids for ids in prompts if ids]
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # in the order of tokens: what these two share, all do
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)


def _fast_dtype(platform: str) -> Any:
    return jnp.float32 if platform == "cpu" else jnp.bfloat16


def _seeds(seed: int | Sequence[int], rows: int, spare: int) -> tuple[np.ndarray, np.ndarray]:
    """A seed and a row number for every row: one seed for all told apart by their number, or a seed each and number 0."""
    if isinstance(seed, int):
        seeds, numbers = [seed] * rows, range(rows)
    elif len(seed) == rows:
        seeds, numbers = list(seed), [0] * rows
    else:
        raise UserError(f"{len(seed)} seeds for {rows} texts; expected one for all or one for each")
    low_bits = [s & 0xFFFFFFFF for s in [*seeds, *[0] * spare]]
    return np.array(low_bits, np.uint32), np.array([*numbers, *[0] * spare], np.uint32)


def checked(sampling: Sampling) -> Sampling:
    """The same settings as numbers of their types. Raises UserError for one that is out of range."""
    if not 0 <= sampling.temperature < float("inf"):
        raise UserError(f"--temperature is {sampling.temperature}; it must be 0 (the likeliest token) or more")
    if not 0 <= sampling.top_p <= 1:
        raise UserError(f"--top-p is {sampling.top_p}; it is a probability, from 0 to 1 (all tokens)")
    if sampling.top_k < 0:
        raise UserError(f"--top-k is {sampling.top_k}; it must be 0 (all tokens) or more")
    return Sampling(float(sampling.temperature), float(sampling.top_p), int(sampling.top_k))
