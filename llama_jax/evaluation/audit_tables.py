"""The tables of a corpus audit (paper 4.1: Tables 9 and 10, Figure 13), with the paper's values beside ours.

A group is the documents that use any of its pronouns, or mention any of its descriptors: its share is of all documents. Shares
of a group's members are of the group's documents. That the paper's pronouns are meant so too follows from its numbers: of all
documents, 86.38 % (unspecified) could not lie in 75.23 % (any).

The paper's row of orientation holds more than its rule lets in: its five greatest descriptors come to at most 31.2 % of the
axis's documents, and the 14 others that HolisticBias 1.1 has there, each below 3.5 %, to at most 49 %. "straight" explains the
rest, which the paper says it dropped. So the share with dropped descriptors is printed too.
"""

from collections.abc import Mapping
from typing import Any

from llama_jax.data.audit import LANGUAGE_THRESHOLD, TOXIC, TOXICITY_BINS, UNKNOWN, Counts, toxicity_bin
from llama_jax.data.audit_terms import DROPPED, OWN_DESCRIPTORS, PRONOUNS
from llama_jax.evaluation.intervals import wilson
from llama_jax.evaluation.report import table

# The paper's, in percent: of all documents, and of these for each member.
PAPER_PRONOUNS: dict[str, tuple[float, dict[str, float]]] = {
    "gender": (75.23, {"she": 28.45, "he": 50.73, "unspecified": 86.38}),
    "person": (94.47, {"1st": 70.71, "2nd": 61.80, "3rd": 93.07}),
}
PAPER_DESCRIPTORS: dict[str, tuple[float, dict[str, float]]] = {
    "gender_and_sex": (
        5.91,
        {"female": 50.0, "male": 39.1, "feminine": 5.4, "transgender": 4.2, "masculine": 3.1},
    ),
    "sexual_orientation": (6.67, {"gay": 14.8, "lesbian": 4.3, "lgbt": 4.0, "lgbtq": 3.6, "queer": 3.5}),
    "nationality": (14.83, {"american": 69.4, "indian": 16.5, "chinese": 16.3, "korean": 5.1, "mexican": 4.9}),
    "race_ethnicity": (19.51, {"european": 20.7, "african": 11.5, "asian": 7.4, "latin": 6.2, "indigenous": 3.7}),
    "religion": (
        7.93,
        {"christian": 33.2, "religious": 28.8, "spiritual": 20.6, "catholic": 15.4, "jewish": 13.0},
    ),
}
PAPER_LANGUAGES: dict[str, float] = {
    code: percent
    for percent, codes in (
        (89.70, "en"),
        (8.38, UNKNOWN),
        (0.17, "de"),
        (0.16, "fr"),
        (0.15, "sv"),
        (0.13, "zh es ru"),
        (0.12, "nl"),
        (0.11, "it"),
        (0.10, "ja"),
        (0.09, "pl pt"),
        (0.08, "vi"),
        (0.07, "uk"),
        (0.06, "ko"),
        (0.04, "ca sr"),
        (0.03, "id cs fi hu no ro"),
        (0.02, "bg da"),
        (0.01, "sl hr"),
    )
    for code in codes.split()
}
PAPER_TOXIC = 0.2  # about, of English documents

_TOP = 5  # descriptors of an axis that are printed, as in the paper
_SMALLEST = 0.005  # percent of documents in a language that has a line of its own; less would print as 0.00


