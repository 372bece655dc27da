"""A corpus, its tokenizer and a folder of compiled programs, made once."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from llama_jax.data.pipeline import DataConfig, training_documents
from llama_jax.text.tokenizer import Tokenizer
from tests.stages.runs import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.txt")


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory, corpus):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    Tokenizer.train(training_documents(DataConfig(sources=(f"text:{corpus}",))), path, vocab_size=304)
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A folder for compiled programs, so that the many runs of one recipe compile it once."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def compiled_once(cache):
    """Keeps what this process compiles in `cache`."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(cache), 0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
