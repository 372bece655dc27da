"""A small tokenizer and the same documents behind every kind of source."""

import gzip
import importlib
import json
import random

import pytest
import zstandard

from llama_jax.data.documents import tokenize
from llama_jax.text.tokenizer import Tokenizer

WORDS = (
    *(
        "the",
        "plain",
        "rain",
        "in",
        "spain",
        "stays",
        "mainly",
        "on",
        "every",
        "quick",
        "brown",
        "fox",
        "and",
        "lazy",
        "dog",
    ),
    *("of", "1984", "héllo", "wörld"),
)


def make_texts(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [
        f"{number}: " + " ".join(generator.choices(WORDS, k=generator.randint(1, 16))) + "\n" for number in range(count)
    ]


TEXTS = make_texts(120)


@pytest.fixture(scope="session")
def texts():
    """120 documents of one line each."""
    return TEXTS


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return Tokenizer.train(TEXTS, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", vocab_size=330)


@pytest.fixture(scope="session")
def specs(tmp_path_factory, tokenizer):
    """The same 120 texts as each kind of source, by name."""
    folder = tmp_path_factory.mktemp("sources")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_JAX_CACHE", str(folder / "cache"))
        patch.setenv("TFDS_DATA_DIR", str(folder / "tfds"))
        (folder / "documents.txt").write_text("<|endoftext|>\n".join(TEXTS))
        lines = "".join(
            json.dumps({"text": text, "number": number}) + "\n" for number, text in enumerate(TEXTS)
        ).encode()
        (folder / "documents.jsonl").write_bytes(lines)
        (folder / "packed.jsonl.gz").write_bytes(gzip.compress(lines))
        (folder / "packed.jsonl.zst").write_bytes(zstandard.compress(lines))
        build_tfds(folder / "tfds")
        text = f"text:{folder}/documents.txt"
        tokenize((text,), tokenizer, folder / "shards", shard_tokens=700, say=lambda line: None)
        yield {
            "text": text,
            "jsonl": f"jsonl:{folder}/documents.jsonl",
            "gz": f"jsonl:{folder}/packed.jsonl.gz",
            "zst": f"jsonl:{folder}/packed.jsonl.zst",
            "tfds": "tfds:rainy_plains",
            "tokens": f"tokens:{folder}/shards",
        }


def build_tfds(data_dir, name: str = "rainy_plains", file_format: str = "array_record"):
    """Prepares the texts as a user's own script would; afterwards no code knows of the data set, only its folder."""
    tfds = importlib.import_module("tensorflow_datasets")

    class RainyPlains(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = data_dir

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()})
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(TEXTS), "test": self._generate_examples(TEXTS[:3])}

        def _generate_examples(self, texts):
            for number, text in enumerate(texts):
                yield number, {"text": text}

    RainyPlains.name = name
    builder = RainyPlains(data_dir=data_dir, file_format=file_format)
    config = tfds.download.DownloadConfig(download_mode=tfds.GenerateMode.REUSE_DATASET_IF_EXISTS)
    builder.download_and_prepare(download_config=config)
    return builder
