"""The recipes for fine-tuning: their example data is read whole and keeps its own rules (tests/test_readme.py runs them)."""

import doctest
import re
from collections import Counter
from pathlib import Path

import pytest

from llama_jax.data.dialogues import Skipped, detect_shape, open_rows, read_dialogues
from llama_jax.data.examples import load_examples
from llama_jax.recipes import load_recipe
from llama_jax.stages import sft
from llama_jax.text.chat import Dialogue, Llama2Chat, Plain
from llama_jax.text.tokenizer import Tokenizer

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SHAPES = {
    "domain_qa": "prompt",
    "style": "messages",
    "classification": "instruction",
    "summarisation": "transcript",
    "code": "messages",
}


def recipe(name: str) -> sft.SFTConfig:
    return load_recipe(str(EXPERIMENTS / f"sft_{name}.py"), sft.SFTConfig)


def dialogues(name: str) -> list[Dialogue]:
    """The rows of a recipe's example, none of which may be left out."""
    (source,) = recipe(name).data.sources
    assert Path(source) == EXPERIMENTS / "data" / f"{name}.jsonl"
    rows, skipped = open_rows(source), Skipped()
    shape = detect_shape(rows, source)
    assert shape.name == SHAPES[name]
    read = list(read_dialogues(rows, shape, Llama2Chat(), skipped))
    assert len(read) == len(rows) and not skipped.count
    return read


def answers(name: str) -> list[str]:
    return [message.content for dialogue in dialogues(name) for message in dialogue if message.role == "assistant"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """A small one, which takes more tokens than Llama 2's."""
    texts = [path.read_text() for path in sorted((EXPERIMENTS / "data").glob("*.jsonl"))]
    return Tokenizer.train(texts, tmp_path_factory.mktemp("tokenizer") / "t.model", vocab_size=800)


def test_there_is_a_recipe_for_each_example():
    assert {path.stem for path in EXPERIMENTS.glob("sft_*.py")} == {f"sft_{name}" for name in SHAPES}


@pytest.mark.parametrize("name", SHAPES)
def test_an_example_has_20_to_40_different_rows(name):
    read = dialogues(name)
    assert 20 <= len(read) <= 40 and len(set(read)) == len(read)
    questions = [next(message.content for message in dialogue if message.role == "user") for dialogue in read]
    assert len(set(questions)) == len(questions)


@pytest.mark.parametrize("name", SHAPES)
def test_every_row_fits_and_some_are_held_out(name, tokenizer):
    config = recipe(name)
    template = Plain() if config.plain else Llama2Chat()
    loaded = load_examples(config.data, tokenizer, template, config.length)
    assert not loaded.too_long and not loaded.shortened and len(loaded.held_out) >= 1
    assert len(loaded.train) + len(loaded.held_out) == len(dialogues(name))


@pytest.mark.parametrize("name", SHAPES)
def test_a_recipe_fits_16_gb_as_far_as_that_was_planned(name):
    """So many tokens at once, in such bits, as a 7B's step was planned with for a T4; each recipe says what it takes."""
    config = recipe(name)
    assert config.train == "lora" and config.nf4 != config.int8
    tokens_at_once = config.rows // config.micro_batches * config.length
    assert config.rows % config.micro_batches == 0 and tokens_at_once <= (4096 if config.nf4 else 1024)


def test_style_keeps_its_rule_in_every_answer():
    for dialogue in dialogues("style"):
        assert dialogue[0].role == "system" and "close with: Fair winds." in dialogue[0].content
    for answer in answers("style"):
        said, _, rest = answer.partition("Fair winds.")
        assert not rest and 1 <= len(re.findall(r"[.!?](?= |$)", said.strip())) <= 2, answer


def test_labels_are_equally_many_and_named_in_the_instruction():
    labels = Counter(answers("classification"))
    assert labels == dict.fromkeys(("billing", "delivery", "defect", "account"), 10)
    for dialogue in dialogues("classification"):
        assert all(label in dialogue[0].content.split("\n\n")[0] for label in labels)


def test_summaries_are_short_and_have_no_number_that_the_text_has_not():
    for question, summary in dialogues("summarisation"):
        assert len(summary.content.split()) < len(question.content.split()) / 2
        assert set(re.findall(r"\d+", summary.content)) <= set(re.findall(r"\d+", question.content)), summary


def test_some_questions_have_no_answer_in_the_handbook():
    unanswered = [answer for answer in answers("domain_qa") if answer.startswith("The handbook does not say.")]
    assert len(unanswered) >= 3 and len(set(unanswered)) == 1


def test_the_code_passes_its_own_tests():
    for answer in answers("code"):
        (code,) = re.findall(r"^```python\n(.*?)^```", answer, re.M | re.S)
        names: dict = {}
        texts = [code]
        if not code.startswith(">>>"):
            exec(code, names)
            texts = [value.__doc__ for value in names.values() if hasattr(value, "__code__")]
        (test,) = (doctest.DocTestParser().get_doctest(text, names, "answer", None, 0) for text in texts)
        assert test.examples and not doctest.DocTestRunner(verbose=False).run(test).failed, answer
