"""A model that others trained speaks as they published it."""

import json

import jax
import numpy as np
import pytest

from llama_jax.config import Compute
from llama_jax.generation.engine import Engine
from llama_jax.text.tokenizer import Tokenizer
from tests.stories260k import FOLDER, load_stories260k


@pytest.fixture(scope="module")
def model(shared):
    return load_stories260k(shared)


@pytest.fixture(scope="module")
def engine(shared, model):
    return Engine(model, Tokenizer.load(shared / FOLDER))


def test_logits_are_those_of_the_float32_weights(shared, model):
    """Within 0.017, which is what storing the weights as float16 costs."""
    golden = np.load(shared / "golden_stories260K.npz")
    run = jax.jit(lambda model, tokens_BT: model(tokens_BT, compute=Compute(dtype="float32", remat="none")))
    assert np.abs(np.asarray(run(model, golden["ids"][None]))[0] - golden["logits_f64"]).max() < 0.017


def test_greedy_text_is_the_published_one(shared, engine):
    published = json.loads((shared / "karpathy_expected_greedy.json").read_text())
    completion = engine.generate([""], temperature=0, max_new_tokens=published["max_new_tokens"])[0]
    assert published["prompt_ids"] + completion.ids == published["expected_ids"]
    assert completion.text == published["expected_text"]
    assert "".join(engine.stream("", temperature=0, max_new_tokens=200)) == published["expected_text"]
