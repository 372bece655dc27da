"""The paper's suite of academic benchmarks as data (paper 2.3): shots, metrics, lm-eval's nearest tasks, and group averages.

Tasks are those of lm-eval 0.4.13. Where it has several forms of a benchmark, the one chosen is nearest to what the paper says,
or to what Llama 1's paper and Meta's evaluation notes of Llama 3 say of the same numbers; `differs` says what is still otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from llama_jax.evaluation.paper_scores import Measure


@dataclass(frozen=True)
class Benchmark:
    """One benchmark under the paper's protocol."""

    name: str
    """As in the keys of `paper_scores.SCORES`."""
    title: str
    group: str
    """A column of Table 3 (`paper_scores.GROUPS`), or "word problems", which are Table 15's."""
    shots: int
    """Solved examples in the prompt."""
    metric: str
    """As in `paper_scores.Measure`."""
    columns: tuple[str, ...]
    """What a document needs, as the public data set has it."""
    lm_eval_task: str | None
    """A task or group of lm-eval; None where it has none, or where ours is used."""
    lm_eval_metric: str | None
    """The key of lm-eval's results: metric, comma, filter."""
    differs: str = ""
    """How that task's protocol is known to differ from the paper's; empty where it is not."""
    questions: int | None = None
    """Its weight in the group's average where the paper counts questions; None where each benchmark counts once."""

    @property
    def measure(self) -> Measure:
        """What the paper's value for it is found under."""
        return Measure(self.name, self.shots, self.metric)


# What documents hold.
CHOICES = ("question", "choices", "answerKey")
HUMANEVAL = ("prompt", "test", "entry_point")
MBPP = ("text", "test_list")
PIQA = ("goal", "sol1", "sol2", "label")
WINOGRANDE = ("sentence", "option1", "option2", "answer")
OPENBOOKQA = ("question_stem", "choices", "answerKey")
QUESTION_ANSWER = ("question", "answer")
SQUAD = ("id", "title", "context", "question", "answers")
QUAC = ("background", "section_title", "context", "questions", "answers")
BOOLQ = ("passage", "question", "label")
MATH = ("problem", "solution")
BBH = ("input", "target")
ASDIV = ("body", "question", "answer")
SVAMP = ("Body", "Question", "Answer")
MAWPS = ("sQuestion", "lSolutions")
AGIEVAL = ("query", "choices", "gold")
MMLU = ("question", "choices", "answer")
SIQA = ("context", "question", "answerA", "answerB", "answerC", "label")
HELLASWAG = ("activity_label", "ctx_a", "ctx_b", "endings", "label")

# Where lm-eval's tasks are otherwise.
BEHIND_ANSWER = "Llama 1's paper divides by the likelihood of a choice behind 'Answer:' alone"
LENGTH = "Llama 1's paper divides by the length of a choice"
REASONED = "letters are scored; Meta's notes have examples that reason"
WIKIPEDIA = "all of its development set; the paper takes Wikipedia's part"
UNANSWERABLE = "only an empty line says that there is no answer; how the paper asks for that is not known"
FROM_TEST = "examples are other questions of the test set, as it has no others"
CALCULATOR = "without a calculator; Table 15's model calls one"

# Keys of lm-eval's results that would not fit below.
NO_SPACE = "exact_match,remove_whitespace"
LAST_NUMBER = "exact_match,flexible-extract"


def _mmlu(task: str, title: str, questions: int) -> Benchmark:
    return Benchmark(task, title, "mmlu", 5, "acc", MMLU, task, "acc,none", questions=questions)


def _agieval(task: str, title: str, questions: int) -> Benchmark:
    """Our choice: the fewest of the paper's 3 to 5 shots, as passages are long and the context has 4,096 tokens."""
    return Benchmark(task, title, "agieval", 3, "acc", AGIEVAL, task, "acc,none", FROM_TEST, questions)


