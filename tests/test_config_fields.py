"""Every field of every config is read by some code: a flag that nothing reads is a promise that is not kept."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "llama_jax"
MODULES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def is_dataclass(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(mark) for mark in node.decorator_list)


def fields_of(node: ast.ClassDef) -> list[str]:
    return [line.target.id for line in node.body if isinstance(line, ast.AnnAssign)]


def reads_of(tree: ast.AST) -> set[str]:
    """Names of all attributes that are read, other than by the check that a dataclass makes of itself."""
    checks = [node for node in ast.walk(tree) if getattr(node, "name", "") == "__post_init__"]
    own = {id(node) for check in checks for node in ast.walk(check)}
    attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and id(node) not in own)
    return {node.attr for node in attributes if isinstance(node.ctx, ast.Load)}


CLASSES = {node.name: (path, node) for path, tree in MODULES.items() for node in ast.walk(tree) if is_dataclass(node)}
CONFIGS = [
    *sorted(name for name in CLASSES if name.endswith("Config")),
    "Compute",
    "Output",
    "Overrides",
    "RopeScaling",
]


READ = {path: reads_of(tree) for path, tree in MODULES.items()}
IMPORTED = {
    path: {alias.name for line in ast.walk(tree) if isinstance(line, ast.ImportFrom) for alias in line.names}
    for path, tree in MODULES.items()
}


def unread(name: str) -> set[str]:
    """Fields that no module reads which knows the class, or a config that holds it: others may mean another's."""
    path, node = CLASSES[name]
    holders = [
        holder
        for holder, (_, other) in CLASSES.items()
        if any(name in ast.unparse(line.annotation) for line in other.body if isinstance(line, ast.AnnAssign))
    ]
    knowing = [module for module in MODULES if module == path or IMPORTED[module] & {name, *holders}]
    return set(fields_of(node)) - set().union(*(READ[module] for module in knowing))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_is_read(name):
    assert fields_of(CLASSES[name][1]) and not unread(name)


def test_a_check_alone_is_no_use():
    code = "class A:\n    x: int\n    y: int\n    def __post_init__(self):\n        check(self.x)\nuse(a.y)"
    tree = ast.parse(code)
    assert set(fields_of(tree.body[0])) - reads_of(tree) == {"x"}
