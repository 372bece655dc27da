"""Recipes: found by path or name, derived from one another, and every mistake located in the file."""

from dataclasses import dataclass

import pytest

from llama_jax.errors import UserError
from llama_jax.recipes import list_recipes, load_recipe


@dataclass(frozen=True)
class Config:
    steps: int = 1


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with experiments/, which is the current one; recipes see `Config` as the builtin module `the_stage`."""
    import sys
    from types import ModuleType

    stage = ModuleType("the_stage")
    stage.Config = Config
    monkeypatch.setitem(sys.modules, "the_stage", stage)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    return tmp_path / "experiments"


def write(folder, name, text):
    (folder / name).write_text("from the_stage import Config\n" + text)


@pytest.mark.parametrize("name", ["experiments/small.py", "small"])
def test_a_recipe_is_found_by_path_and_by_name(folder, name):
    write(folder, "small.py", "config = Config(steps=7)")
    assert load_recipe(name, Config) == Config(7)


def test_a_recipe_derives_from_another(folder):
    write(folder, "base_of_two.py", "config = Config(steps=7)")
    text = "import dataclasses, base_of_two\nfrom experiments import base_of_two as same\n"
    write(folder, "derived.py", text + "config = dataclasses.replace(base_of_two.config, steps=same.config.steps + 1)")
    with pytest.MonkeyPatch.context() as patch:
        import sys

        patch.delitem(sys.modules, "experiments", raising=False)
        assert load_recipe("derived", Config) == Config(8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "defines no `config`; a recipe ends in `config = Config"),
        ("config = {'steps': 3}", "is a dict; this verb needs a Config"),
        ("x = 1\nconfig = Config(step=3)", r"broken.py:3: TypeError: .*unexpected keyword argument 'step'"),
        ("config = Config(", r"broken.py:2: SyntaxError"),
        ("import not_there_at_all", r"broken.py:2: ModuleNotFoundError: .*not_there_at_all"),
    ],
)
def test_a_broken_recipe_is_bad_input_with_its_place(folder, text, message):
    write(folder, "broken.py", text)
    with pytest.raises(UserError, match=message):
        load_recipe("experiments/broken.py", Config)


def test_a_missing_recipe_names_its_neighbours(folder):
    write(folder, "pretrain_tiny.py", "config = Config()")
    write(folder, "_shared.py", "")
    with pytest.raises(
        UserError, match=r"no recipe at pretrain_tny; did you mean .*pretrain_tiny.py\? recipes here:"
    ) as caught:
        load_recipe("pretrain_tny", Config)
    assert "pretrain_tiny" in str(caught.value) and "_shared" not in str(caught.value)


def test_what_is_no_python_file_is_refused(folder):
    (folder / "recipe.yaml").write_text("steps: 3")
    with pytest.raises(UserError, match=r"is no Python file; a recipe's name ends in \.py"):
        load_recipe("experiments/recipe.yaml", Config)


def test_an_experiment_without_a_config_is_no_recipe(tmp_path, monkeypatch):
    (tmp_path / "experiments").mkdir()
    for name, text in {
        "one": "config = 1\n",
        "two": "config = both = 2\n",
        "three": "def main():\n    config = 3\n",
    }.items():
        (tmp_path / "experiments" / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert {"one", "two"} == {path.stem for path in list_recipes() if tmp_path in path.parents}
