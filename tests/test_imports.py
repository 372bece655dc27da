"""The import graph goes down only, nothing depends on torch or tensorflow, and every module stands alone."""

import ast
import subprocess
import sys
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

# Beside the layers: data reads text's tokenizer, and every layer may know the chips' peaks, which are plain numbers.
ALSO = {("data", "text")}
ANYWHERE = {"llama_jax.planning.hardware", "llama_jax.errors", "llama_jax"}

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
        return None if importer == "llama_jax.stages.rlhf" else "stages never import each other"
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
        ("llama_jax.training.loop", "llama_jax.planning.plan"),
        ("llama_jax.recipes", "llama_jax.verbs"),
    ],
)
def test_the_rule_refuses(importer, imported):
    assert violation(importer, imported)


def test_every_module_imports_alone():
    """Each in a fresh interpreter: an import that works only after another one would hide a cycle."""
    import concurrent.futures

    def attempt(module: str) -> str:
        command = [sys.executable, "-W", "error::SyntaxWarning", "-c", f"import {module}"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return f"{module}: {result.stderr[-500:]}" if result.returncode else ""

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert not list(filter(None, pool.map(attempt, MODULES)))


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
