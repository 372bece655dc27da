"""Contamination of benchmarks by a training corpus (paper A.6): which samples stand in it, and whether it shows in scores.

`contamination_matches` finds the n-grams that samples and corpus share, `contamination_corpus` takes it to corpora larger than
memory, `contamination_progress` keeps what they found, `contamination_statistics` has the subsets and Z; here files become a
report.

The paper does not say how samples are verbalised: a sample is the text that the caller gives, such as the question with its
answers as the prompt shows them. It is tokenised by itself, without BOS. Text sources are cut into documents by
`llama_jax.data`, and no match goes across a cut.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.data.documents import Tokenise, tokens_per_document
from llama_jax.errors import UserError
from llama_jax.evaluation.contamination_corpus import (
    Search,
    Shard,
    search_here,
    search_in_processes,
    search_on_beam,
)
from llama_jax.evaluation.contamination_progress import Progress
from llama_jax.evaluation.contamination_samples import Samples, read_samples
from llama_jax.evaluation.contamination_statistics import LENGTHS, AtLength, at_length, largest_benefit, sample_shares
from llama_jax.evaluation.report import table, write_page
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training.run_folder import digest_of, write_rows, write_whole

SHARD_TOKENS = 1 << 24  # estimated, of a shard: a third of a second of ids, some ten seconds of text


def check_contamination(
    samples: str,
    sources: Sequence[str],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    scores: Sequence[str] = (),
    workers: int = 0,
    beam: Sequence[str] | None = None,
    shard_tokens: int = SHARD_TOKENS,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Searches a corpus for evaluation samples, and writes report.md, report.json and samples.jsonl into the folder `out`.

    Args:
      samples: a file of JSON lines with id and text, and where known benchmark and score.
      sources: of the corpus; see llama_jax.data.sources.
      tokenizer: that of the model.
      out: the folder. What an interrupted call left there is gone on with, and what a finished one found is not searched
        again: scores may come later.
      scores: files of JSON lines with id and score (0 to 1), one for each model, which is called as its file is.
      workers: processes that search; 0 is this one.
      beam: options of an Apache Beam pipeline that searches instead; samples, sources and `out` must be files that its
        workers reach.
      shard_tokens: tokens after which, by estimate, what was found is kept.
      say: takes lines about the progress.

    Returns:
      What report.json holds: by benchmark and model, at every minimum match length, the four subsets and the verdict.

    Raises:
      UserError: bad files, sources or scores, or `out` holds another search.
    """
    read = read_samples(samples, scores)
    ids = _ids(read.texts, tokenizer)
    search = Search(ids, sources, tokenizer)
    progress = _progress(search, read, sources, tokenizer, _made(Path(out)), shard_tokens)
    if beam is not None and progress.left:
        make_search = functools.partial(_make_search, samples, sources, tokenizer)
        results = search_on_beam(make_search, progress.left, Path(out) / "beam.pickle", beam)
    elif workers:
        results = search_in_processes(search, progress.left, workers)
    else:
        results = search_here(search, progress.left)
    for found in results:
        progress.add(found)
        say(progress.line())
    header = {
        "corpus": {"sources": list(sources), "documents": progress.documents, "tokens": progress.tokens},
        "samples": {"file": str(samples), "samples": len(ids), "tokens": len(progress.longest)},
        "tokenizer_sha256": tokenizer.sha256,
    }
    return _write_report(header, read, np.array([len(one) for one in ids], np.int64), progress.longest, Path(out))


