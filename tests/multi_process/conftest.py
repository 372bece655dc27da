"""The stages' corpus and cache serve here too."""

from tests.stages.conftest import cache, corpus, tokenizer_file  # noqa: F401
