"""The verb that looks for evaluation samples in a training corpus: contamination."""

import json
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated

from tyro.conf import arg

from llama_jax.errors import UserError
from llama_jax.verbs.arguments import Json, call


def contamination(argv: Sequence[str]) -> None:
    """See llama_jax.evaluation.contamination."""

    def run(
        samples: Annotated[str, arg(metavar="SAMPLES.jsonl")],
        /,
        *,
        corpus: Annotated[tuple[str, ...], arg(metavar="SOURCE...")],
        tokenizer: str,
        out: str,
        scores: Annotated[tuple[str, ...], arg(metavar="FILE...")] = (),
        workers: int = 0,
        beam: str | None = None,
        as_json: Json = False,
    ) -> None:
        """Look for evaluation samples in a training corpus, and whether contamination shows in scores (paper A.6).

        A token of a sample is contaminated if it lies in an n-gram of more than 10 tokens that the corpus holds too, but for
        up to 4 tokens. For every minimum match length from 10 to 50: clean, not clean, not dirty and dirty samples, their
        scores and Z. Writes report.md, report.json and samples.jsonl. What was interrupted goes on when it is started
        again, and scores may be given later. The samples must fit into memory, the corpus need not.

        A row of SAMPLES.jsonl is {"id": "mmlu-1", "text": "...", "benchmark": "mmlu", "score": 1}, the text being what a model is
        shown, answer and all; benchmark and score may be left out.

        Examples:
          llama-jax contamination mmlu.jsonl --corpus tokens:corpus.tokens --tokenizer corpus.model --out runs/mmlu-in-corpus
          llama-jax contamination all.jsonl --corpus "text:books/*.txt" jsonl:web.jsonl.zst --tokenizer corpus.model --workers 8 --out runs/all
          llama-jax contamination all.jsonl --corpus tokens:corpus.tokens --tokenizer corpus.model --scores 7b.jsonl 70b.jsonl --out runs/scored
          llama-jax contamination all.jsonl --corpus tokens:corpus.tokens --tokenizer corpus.model --beam=--runner=DirectRunner --out runs/beam

        Args:
          samples: The evaluation samples; .gz and .zst too.
          corpus: tokens:FOLDER, which is the fastest, or tfds:NAME[:SPLIT], text:FILES, jsonl:FILES or hf:NAME.
          tokenizer: A SentencePiece model, or a folder with tokenizer.model.
          out: The folder to write, and to go on in.
          scores: For each model a file of rows {"id": ..., "score": 0 to 1}.
          workers: Processes that search; 0 searches in this one.
          beam: Search on Apache Beam with these pipeline options instead; its workers must reach samples, corpus and out.
          as_json: Print report.json.
        """
        from llama_jax.evaluation.contamination import check_contamination
        from llama_jax.text.tokenizer import Tokenizer

        if not corpus:
            raise UserError("--corpus names no source; name at least one, such as tokens:corpus.tokens")
        if workers < 0:
            raise UserError(f"--workers is {workers}; expected 0, to search in this process, or more")
        report = check_contamination(
            samples,
            corpus,
            Tokenizer.load(tokenizer),
            out,
            scores=scores,
            workers=workers,
            beam=None if beam is None else shlex.split(beam),
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
        if as_json:
            print(json.dumps(report))
        else:
            with open(f"{out}/report.md", encoding="utf-8") as page:
                print(page.read(), end="")

    call(run, "contamination", argv)