def _ids(texts: Iterable[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    return [np.array(tokenizer.encode(text, bos=False), np.uint32) for text in texts]


def _make_search(samples: str, sources: Sequence[str], tokenizer: Tokenizer) -> Search:
    """The search from its files, for a machine that has nothing else."""
    return Search(_ids(read_samples(samples).texts, tokenizer), sources, tokenizer)


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be made ({error.strerror}); name another folder") from error
    return folder


def _progress(
    search: Search, read: Samples, sources: Sequence[str], tokenizer: Tokenizer, out: Path, shard_tokens: int
) -> Progress:
    """Cuts the sources into shards, the same however many processes there are, and takes up what is kept of them."""
    shards, cut = [], []
    for source, documents in enumerate(search.documents):
        step = max(1, int(shard_tokens / tokens_per_document(documents, Tokenise(tokenizer))))
        for first in range(0, len(documents), step):
            shards.append(Shard(len(shards), source, first, min(first + step, len(documents))))
        cut.append((sources[source], len(documents), step))
    recipe = digest_of([read.names, read.texts, tokenizer.sha256, cut])
    return Progress(out / "matches.npz", recipe, len(search.index.tokens), shards)


def _write_report(
    header: dict[str, Any], read: Samples, sizes: np.ndarray, longest: np.ndarray, out: Path
) -> dict[str, Any]:
    shares = np.stack([sample_shares(longest, sizes, length) for length in LENGTHS])  # [lengths, samples]
    report = header | {"results": [_as_json(*one) for one in _results(read, shares)]}
    rows = zip(read.names, read.benchmarks, sizes.tolist(), shares.T.round(4).tolist(), strict=True)
    write_rows(
        out / "samples.jsonl",
        ({"id": name, "benchmark": of, "tokens": size, "shares": some} for name, of, size, some in rows),
    )
    write_whole(out / "report.json", json.dumps(report, indent=1).encode())
    write_page(out / "report.md", "Contamination", _sections(report))
    return report


def _results(read: Samples, shares: np.ndarray) -> Iterator[tuple[str, str, int, float | None, list[AtLength]]]:
    """Benchmark, model, samples, mean score and all lengths, of every benchmark with every model that has scores for it."""
    for benchmark in dict.fromkeys(read.benchmarks):
        own = [number for number, name in enumerate(read.benchmarks) if name == benchmark]
        scored: dict[str, np.ndarray | None] = {
            model: np.array([by_name[read.names[number]] for number in own])
            for model, by_name in read.scores.items()
            if read.names[own[0]] in by_name  # and then all of the benchmark
        }
        for model, scores in (scored or {"": None}).items():
            lengths = [at_length(length, shares[k, own], scores) for k, length in enumerate(LENGTHS)]
            yield benchmark, model, len(own), None if scores is None else float(scores.mean()), lengths


def _as_json(benchmark: str, model: str, n: int, score: float | None, lengths: list[AtLength]) -> dict[str, Any]:
    largest = largest_benefit(lengths)
    return {
        "benchmark": benchmark,
        "model": model,
        "n": n,
        "score": score,
        "largest_length_with_benefit": largest and largest.length,
        "lengths": [
            {
                "length": one.length,
                "contamination": one.contamination,
                "subsets": [asdict(subset) for subset in one.subsets],
                "evidence": one.is_evidence,
                "benefit": one.is_benefit,
            }
            for one in lengths
        ],
    }


def _sections(report: dict[str, Any]) -> list[str]:
    """The page: what was searched, the paper's Table 51 for what is affected, and an overview."""
    corpus, samples, results = report["corpus"], report["samples"], report["results"]
    affected = [result for result in results if result["largest_length_with_benefit"]]
    detailed = [
        (result["benchmark"], result["model"], one["length"], s["name"], s["n"], *map(_percent, (s["contamination"], s["score"])), _z(s["z"]))
        for result in affected
        for one in result["lengths"]
        if one["length"] == result["largest_length_with_benefit"]
        for s in one["subsets"]
    ]  # fmt: skip
    shown = [0, 10, 20, 30, 40]  # L 10 to 50
    overview = [
        (
            result["benchmark"],
            result["model"],
            result["n"],
            _percent(result["score"]),
            *(_percent(result["lengths"][k]["contamination"]) for k in shown),
            result["largest_length_with_benefit"] or "none" if result["score"] is not None else "no scores",
        )
        for result in results
    ]
    header = ("set", "model", "L", "subset", "n", "mean contamination %", "mean score %", "Z")
    return [
        f"{samples['samples']} samples ({samples['tokens']} tokens) of {samples['file']}, searched for in "
        f"{corpus['documents']} documents ({corpus['tokens']} tokens) of {', '.join(corpus['sources'])}.",
        "## Sets whose scores contamination shows in\n\n"
        + (table(header, detailed) if detailed else "None: at no minimum match length L are all four |Z| above 2."),
        "## All sets\n\n"
        + table(("set", "model", "n", "mean score %", *(f"contamination %, L={LENGTHS[k]}" for k in shown), "largest L that shows"), overview),
    ]  # fmt: skip


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _z(z: float | None) -> str:
    return "" if z is None else f"{z:.2f}"