SUITE = (
    # Drawn and run by ours (`code_benchmarks`).
    Benchmark("humaneval", "HumanEval", "code", 0, "pass@1", HUMANEVAL, None, None),
    Benchmark("mbpp", "MBPP", "code", 3, "pass@1", MBPP, None, None),
    # Likelihoods of choices are divided by their length (acc_norm) where lm-eval does so, as in Llama 1's paper.
    Benchmark("piqa", "PIQA", "commonsense", 0, "acc", PIQA, "piqa", "acc_norm,none"),
    Benchmark("siqa", "SIQA", "commonsense", 0, "acc", SIQA, "social_iqa", "acc,none", LENGTH),
    Benchmark("hellaswag", "HellaSwag", "commonsense", 0, "acc", HELLASWAG, "hellaswag", "acc_norm,none"),
    # What is scored is the same ending behind two beginnings: no length to divide by.
    Benchmark("winogrande", "WinoGrande", "commonsense", 0, "acc", WINOGRANDE, "winogrande", "acc,none"),
    Benchmark("arc_easy", "ARC-e", "commonsense", 0, "acc", CHOICES, "arc_easy", "acc_norm,none"),
    Benchmark("arc_challenge", "ARC-c", "commonsense", 0, "acc", CHOICES, "arc_challenge", "acc_norm,none"),
    Benchmark("openbookqa", "OBQA", "commonsense", 0, "acc", OPENBOOKQA, "openbookqa", "acc_norm,none", BEHIND_ANSWER),
    Benchmark("commonsense_qa", "CSQA", "commonsense", 7, "acc", CHOICES, "commonsense_qa", "acc,none", REASONED),
    Benchmark("nq", "Natural Questions", "world", 5, "em", QUESTION_ANSWER, "nq_open", NO_SPACE),
    Benchmark("triviaqa", "TriviaQA", "world", 5, "em", QUESTION_ANSWER, "triviaqa", NO_SPACE, WIKIPEDIA),
    # SQuAD 2.0: Meta's notes of Llama 3 say so of a Llama 2 score that is Table 23's.
    Benchmark("squad", "SQuAD", "reading", 0, "em", SQUAD, "squadv2", "exact,none", UNANSWERABLE),
    Benchmark("quac", "QuAC", "reading", 0, "f1", QUAC, None, None),
    Benchmark("boolq", "BoolQ", "reading", 0, "acc", BOOLQ, "boolq", "acc,none", BEHIND_ANSWER),
    # The eight examples of Wei et al. (2022), whose answers end as the strict filter expects; and Minerva's four.
    Benchmark("gsm8k", "GSM8K", "math", 8, "maj1@1", QUESTION_ANSWER, "gsm8k_cot", "exact_match,strict-match"),
    Benchmark("math", "MATH", "math", 4, "maj1@1", MATH, "minerva_math", "exact_match,none"),
    # With these numbers of questions the averages over tasks are Table 3's.
    _mmlu("mmlu_humanities", "Humanities", 4705),
    _mmlu("mmlu_stem", "STEM", 3153),
    _mmlu("mmlu_social_sciences", "Social Sciences", 3077),
    _mmlu("mmlu_other", "Other", 3107),
    # Answers alone: with reasoning (bbh_cot_fewshot), Meta's card of Llama 3 has far higher scores of the same models.
    Benchmark("bbh", "BBH", "bbh", 3, "em", BBH, "bbh_fewshot", "exact_match,none"),
    _agieval("agieval_aqua_rat", "AQuA-RAT", 254),
    _agieval("agieval_logiqa_en", "LogiQA", 651),
    _agieval("agieval_lsat_ar", "LSAT-AR", 230),
    _agieval("agieval_lsat_lr", "LSAT-LR", 510),
    _agieval("agieval_lsat_rc", "LSAT-RC", 269),
    _agieval("agieval_sat_en", "SAT-en", 206),
    _agieval("agieval_sat_en_without_passage", "SAT-en (w/o Psg.)", 206),
    _agieval("agieval_sat_math", "SAT-math", 220),
    # Our choice: 8 examples, as of GSM8K; Table 15's chat models see none. asdiv itself scores the likelihood of the answer.
    Benchmark("asdiv", "ASDiv", "word problems", 8, "acc", ASDIV, "asdiv_cot_llama", LAST_NUMBER, CALCULATOR),
    Benchmark("svamp", "SVAMP", "word problems", 8, "acc", SVAMP, None, None, CALCULATOR),
    Benchmark("mawps", "MAWPS", "word problems", 8, "acc", MAWPS, None, None, CALCULATOR),
)


def group_average(group: str, results: Mapping[str, float]) -> float | None:
    """A group's score as the paper computes it: of MMLU and AGIEval over questions, of the others over benchmarks.

    Args:
      group: as in `Benchmark.group`.
      results: scores by the names of benchmarks, which may be of other groups too.

    Returns:
      The average in the unit of the scores; None if one of the group's benchmarks has none.
    """
    weights = {one.name: one.questions or 1 for one in SUITE if one.group == group}
    if not weights.keys() <= results.keys():
        return None
    return sum(results[name] * weight for name, weight in weights.items()) / sum(weights.values())
