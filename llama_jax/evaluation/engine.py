"""What every benchmark asks of a model: how likely choices are, and how it continues a text (paper 2.3, 4.1 and A.2.2).

Answers are written down as they come, so that an evaluation that was interrupted asks only what it does not know yet. A prompt
that is too long loses its beginning, as in lm-eval, and is counted.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from llama_jax.errors import Preempted, UserError
from llama_jax.generation.cache import slots_for
from llama_jax.generation.choices import score_choices
from llama_jax.generation.llama import Llama, checked
from llama_jax.generation.rollouts import draw
from llama_jax.generation.sampler import Sampling
from llama_jax.generation.scoring import Score
from llama_jax.training.preemption import StopSignal
from llama_jax.training.run_folder import digest_of

ANSWERS = "answers.jsonl"
GREEDY = Sampling(0.0, 1.0, 0)


class Answers:
    """Answers by what was asked, in a file that grows by a line an answer; a line that was half written is asked again."""

    def __init__(self, path: Path | None):
        """Opens the file, which need not be there; without one, answers are kept in memory alone.

        Raises:
          UserError: the file holds something else than answers.
        """
        self._known: dict[str, Any] = {}
        self._file = None
        if path is None:
            return
        whole = 0
        if path.exists():
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            try:
                self._known = {row["asked"]: row["answer"] for row in map(json.loads, content[:whole].splitlines())}
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} holds no answers ({error}); remove it, or name another --out") from error
        if jax.process_index() == 0:
            self._file = path.open("ab")
            self._file.truncate(whole)

    def __contains__(self, asked: str) -> bool:
        return asked in self._known

    def __getitem__(self, asked: str) -> Any:
        return self._known[asked]

    def __len__(self) -> int:
        return len(self._known)

    def put(self, asked: str, answer: Any) -> None:
        """Keeps an answer, in the file too."""
        self._known[asked] = answer
        if self._file is not None:
            self._file.write((json.dumps({"asked": asked, "answer": answer}) + "\n").encode())
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


class Engine:
    """A model that is asked many things at once; every process of a run asks the same."""

    def __init__(self, llama: Llama, answers: Answers, *, rows: int = 16, seed: int = 0):
        """Wraps a model.

        Args:
          llama: the model.
          answers: what it has answered before, and where new answers go.
          rows: texts under way at once.
          seed: of what is drawn at a temperature above 0.

        Raises:
          UserError: there are no rows.
        """
        if rows < 1:
            raise UserError(f"--rows is {rows}; it must be 1 or more")
        self.llama = llama
        self.seed = seed
        self.truncated: set[str] = set()
        """What was asked with a prompt that lost its beginning."""
        self._answers, self._rows = answers, rows

    @property
    def context(self) -> int:
        """Tokens of prompt and continuation together at most."""
        return self.llama.model.config.context_length

    def score(
        self, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[int]], what: str = "scoring"
    ) -> list[Score]:
        """How likely each choice is behind its prompt; choices of equal prompts share the reading of it.

        Args:
          prompts: token ids; of a prompt and a choice the last `context` + 1 tokens are read.
          choices: token ids, at least one each, and no more than the context.
          what: for the line that shows progress.

        Raises:
          UserError: a choice is empty or longer than the context.
          Preempted: told to stop; what is known is in the file.
        """
        asked, wanted = [], {}
        for prompt, choice in zip(prompts, choices, strict=True):
            if not 0 < len(choice) <= self.context:
                raise UserError(
                    f"a text to score has {len(choice)} tokens; expected 1 to the model's context, {self.context}"
                )
            kept = tuple(prompt[max(0, len(prompt) + len(choice) - self.context - 1) :])
            key = digest_of(["score", kept, list(choice)])
            asked.append(key)
            if len(kept) < len(prompt):
                self.truncated.add(key)
            if key not in self._answers:
                wanted.setdefault(kept, {})[tuple(choice)] = key
        groups = list(wanted.items())

        with self._asking(what, set(asked)) as put:

            def keep(number: int, scores: list[Score]) -> None:
                for key, score in zip(groups[number][1].values(), scores, strict=True):
                    put(key, score)

            score_choices(self.llama, [prompt for prompt, _ in groups], [list(of) for _, of in groups], on_score=keep)
        return [Score(*self._answers[key]) for key in asked]

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stops: Sequence[str] = (),
        sampling: Sampling = GREEDY,
        what: str = "generating",
    ) -> list[str]:
        """Continues each prompt until EOS, a stop, or `max_new_tokens`; a stop is not part of what is given.

        Args:
          prompts: token ids, one or more each; of a longer one the last tokens that leave room for the answer are read. Equal
            ones get different answers where anything is drawn.
          max_new_tokens: of an answer.
          stops: texts that end an answer.
          sampling: how to draw.
          what: for the line that shows progress.

        Raises:
          UserError: `max_new_tokens` leaves no room for a prompt, or a setting is out of range.
          Preempted: told to stop; what is known is in the file.
        """
        sampling, room = checked(sampling), self.context - max_new_tokens
        if max_new_tokens < 1:
            raise UserError(f"answers of {max_new_tokens} tokens are asked for; it must be 1 or more")
        if room < 1:
            raise UserError(
                f"answers of {max_new_tokens} tokens in a context of {self.context} leave no room for a prompt; "
                "take a model with a longer context, or leave such a task out with --tasks"
            )
        settings = [max_new_tokens, list(stops), *map(float, sampling), self.seed]
        asked, read, times = [], {}, {}
        for prompt in prompts:
            kept = tuple(prompt[-room:])
            times[kept] = times.get(kept, -1) + 1
            key = digest_of(["complete", kept, settings, times[kept] if sampling.temperature > 0 else 0])
            asked.append(key)
            if len(kept) < len(prompt):
                self.truncated.add(key)
            if key not in self._answers:
                read[key] = list(kept)
        with self._asking(what, set(asked)) as put:
            for key, text in self._drawn(read, max_new_tokens, stops, sampling):
                put(key, text)
        return [self._answers[key] for key in asked]

    @contextmanager
    def _asking(self, what: str, asked: set[str]) -> Iterator[Callable[[str, Any], None]]:
        """Gives the function that keeps an answer, shows how many there are, and stops where the process is told to."""
        known = sum(key in self._answers for key in asked)
        shown = tqdm(
            total=len(asked),
            initial=known,
            desc=what,
            unit="request",
            mininterval=0.2 if sys.stderr.isatty() else 30,
            disable=jax.process_index() > 0 or known == len(asked),
        )

        def put(key: str, answer: Any) -> None:
            self._answers.put(key, answer)
            shown.update()
            if name := stop.received(len(self._answers)):
                raise Preempted(f"{name} received: {len(self._answers)} answers are kept; start it again to go on")

        with shown, StopSignal() as stop:
            yield put

    def _drawn(
        self, prompts: dict[str, list[int]], max_new_tokens: int, stops: Sequence[str], sampling: Sampling
    ) -> Iterator[tuple[str, str]]:
        """Each answer with its key as soon as it is whole; prompts of like length share a cache, the longest first."""
        by_slots: dict[int, list[str]] = {}
        for key, ids in prompts.items():
            slots = min(slots_for(len(ids) + max_new_tokens), self.context)
            by_slots.setdefault(slots, []).append(key)
        for slots, keys in sorted(by_slots.items(), reverse=True):
            keys.sort(key=lambda key: -len(prompts[key]))
            ids = [prompts[key] for key in keys]
            seeds = [int(key[:8], 16) for key in keys]
            budgets = [max_new_tokens] * len(keys)
            rollouts = draw(
                self.llama,
                ids,
                seeds,
                budgets,
                sampling,
                self._rows,
                slots,
                is_whole=lambda _, drawn: _before(self._text(drawn), stops) is not None,
                steps=16,
            )
            for number, rollout in rollouts:
                text = self._text(rollout.ids[:-1] if rollout.ended else rollout.ids)
                cut = _before(text, stops)
                yield keys[number], text if cut is None else cut

    def _text(self, ids: Sequence[int]) -> str:
        decoder = self.llama.tokenizer.stream(continues=True)
        return "".join(map(decoder.push, ids)) + decoder.finish()


def _before(text: str, stops: Sequence[str]) -> str | None:
    """The text before the first of the stops in it; None where there is none."""
    ends = [end for stop in stops if stop and (end := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else None
