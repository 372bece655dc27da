"""Our engine behind lm-eval's tasks, so that the paper's benchmarks are those that everybody runs (paper 2.3).

Tokens are as lm-eval has them of a Hugging Face Llama: BOS, then prompt and continuation encoded together and parted where the
prompt's own tokens end. What is generated keeps the space before its first word, which decoding in Hugging Face drops.
"""

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llama_jax.errors import UserError
from llama_jax.evaluation.engine import Engine
from llama_jax.generation.sampler import Sampling
from llama_jax.text.chat import Message, Template, encode_prompt

KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


class HarnessModel(TemplateLM):
    """A model as lm-eval asks it."""

    def __init__(self, engine: Engine, template: Template | None = None):
        """Wraps an engine.

        Args:
          engine: asks the model.
          template: the chat format that prompts are put in; plain text if none.
        """
        super().__init__()
        self._engine, self._template = engine, template
        self._tokenizer = engine.llama.tokenizer
        self._encoded: dict[str, list[int]] = {}

    @property
    def eot_token_id(self) -> int:
        """EOS."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """BOS, which stands before a text without a prompt."""
        return self._tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """The model's context."""
        return self._engine.context

    @property
    def tokenizer_name(self) -> str:
        """Tells apart what lm-eval keeps of two chat formats."""
        return type(self._template).__name__

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text, BOS first unless told otherwise; a dialogue's as its format has them."""
        if self._template is not None and add_special_tokens is not False:
            return self._of_dialogue(string)
        return self._tokenizer.encode(string, bos=add_special_tokens is not False)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A text that stands for the dialogue; `tok_encode` knows its tokens, which no text has."""
        text = "\n".join(f"{turn['role']}: {turn['content']}" for turn in chat_history)
        messages = [Message(turn["role"], turn["content"]) for turn in chat_history]
        behind = messages.pop().text if messages[-1].role == "assistant" else ""  # an answer that is begun
        ids = encode_prompt(self._tokenizer, messages, self._template)
        self._encoded[text] = ids + (self._tokenizer.encode(behind, bos=False) if behind else [])
        return text

    def _of_dialogue(self, string: str) -> list[int]:
        """A dialogue's tokens, and behind them those of the text that follows it."""
        for end in range(len(string), -1, -1):
            if string[:end] in self._encoded:
                rest = string[end:]
                return self._encoded[string[:end]] + (self._tokenizer.encode(rest, bos=False) if rest else [])
        return self._tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood and greediness of each continuation behind its context, both as token ids."""
        scores = self._engine.score([request[1] for request in requests], [request[2] for request in requests])
        return [(score.log_prob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of the context; BOS is given and not predicted."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self._tokenizer.encode(request.args[0], bos=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append(make_disjoint_window(window))
                owners.append(number)
        scores = self._engine.score([before for before, _ in windows], [text for _, text in windows])
        sums = [0.0] * len(requests)
        for number, score in zip(owners, scores, strict=True):
            sums[number] += score.log_prob
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each prompt, up to the first of the request's stops.

        Raises:
          UserError: a task asks for a setting that our sampler does not have.
        """
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        for numbers in groups.values():
            settings = normalize_gen_kwargs(requests[numbers[0]].args[1])
            if unknown := settings.keys() - KNOWN:
                raise UserError(
                    f"a task generates with {', '.join(sorted(unknown))}; known are {', '.join(sorted(KNOWN))}"
                )
            drawn = self._engine.complete(
                [self.tok_encode(requests[number].args[0]) for number in numbers],
                max_new_tokens=settings["max_gen_toks"],
                stops=settings["until"],
                sampling=Sampling(settings["temperature"], settings.get("top_p", 1.0), settings.get("top_k", 0)),
            )
            for number, text in zip(numbers, drawn, strict=True):
                texts[number] = text
        return texts
