"""The paper's numbers on safety benchmarks (4.1, 4.4, A.4.6, A.4.7), in its order of groups and of sizes.

Tables stand as text, a row for each size from 7B to 70B, so that they can be compared with the printed ones by eye.
"""

import math
from typing import NamedTuple

SIZES = {"7B": 7e9, "13B": 13e9, "34B": 34e9, "70B": 70e9}
"""The paper's models and about how many parameters each has."""


class PaperModel(NamedTuple):
    """One of the paper's models."""

    size: str
    is_chat: bool

    def __str__(self) -> str:
        return f"{self.size} {'chat' if self.is_chat else 'base'}"


class ByModel(NamedTuple):
    """Numbers of each of the paper's models: of base models and of chat models by size, one for each group."""

    base: dict[str, tuple[float, ...]]
    chat: dict[str, tuple[float, ...]]

    def of(self, model: PaperModel) -> tuple[float, ...]:
        """Those of one model."""
        return (self.chat if model.is_chat else self.base)[model.size]


def nearest_model(n_params: int, is_chat: bool) -> PaperModel:
    """The paper's model whose number of parameters is the nearest, in its logarithm."""
    return PaperModel(min(SIZES, key=lambda size: abs(math.log(n_params / SIZES[size]))), is_chat)


def _table(text: str) -> dict[str, tuple[float, ...]]:
    return {size: tuple(map(float, row.split())) for size, row in zip(SIZES, text.strip().splitlines(), strict=True)}


TOXIGEN_GROUPS = {
    "asian": "Asian",
    "mexican": "Mexican",
    "muslim": "Muslim",
    "physical_disability": "Physical disability",
    "jewish": "Jewish",
    "middle_east": "Middle Eastern",
    "chinese": "Chinese",
    "mental_disability": "Mental disability",
    "latino": "Latino",
    "native_american": "Native American",
    "women": "Women",
    "black": "Black",
    "lgbtq": "LGBTQ",
}
"""The groups, in the paper's order, by their names in the names of the prompt files."""

TOXIGEN = ByModel(
    base=_table("""
        16.53 31.15 22.63 15.74 26.87 19.95 15.79 19.55 25.03 18.92 21.53 22.34 20.20
        21.29 37.25 22.81 17.77 32.65 24.13 21.05 20.19 35.40 27.69 26.99 28.26 23.84
        16.76 29.63 23.36 14.38 27.43 19.49 18.54 17.31 26.38 18.73 22.78 21.66 19.04
        21.29 32.90 25.91 16.92 30.60 21.35 16.93 21.47 30.42 20.12 31.05 28.43 22.35
    """),
    chat=_table("""
        0 0 0 0 0 0 0 0 0 0 0 0 0
        0 0 0 0 0 0 0 0 0 0 0 0 0
        0.11 0 0 0.17 0 0 0 0 0 0 0 0.16 0
        0 0 0 0 0 0 0 0 0 0 0 0 0
    """),
)
"""Percent of continuations that are toxic, by group."""

TOXIGEN_OVERALL = ByModel(
    base=_table("21.25\n26.10\n21.19\n24.60"),
    chat=_table("0.00\n0.00\n0.02\n0.01"),
)
"""Percent over all groups: for the base models the unweighted mean of the groups' to its last digit, for the chat models
of 34B and 70B not (it would be 0.03 and 0.00)."""

TRUTHFULQA = ByModel(
    base=_table("""
        33.29 39.53 93.02
        41.86 45.65 96.08
        43.45 46.14 96.7
        50.18 53.37 96.21
    """),
    chat=_table("""
        57.04 60.59 96.45
        62.18 65.73 96.45
        67.20 70.01 97.06
        64.14 67.07 97.06
    """),
)
"""Percent of answers that are true and informative, true, informative, as a fine-tuned GPT-3 judged them."""

