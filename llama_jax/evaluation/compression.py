"""What general-purpose compressors make of a text: the yardstick beside a model's bits per byte."""

import gzip
import lzma


def compressor_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits per byte of the whole text under `gzip -9` and `xz -9`, headers included.

    A model's bits per byte are an ideal arithmetic coder's, and do not count the model itself; a compressor starts
    from nothing and learns from the text it compresses. The comparison says what was learnt beforehand.
    """
    return {
        "gzip -9": 8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text),
        "xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }
