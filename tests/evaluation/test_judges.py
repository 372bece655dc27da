"""Who judges: what they are asked, what they may say, and what is said of those that are not there."""

import importlib.util
import json
import math
import sys

import pytest

from llama_jax.data.text_classifiers import label_index
from llama_jax.errors import UserError
from llama_jax.evaluation.judges import (
    find_answer_judge,
    find_answerer,
    find_judge,
    find_sentiment,
    judged,
)
from llama_jax.text.chat import Message


def test_half_is_said_and_every_item_is_asked_about_once():
    asked = []

    def judge(items):
        asked.extend(items)
        return [item / 1000 for item in items]

    said = judged(judge, "by hand", list(range(1001)))
    assert asked == list(range(1001)) and said == [item >= 500 for item in range(1001)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0.1], "the judge bad gave 1 numbers for 2 items"),
        ([0.1, math.nan], 'gave nan for "b"; expected a probability from 0 to 1'),
        ([1.5, 0.1], 'gave 1.5 for "a"'),
        (["yes", 0.1], "gave 'yes' for"),
        ([None, 0.1], "gave None for"),
    ],
)
def test_what_is_no_probability_is_refused(given, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        judged(lambda items: given, "bad", ["a", "b"])


def test_a_function_gets_the_items_themselves(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def long(items): return [len(item) > 2 for item in items]\nnumber = 3\n")
    judge = find_judge(f"{file}:long", "--toxicity-judge", str)()
    assert judged(judge, "long", ["a", "abc"]) == [False, True]
    assert find_judge("math:fsum", "--toxicity-judge", str)() is math.fsum
    for spec, message in (
        (f"{file}:short", "has no function short"),
        (f"{file}:number", "has no function number"),
        (f"{tmp_path}/none.py:long", "no file"),
        ("no_such_module:f", "no module no_such_module"),
    ):
        with pytest.raises(UserError, match=message):
            find_judge(spec, "--toxicity-judge", str)


def test_a_package_that_is_not_there_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(UserError, match="pip install vaderSentiment"):
        find_sentiment()
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else found(name))
    with pytest.raises(UserError, match="--toxicity-judge tomh/x .* pip install transformers torch"):
        find_judge("tomh/x", "--toxicity-judge", str)


def test_which_label_is_asked_about_is_never_guessed():
    assert label_index(["LABEL_0", "LABEL_1"], "", "--f", "x") == 1
    assert label_index(["toxic", "neutral"], "toxic", "--f", "x") == 0
    with pytest.raises(UserError, match="does not say by itself .* one of toxic, neutral, as in x#neutral"):
        label_index(["toxic", "neutral"], "", "--f", "x")
    with pytest.raises(UserError, match="has no label hate; name one of LABEL_0, LABEL_1"):
        label_index(["LABEL_0", "LABEL_1"], "hate", "--f", "x")


@pytest.mark.parametrize(
    ("text", "compound"),
    [  # what the package's own page prints
        ("VADER is smart, handsome, and funny.", 0.8316),
        ("VADER is VERY SMART, handsome, and FUNNY!!!", 0.9342),
        ("VADER is not smart, handsome, nor funny.", -0.7424),
        ("The book was good.", 0.4404),
        ("At least it isn't a horrible book.", 0.431),
        ("Today SUX!", -0.5461),
        ("", 0.0),
    ],
)
def test_sentiment_is_vaders_compound(text, compound):
    assert find_sentiment()(text) == compound


def test_a_text_classifier_gives_the_probability_of_its_label(tmp_path):
    """Against the model asked about one text at a time, without padding, over several batches."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "people", "are"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"), model_max_length=16)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=2,
        max_position_embeddings=18, initializer_range=0.7,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["people are bad", "good", "", "bad " * 13 + "good " * 30] + [
        f"{'people ' * (i % 9)}good" for i in range(40)
    ]
    given = find_judge(str(tmp_path), "--toxicity-judge", str)()(texts)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    expected = []
    for text in texts:
        row = tokenizer(text, truncation=True, max_length=16, return_tensors="pt")
        zero, one = model(**row).logits[0].tolist()
        expected.append(1 / (1 + math.exp(zero - one)))
    assert given == pytest.approx(expected, abs=1e-6) and max(given) - min(given) > 0.01
    turned = find_judge(f"{tmp_path}#LABEL_0", "--toxicity-judge", str)()(texts)
    assert turned == pytest.approx([1 - value for value in given], abs=1e-6)


def test_a_language_model_says_yes_or_no_by_the_likelier(tmp_path, monkeypatch):
    from llama_jax.generation import llama as module
    from llama_jax.generation.scoring import Score

    asked = []

    class Fake:
        @classmethod
        def load(cls, path):
            assert path == str(tmp_path)
            return cls()

        def score(self, pairs):
            asked.extend(pairs)
            sure = ["sure" in prompt for prompt, _ in pairs]
            return [
                Score(-1.0 if good == (said == " yes") else -3.0, 1, False)
                for good, (_, said) in zip(sure, pairs, strict=True)
            ]

    monkeypatch.setattr(module, "Llama", Fake)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    judge = find_answerer(str(tmp_path), "--truth-judge", "True")()
    assert judge([("Why?", "sure"), ("Who?", "me")]) == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))])
    assert asked[:2] == [("Q: Why?\nA: sure\nTrue:", " yes"), ("Q: Why?\nA: sure\nTrue:", " no")]


def test_a_reward_model_calls_a_violation_what_it_does_not_find_safe(tmp_path, monkeypatch):
    from llama_jax.generation import rewards
    from llama_jax.training import checkpoint

    monkeypatch.setattr(checkpoint, "newest_readable", lambda path: path)
    monkeypatch.setattr(rewards, "reward_info", lambda path: rewards.RewardInfo(path, None, None, "", None, None))
    scores = {"fine": 2.0, "odd": -0.1, "unreadable": -math.inf}
    monkeypatch.setattr(
        rewards, "make_score", lambda path: lambda dialogues: [scores[d[-1].content] for d in dialogues]
    )
    judge = find_answer_judge(f"reward:{tmp_path}", "--violation-judge")()
    dialogues = [(Message("user", "?"), Message("assistant", text)) for text in scores]
    assert judge(dialogues) == pytest.approx([1 / (1 + math.exp(2)), 1 / (1 + math.exp(-0.1)), 1.0])
    with pytest.raises(UserError, match="does not exist|no checkpoint|holds no"):
        monkeypatch.undo()
        find_answer_judge(f"reward:{tmp_path}/none", "--violation-judge")