BOLD_GROUPS = {
    "gender": ("American_actors", "American_actresses"),
    "race": ("Asian_Americans", "African_Americans", "European_Americans", "Hispanic_and_Latino_Americans"),
    "religious ideology": ("judaism", "christianity", "islam", "buddhism", "sikhism"),
    "political ideology": (
        "left-wing",
        "right-wing",
        "communism",
        "socialism",
        "democracy",
        "liberalism",
        "populism",
        "conservatism",
        "nationalism",
        "anarchism",
        "capitalism",
        "fascism",
    ),
    "profession": (
        "metalworking_occupations",
        "sewing_occupations",
        "healthcare_occupations",
        "computer_occupations",
        "film_and_television_occupations",
        "artistic_occupations",
        "scientific_occupations",
        "entertainer_occupations",
        "dance_occupations",
        "nursing_specialties",
        "writing_occupations",
        "professional_driver_types",
        "engineering_branches",
        "mental_health_occupations",
        "theatre_personnel",
        "corporate_titles",
        "industrial_occupations",
        "railway_industry_occupations",
    ),
}
"""The subgroups of each domain, in the paper's order, by their names in the prompt files."""

BOLD_DROPPED = ("hinduism", "atheism")
"""Subgroups that the paper leaves out, for their few prompts: 12 and 29."""

BOLD = {
    "gender": ByModel(
        base=_table("""
            .29 .42
            .32 .44
            .25 .45
            .28 .44
        """),
        chat=_table("""
            .48 .56
            .46 .53
            .44 .47
            .44 .49
        """),
    ),
    "race": ByModel(
        base=_table("""
            .38 .33 .27 .43
            .42 .31 .28 .45
            .40 .34 .28 .42
            .42 .34 .28 .52
        """),
        chat=_table("""
            .55 .43 .40 .49
            .51 .40 .38 .49
            .46 .40 .35 .39
            .51 .43 .40 .49
        """),
    ),
    "religious ideology": ByModel(
        base=_table("""
            .34 .28 .30 .24 .16
            .29 .33 .35 .33 .19
            .31 .24 .32 .34 .28
            .42 .29 .34 .37 .20
        """),
        chat=_table("""
            .55 .50 .48 .45 .62
            .40 .50 .71 .40 .62
            .44 .54 .63 .53 .53
            .47 .52 .50 .55 .50
        """),
    ),
    "political ideology": ByModel(
        base=_table("""
            .15 .30 .12 .35 .25 .43 .18 .38 .16 .12 .29 -.13
            .14 .35 .23 .29 .23 .57 .20 .52 .22 .12 .29 -.17
            .12 .16 .18 .36 .35 .52 .10 .54 .28 .11 .30 -.19
            .16 .21 .17 .35 .30 .60 .18 .67 .26 .12 .30 -.10
        """),
        chat=_table("""
            .28 .51 .29 .44 .59 .75 .28 .75 .55 .26 .50 -.19
            .35 .49 .45 .49 .49 .72 .30 .67 .54 .36 .50 .16
            .30 .51 .36 .48 .56 .76 .28 .75 .53 .34 .54 .02
            .34 .56 .28 .56 .64 .78 .27 .76 .55 .34 .57 -.01
        """),
    ),
    "profession": ByModel(
        base=_table("""
            .28 .25 .29 .50 .36 .37 .21 .34 .32 .50 .28 .19 .26 .32 .44 .51 .30 .25
            .24 .25 .35 .50 .41 .36 .24 .39 .35 .48 .31 .18 .27 .34 .46 .66 .35 .28
            .27 .24 .33 .56 .41 .36 .26 .32 .36 .53 .33 .07 .26 .30 .45 .56 .26 .35
            .31 .29 .35 .51 .41 .45 .27 .34 .40 .52 .36 .12 .28 .31 .45 .65 .33 .20
        """),
        chat=_table("""
            .44 .42 .45 .71 .54 .54 .33 .54 .53 .55 .62 .29 .36 .58 .53 .61 .36 .37
            .37 .37 .41 .52 .44 .45 .29 .46 .49 .50 .48 .29 .31 .58 .41 .58 .33 .40
            .40 .37 .43 .59 .54 .49 .32 .48 .50 .58 .53 .25 .34 .60 .50 .63 .44 .40
            .47 .43 .49 .67 .60 .55 .38 .54 .56 .61 .58 .28 .39 .67 .56 .70 .43 .47
        """),
    ),
}
"""Mean sentiment of prompt and continuation, from -1 to 1, by domain and subgroup."""

VIOLATIONS = {"7B": 3.0, "13B": 3.0, "34B": 7.0, "70B": 4.0}
"""Percent of 1,974 adversarial prompts whose answer of a chat model people rated as a violation; read from a figure, so about."""

BORDERLINE_REFUSALS = (15.0, 27.0)
"""Percent of 210 harmless prompts that look adversarial which were refused: the least and the most, by amount of safety data."""
