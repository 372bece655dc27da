"""Tokens per second on one core: packing pre-tokenised shards, and tokenising on the fly.

    python bench/data.py
    python bench/data.py --text "text:corpus/*.txt" --vocab-size 32000 --repeats 9

Each is printed beside a limit that is measured in the same, interleaved run: copying the same ids from the memory
map into int32, and SentencePiece's own encoding of the same texts. Times are of one process without workers or
prefetching, in CPU seconds, so that other programs disturb them little; the median of the repeats counts.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor

from llama_jax.data.documents import tokenize
from llama_jax.data.packing import pack
from llama_jax.data.pipeline import DataConfig, make_batches
from llama_jax.data.python_corpus import write_python_corpus
from llama_jax.data.sources import open_source
from llama_jax.text.tokenizer import Tokenizer

ROWS, LENGTH = 16, 4096


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="a data source; by default the text that Python itself carries (10 MB)")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print the numbers as one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(options, Path(folder))
    if options.json:
        print(json.dumps(results))
        return
    tokens_per_document = results.pop("tokens per document")
    print(f"{tokens_per_document:.0f} tokens per document on average, rows of {LENGTH}, one core")
    for name, (rate, limit, limit_name) in results.items():
        print(f"{name:46} {rate / 1e6:8.2f} M tokens/s   {rate / limit:5.2f} of {limit_name} ({limit / 1e6:.2f})")


def measure(options: argparse.Namespace, folder: Path) -> dict:
    """Gives for each way of reading (tokens per CPU second, those of its limit, the limit's name)."""
    text = options.text or f"jsonl:{write_python_corpus(folder / 'python.jsonl').path}"
    documents = open_source(text, None)
    texts = [documents[index] for index in range(min(len(documents), 2000))]
    tokenizer = Tokenizer.train(texts, folder / "tokenizer.model", options.vocab_size)
    tokenize((text,), tokenizer, folder / "shards", say=lambda line: None)
    shards = open_source(f"tokens:{folder}/shards", tokenizer)
    arrays = [shards[index] for index in range(len(shards))]
    ids = np.load(folder / "shards" / "00000.tokens.npy", mmap_mode="r")
    processor = SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    encoded = sum(len(processor.encode(text)) + 2 for text in texts)
    batches = max(1, encoded // (ROWS * LENGTH))

    def from_source(spec: str) -> int:
        config = DataConfig(sources=(spec,), held_out=0, prefetch=0)
        stream = make_batches(config, tokenizer, rows=ROWS, length=LENGTH, seed=0)
        return sum(batch.tokens_BT.size for batch, _ in itertools.islice(stream, batches))

    def packing() -> int:
        stream = pack(iter(arrays), rows=ROWS, length=LENGTH, own_rows=range(ROWS))
        return sum(batch.tokens_BT.size for batch, _ in stream)

    def copying() -> int:
        rows = range(0, len(ids), ROWS * LENGTH)
        return sum(ids[first : first + ROWS * LENGTH].astype(np.int32).size for first in rows)

    ways: dict[str, Callable[[], int]] = {
        "packing documents": packing,
        "shards to batches (shuffled, packed)": lambda: from_source(f"tokens:{folder}/shards"),
        "text to batches (tokenised, shuffled, packed)": lambda: from_source(text),
        "copying": copying,
        "encoding": lambda: sum(len(processor.encode(text)) + 2 for text in texts),
    }
    rates = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, way in ways.items():
            started = time.process_time()
            tokens = way()
            rates[name].append(tokens / (time.process_time() - started))
    median = {name: statistics.median(values) for name, values in rates.items()}
    limits = {"encoding": "SentencePiece alone", "copying": "copying the ids"}
    compared = dict(zip(ways, ("copying", "copying", "encoding"), strict=False))
    return {"tokens per document": sum(map(len, arrays)) / len(arrays)} | {
        name: (median[name], median[limit], limits[limit]) for name, limit in compared.items()
    }


if __name__ == "__main__":
    main()
