"""The stages' corpus serves here too."""

from tests.stages.conftest import corpus, tokenizer_file  # noqa: F401
