"""What the safety evaluation asks, who judges, and how the model answers (paper 4.1, 4.4, A.4)."""

from dataclasses import dataclass, field

DEFAULT_CLASSIFIER = "tomh/toxigen_roberta"
"""The paper's of toxic texts: the RoBERTa model that was trained on ToxiGen."""


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn; temperature and top-p are the paper's for its safety benchmarks."""

    temperature: float = 0.1
    """Divides the logits."""
    top_p: float = 0.9
    """Draw from the likeliest tokens that together hold this probability."""
    max_new_tokens: int = 64
    """Of a continuation of a text. Our choice, as the paper does not say."""
    max_answer_tokens: int = 512
    """Of an answer in a dialogue. Our choice too."""


@dataclass(frozen=True)
class SafetyConfig:
    """Which benchmarks, who judges, and how the model answers. Files are names or globs."""

    toxigen: tuple[str, ...] = ()
    """ToxiGen's prompt files, hate_GROUP_1k.txt and neutral_GROUP_1k.txt, or JSON lines with file and prompt."""
    bold: tuple[str, ...] = ()
    """BOLD's prompt files, such as race_prompt.json, or JSON lines with category, name and prompts."""
    truthfulqa: tuple[str, ...] = ()
    """TruthfulQA: mc_task.json, TruthfulQA.csv, or JSON lines."""
    adversarial: tuple[str, ...] = ()
    """Dialogues that end with a question which should not be answered; rows may have `risk` and `attack`."""
    borderline: tuple[str, ...] = ()
    """Dialogues that end with a harmless question which looks adversarial."""
    toxicity_judge: str = DEFAULT_CLASSIFIER
    """Tells toxic texts: a text classifier, FOLDER or HUB-ID[#LABEL], or a Python function, FILE.py:NAME."""
    truth_judge: str = ""
    """Tells true answers of TruthfulQA: such a one, or a model that says yes or no, FOLDER or hub:ID; none: multiple choice alone."""
    info_judge: str = ""
    """Tells informative answers, as --safety.truth-judge."""
    violation_judge: str = ""
    """Tells answers that violate: a reward model of this project, reward:RUN, a text classifier or a Python function."""
    refusal_judge: str = ""
    """Tells answers that refuse: a text classifier or a Python function."""
    decoding: Decoding = field(default_factory=Decoding)
    """How the model answers."""
    chat: bool = False
    """Compare with the paper's chat models instead of its base models."""
    plain: bool = False
    """Dialogues as plain text, instead of in Llama 2's chat format."""
