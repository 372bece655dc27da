"""The import graph goes down only, nothing depends on torch or tensorflow, and every module stands alone."""

import ast
import importlib.util
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
        # The files of one stage begin with its name: ppo, ppo_config.
        own = len({name.split(".")[2].split("_")[0] for name in (importer, imported)}) == 1
        return None if own or importer == "llama_jax.stages.rlhf" else "stages never import each other"
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


ALONE = """
import importlib, os, sys, traceback
for name in sys.argv[1:]:
    if not (child := os.fork()):
        try:
            importlib.import_module(name)
        except BaseException:
            print(name, traceback.format_exc()[-500:], flush=True)
        os._exit(0)
    os.waitpid(child, 0)
print("all were tried")
"""


def test_every_module_imports_alone():
    """As the first of the package: an import that works only after another one would hide a cycle.

    Each in a process that has imported the libraries, and nothing of the package.
    """
    imported = set().union(*(imports_of(path, name) for name, path in MODULES.items()))
    tops = {name.split(".")[0] for name in imported} - {"llama_jax", "datasets", "tensorflow_datasets", "kagglehub"}
    known = [top for top in sorted(tops) if importlib.util.find_spec(top)]
    libraries = "".join(f"import {top}\n" for top in known)
    command = [sys.executable, "-W", "error::SyntaxWarning", "-c", libraries + ALONE, *MODULES]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "all were tried\n", (result.stdout, result.stderr[-1000:])


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
