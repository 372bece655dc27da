"""Bits per byte of compressors: texts whose answer is known."""

import numpy as np
import pytest

from llama_jax.evaluation.compression import compressor_bits_per_byte


def test_noise_takes_eight_bits_and_repetition_next_to_none():
    noise = np.random.default_rng(0).bytes(200_000)
    assert list(compressor_bits_per_byte(noise).values()) == pytest.approx([8, 8], abs=0.01)
    assert max(compressor_bits_per_byte(b"llama " * 40_000).values()) < 0.05


def test_four_letters_at_random_take_two_bits():
    letters = np.random.default_rng(0).choice(list(b"acgt"), 400_000).astype(np.uint8).tobytes()
    assert all(2 <= bits < 2.4 for bits in compressor_bits_per_byte(letters).values())
