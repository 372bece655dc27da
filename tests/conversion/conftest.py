"""A tokenizer of the size that the small checkpoints have."""

import pytest

from tests.conversion.checkpoints import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> bytes:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))
