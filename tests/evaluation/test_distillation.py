"""The report of distillation: its numbers, counted by hand from a few rows."""

from llama_jax.data.samples import SAMPLES, as_line
from llama_jax.evaluation.distillation import kept_by_category, scores_by_kind, shift_by_kind, write_distillation_report


def row(category: str, original: float | None, **scores: float | None) -> dict:
    samples = [{"kind": kind, "text": "so", "score": score} for kind, score in scores.items()]
    return {"risk": category, "original": {"kind": "", "text": "no", "score": original}, "samples": samples}


ROWS = [
    row("hateful", 1.0, tailored=3.0, generic=2.0),
    row("hateful", 1.0, tailored=1.0, generic=0.0),  # equal is not above
    row("illicit", None, tailored=-5.0, generic=None),  # kept, as the original has no score; no shift
    row("illicit", 4.0, generic=5.0, tailored=0.0),
]


def test_what_is_kept_and_how_scores_shift_is_counted_by_category_and_by_kind():
    assert kept_by_category(ROWS) == [("hateful", 2, 1, "50.0%"), ("illicit", 2, 2, "100.0%"), ("all", 4, 3, "75.0%")]
    assert scores_by_kind(ROWS) == {"original": [1, 1, 4], "tailored": [3, 1, -5, 0], "generic": [2, 0, 5]}
    assert shift_by_kind(ROWS) == [
        ("original", 3, "2", "", ""),
        ("tailored", 4, "-0.25", "33.3%", "-0.6667"),
        ("generic", 3, "2.333", "66.7%", "+0.3333"),
    ]


def test_the_report_stands_in_the_runs_folder_with_its_plot(tmp_path):
    (tmp_path / SAMPLES).write_text("".join(map(as_line, ROWS)))
    page = write_distillation_report(tmp_path).read_text()
    assert "Of 4 adversarial prompts 3 have" in page and "| illicit | 2 | 2 | 100.0% |" in page
    assert "![Scores of answers with and without preprompts](scores.png)" in page
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