def as_results(counts: Counts, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What audit.json holds: of everything that was counted its share in percent, with its interval and the paper's value.

    Args:
      counts: of the documents.
      recipe: what was counted; see `llama_jax.evaluation.audit`.
    """
    descriptors = {
        axis: {
            **_group(counts, axis, *PAPER_DESCRIPTORS[axis]),
            "dropped": [term for term in DROPPED if counts.members[f"{axis}/{term}"]],
            "with_dropped": _share(counts.with_dropped[axis], counts.documents, None),
        }
        for axis in recipe["descriptors"]
    }
    languages = {
        code: _share(counts.languages[code], counts.documents, PAPER_LANGUAGES.get(code))
        for code in sorted(
            counts.languages.keys() | PAPER_LANGUAGES,
            key=lambda code: (-counts.languages[code], -PAPER_LANGUAGES.get(code, 0), code),
        )
    }
    return {
        "recipe": dict(recipe),
        "documents": counts.documents,
        "pronouns": {group: _group(counts, group, *PAPER_PRONOUNS[group]) for group in PRONOUNS},
        "descriptors": descriptors,
        "languages": languages if recipe["languages"] else None,
        "toxicity": _toxicity(counts) if recipe["toxicity"] else None,
    }


def as_page(results: Mapping[str, Any]) -> str:
    """The tables in Markdown.

    Args:
      results: what `as_results` gives.
    """
    recipe = results["recipe"]
    is_own = recipe["descriptors"] == {axis: list(terms) for axis, terms in OWN_DESCRIPTORS.items()}
    kind = "The descriptors are a small list of our own, and the paper's are HolisticBias's." if is_own else ""
    lines = [
        "# Corpus audit",
        f"{results['documents']} documents of {', '.join(recipe['sources'])}, beside the paper's pretraining corpus (4.1). "
        "Intervals are Wilson's, of 95 %, as if the documents had been drawn at random.",
        "## Pronouns",
        "Bold: of all documents. Else: of the documents that the bold line above counts.",
        _groups_table(results["pronouns"]),
        "## Descriptors",
        f"Bold: of all documents, those that mention any descriptor of the axis but {', '.join(DROPPED)}. Else: of these. {kind}",
        _groups_table(results["descriptors"]),
    ]
    if results["languages"]:
        lines += [
            f"## Languages\n\nBy fastText with {recipe['languages']}; {UNKNOWN} where the probability is below {LANGUAGE_THRESHOLD}.",
            _languages_table(results["languages"]),
        ]
    if toxicity := results["toxicity"]:
        of_what = "English documents" if recipe["languages"] else "documents of any language"
        scored = toxicity["toxic"]["of"]
        lines += [
            f"## Toxicity\n\nBy {recipe['toxicity']}, the mean of a document's lines, on {scored} {of_what}, "
            f"a sample of {recipe['sample']:.0%}.",
            table(_HEADER, [_row(f"toxicity of {TOXIC} and above", toxicity["toxic"])]),
            table(("toxicity", "documents", "%"), [_bin_row(*entry) for entry in toxicity["bins"].items()]),
        ]
    return "\n\n".join(lines) + "\n"


def _share(count: int, of: int, paper: float | None) -> dict[str, Any]:
    low, high = wilson(count, of)
    percent = 100 * count / of if of else None
    return {"count": count, "of": of, "percent": percent, "low": 100 * low, "high": 100 * high, "paper": paper}


def _group(counts: Counts, group: str, paper: float, paper_members: Mapping[str, float]) -> dict[str, Any]:
    own = {key.partition("/")[2]: count for key, count in counts.members.items() if key.startswith(f"{group}/")}
    own = {**dict.fromkeys(paper_members, 0), **{name: count for name, count in own.items() if name not in DROPPED}}
    members = {name: _share(own[name], counts.groups[group], paper_members.get(name)) for name in own}
    if group not in PRONOUNS:
        members = dict(sorted(members.items(), key=lambda item: (-item[1]["count"], item[0])))
    return {**_share(counts.groups[group], counts.documents, paper), "members": members}


def _toxicity(counts: Counts) -> dict[str, Any]:
    bins = [counts.toxicity[str(number)] for number in range(TOXICITY_BINS)]
    names = [f"{number / TOXICITY_BINS:.1f} to {(number + 1) / TOXICITY_BINS:.1f}" for number in range(TOXICITY_BINS)]
    toxic = _share(sum(bins[toxicity_bin(TOXIC) :]), sum(bins), PAPER_TOXIC)
    shares = [_share(count, sum(bins), None) for count in bins]
    return {"toxic": toxic, "bins": dict(zip(names, shares, strict=True))}


_HEADER = ("", "documents", "%", "interval", "paper, %")


def _row(name: str, share: Mapping[str, Any]) -> tuple[str, ...]:
    percent = "-" if share["percent"] is None else f"{share['percent']:.2f}"
    paper = "" if share["paper"] is None else str(share["paper"])
    return name, str(share["count"]), percent, f"{share['low']:.2f} to {share['high']:.2f}", paper


def _bin_row(name: str, share: Mapping[str, Any]) -> tuple[str, ...]:
    return _row(name, share)[:3]


def _groups_table(groups: Mapping[str, Any]) -> str:
    rows = []
    for name, group in groups.items():
        title = name.replace("_", " ")
        rows.append(_row(f"**{title}**", group))
        if group.get("dropped"):
            rows.append(_row(f"**{title}, with {' and '.join(group['dropped'])}**", group["with_dropped"]))
        members = list(group["members"].items())
        rows += [_row(member, share) for i, (member, share) in enumerate(members) if i < _TOP or share["paper"]]
    return table(_HEADER, rows)


def _languages_table(languages: Mapping[str, Any]) -> str:
    def has_line(share: Mapping[str, Any]) -> bool:
        return share["paper"] is not None or (share["percent"] or 0) >= _SMALLEST

    rows = [_row(code, share) for code, share in languages.items() if has_line(share)]
    if rest := [share for share in languages.values() if not has_line(share)]:
        rows.append(_row(f"{len(rest)} others", _share(sum(share["count"] for share in rest), rest[0]["of"], None)))
    return table(_HEADER, rows)
