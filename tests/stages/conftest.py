"""A corpus and its tokenizer, made once; and who speaks in a model's place."""

import pytest

from llama_jax.data.pipeline import DataConfig, training_documents
from llama_jax.generation.llama import Llama
from llama_jax.text.tokenizer import Tokenizer
from tests.stages.runs import write_corpus
from tests.stages.speaker import Speaker


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.txt")


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory, corpus):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    Tokenizer.train(training_documents(DataConfig(sources=(f"text:{corpus}",))), path, vocab_size=304)
    return path


@pytest.fixture
def speak(base, monkeypatch):
    """Lets a speaker take the place of the module's model, and gives it."""

    def use(*arguments, **options) -> Speaker:
        speaker = Speaker(base, *arguments, **options)
        monkeypatch.setattr(Llama, "load", lambda *_, **__: speaker)
        return speaker

    return use
