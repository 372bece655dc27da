"""The import graph goes down only, nothing depends on torch or tensorflow, and every module stands alone."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llama_jax"

# A module may import from lower layers and from its own part; parts that share a layer do not see each other.
LAYERS = [
    {"errors"},
    {"config"},
    {"parallel"},
    {"model"},
    {"text", "data"},
    {"training"},
    {"conversion"},
    {"generation"},
    {"stages"},
    {"evaluation", "planning"},
    {"doctor", "recipes"},
    {"demo_rlhf"},
    {"demo"},
    {"verbs"},
    {"cli"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}

# Beside the layers: data reads text's tokenizer, and every layer may know the chips' peaks and what their
# power comes to, which are plain numbers.
ALSO = {("data", "text")}
ANYWHERE = {"llama_jax.planning.hardware", "llama_jax.planning.carbon", "llama_jax.errors", "llama_jax"}

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports_of(path: Path, module: str) -> set[str]:
    """Full names of all imports in a file, inside functions too; `from a import b` is a.b where that is a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; write the full name"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
    return found - {module}


def part(module: str) -> str:
    return module.split(".")[1]


def violation(importer: str, imported: str) -> str | None:
    """Why one module of the package may not import another, or None."""
    if importer == "llama_jax" or imported in ANYWHERE:
        return None
    above, below = part(importer), part(imported)
    if above == "stages" and below == "stages":
        # The files of one stage begin with its name: ppo, ppo_config. The stage rlhf is made of others.
        stage, other = (name.split(".")[2].split("_")[0] for name in (importer, imported))
        return None if stage in (other, "rlhf") else "stages never import each other"
    if above == below or (above, below) in ALSO:
        return None
    if LEVEL[below] >= LEVEL[above]:
        return f"{above} must not import {below}"
    return None


@pytest.mark.parametrize("module", [name for name in MODULES if name != "llama_jax"])
def test_imports_go_down(module):
    assert part(module) in LEVEL, f"{module} has no layer yet; give {part(module)} its place in LAYERS"
    inside = [name for name in imports_of(MODULES[module], module) if name.split(".")[0] == "llama_jax"]
    wrong = {name: why for name in inside if (why := violation(module, name))}
    assert not wrong


@pytest.mark.parametrize("module", MODULES)
def test_no_second_framework(module):
    tops = {name.split(".")[0] for name in imports_of(MODULES[module], module)}
    assert not tops & {"torch", "tensorflow", "clu", "transformers"}


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("llama_jax.config", "llama_jax.model.transformer"),
        ("llama_jax.text.tokenizer", "llama_jax.data.sources"),
        ("llama_jax.training.step", "llama_jax.generation.llama"),
        ("llama_jax.stages.sft", "llama_jax.stages.pretrain"),
        ("llama_jax.stages.sft", "llama_jax.stages.rlhf_config"),
        ("llama_jax.training.loop", "llama_jax.planning.plan"),
        ("llama_jax.recipes", "llama_jax.verbs"),
    ],
)
def test_the_rule_refuses(importer, imported):
    assert violation(importer, imported)


def at_the_top(path: Path, module: str) -> set[str]:
    """The package's modules that a file imports when it is imported itself: not in a function, nor for type checkers alone.

    A module's packages are imported before it, and are among them.
    """

    def outside(nodes: list[ast.stmt]) -> Iterator[ast.stmt]:
        for node in nodes:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                yield from outside(node.orelse)
            elif not isinstance(node, ast.FunctionDef):
                yield node
                yield from outside([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])

    found = set()
    for node in outside(ast.parse(path.read_text()).body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    parents = {".".join(name.split(".")[:end]) for name in found for end in range(1, name.count(".") + 1)}
    return ((found | parents) & set(MODULES)) - {module} - {p for p in parents if module.startswith(f"{p}.")}


def test_no_imports_go_round():
    """So every module can be the first that is imported: none works only after another one."""
    graphlib.TopologicalSorter({name: at_the_top(path, name) for name, path in MODULES.items()}).prepare()


def test_a_ring_of_imports_is_found(tmp_path):
    for name, text in {"a": "from llama_jax.b import x", "b": "if True:\n    import llama_jax.a"}.items():
        (tmp_path / f"{name}.py").write_text(text)
    MODULES_THERE = {f"llama_jax.{name}": tmp_path / f"{name}.py" for name in "ab"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "MODULES", MODULES_THERE)
        with pytest.raises(graphlib.CycleError):
            test_no_imports_go_round()
        (tmp_path / "b.py").write_text("def f():\n    import llama_jax.a")
        test_no_imports_go_round()


def test_every_module_can_be_imported():
    tried = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\nprint('all were')"
    command = [sys.executable, "-W", "error::SyntaxWarning", "-c", tried, *MODULES]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "all were\n", result.stderr[-1000:]


def test_the_top_imports_nothing_heavy():
    light = {
        "llama_jax",
        "llama_jax.errors",
        "llama_jax.config",
        "llama_jax.cli",
        "llama_jax.recipes",
        "llama_jax.doctor",
    }
    code = f"import sys, {', '.join(sorted(light))}; print({{'jax', 'numpy', 'tyro'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_public_names_lead_somewhere():
    import llama_jax

    for name in llama_jax.__all__:
        assert getattr(llama_jax, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Lama'"):
        llama_jax.Lama  # noqa: B018
