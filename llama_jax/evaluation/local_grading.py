"""How benchmarks in files are asked and graded: lm-eval's kinds of output, and when an answer that was written is right."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]


def _acc(*more: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", *more)]


def _squashed(text: str) -> str:
    """An answer as SQuAD's metric compares it: without case, punctuation, articles and doubled spaces."""
    text = "".join(character for character in text.lower() if character not in PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


PUNCTUATION = set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


def _one_of(doc: Row, results: list[str]) -> dict[str, float]:
    """Exact match with any of the answers."""
    return {"exact_match": float(_squashed(results[0]) in map(_squashed, doc["answers"]))}


def _shared_words(doc: Row, results: list[str]) -> dict[str, float]:
    """SQuAD's F1 of the words, with the answer that shares the most."""
    return {"f1": max(_f1(_squashed(results[0]).split(), _squashed(answer).split()) for answer in doc["answers"])}


def _f1(given: list[str], wanted: list[str]) -> float:
    if not given or not wanted:
        return float(given == wanted)
    return 2 * sum((Counter(given) & Counter(wanted)).values()) / (len(given) + len(wanted))


def _number_is(doc: Row, results: list[str]) -> dict[str, float]:
    """The last number that was written is the answer."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", results[0])
    given, wanted = (text.replace(",", "") for text in (found[-1] if found else "", doc["answers"][0]))
    return {"exact_match": float(bool(given) and float(given) == float(wanted))}


def _boxed_is(doc: Row, results: list[str]) -> dict[str, float]:
    """What stands in the last box, or behind the last "answer is", is the answer, spaces aside."""
    found = boxed(results[0]) or (re.findall(r"answer is:?\s*(.+?)(?:\.\s|\.?$)", results[0]) or [""])[-1]
    given, wanted = ("".join(text.replace("$", "").split()) for text in (found, doc["answers"][0]))
    return {"exact_match": float(given == wanted)}


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} in a text; None where there is none."""
    start = text.rfind("\\boxed{")
    depth, begin = 1, start + len("\\boxed{")
    for end in range(begin, len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin:end]
    return None


def _answers_with(process: Callable, stops: list[str], tokens: int, metric: str = "exact_match") -> dict[str, Any]:
    return {
        "output_type": "generate_until",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": stops, "max_gen_toks": tokens, "do_sample": False},
        "process_results": process,
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
    }


KINDS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": lambda doc: doc["choices"],
        "doc_to_target": lambda doc: doc["gold"],
        "metric_list": _acc("acc_norm"),
    },
    "beginnings": {
        "output_type": "multiple_choice",
        "doc_to_text": lambda doc: doc["gold"],
        "doc_to_choice": lambda doc: doc["beginnings"],
        "doc_to_target": lambda doc: doc["ending"],
        "metric_list": _acc(),
        "target_delimiter": "",
    },
    "answer": _answers_with(_one_of, ["\n"], 32),
    "words": _answers_with(_shared_words, ["\n"], 64, "f1"),
    "number": _answers_with(_number_is, ["Q:", "\n\n"], 256),
    "boxed": _answers_with(_boxed_is, ["Problem:"], 512),
    "last word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{query}}",
        "doc_to_target": lambda doc: doc["ending"],
        "metric_list": _acc(),
        "target_delimiter": "",
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": name, "aggregation": how, "higher_is_better": False}
            for name, how in (("word_perplexity", "weighted_perplexity"), ("bits_per_byte", "bits_per_byte"))
        ],
    },
}
