"""Imports go down only: the floors of the package, held by reading every import statement.

    7 faces        cli, serve, loadtest, llm, async_llm, bench, draw, progress, train; benchmarks/
    6 engine       engine
    5 draft        draft
    4 run          run
    3 models       models: of the floors below, only the ground and ops
    2 mechanism    ops, cache, text, grammar: not each other, and no tree
    1 mathematics  structured < request < outputs < tree < history < logits < sampling
                   < verify < baselines < lumping
    0 ground       errors < paths < config < dist

Imports inside functions and under TYPE_CHECKING count as well.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "specinfer"

GROUND = ("errors", "paths", "config", "dist")
MATHEMATICS = (
    *("structured", "request", "outputs", "tree", "history", "logits", "sampling", "verify"),
    *("baselines", "lumping"),
)
MECHANISM = ("ops", "cache", "text", "grammar")
FACES = (
    *("cli", "serve", "loadtest", "train", "llm", "async_llm", "bench", "draw", "progress"),
    "__main__",
)
FLOORS: dict[str, int] = {
    **dict.fromkeys(GROUND, 0),
    **dict.fromkeys(MATHEMATICS, 1),
    **dict.fromkeys(MECHANISM, 2),
    "models": 3,
    "run": 4,
    "draft": 5,
    "engine": 6,
    **dict.fromkeys(FACES, 7),
    "zoo": 7,  # data: nothing imports it and it imports nothing
}
# What is tested in milliseconds because it knows no tensor
WITHOUT_TORCH = (
    *("errors.py", "config.py", "request.py", "outputs.py", "tree.py", "verify.py", "baselines.py"),
    "lumping.py",
    *("cache/blocks.py", "engine/scheduler.py", "engine/times.py", "engine/chains.py"),
    *("engine/choice.py", "engine/goodput.py", "engine/host.py", "engine/lengths.py"),
    *("engine/stats.py", "engine/trial.py", "engine/urgency.py"),
    *("text/stream.py", "text/template.py", "text/tokenizer.py"),
)


def module_name(path: Path) -> str:
    """specinfer/cache/pool.py → specinfer.cache.pool"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, as absolute names of modules."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


def concept(module: str) -> str:
    """specinfer.cache.pool → cache"""
    return module.split(".")[1]


def complaint(importer: str, imported: str) -> str | None:
    """Why one part of the package may not import another; None if it may."""
    if importer == imported:
        return None
    if FLOORS[imported] > FLOORS[importer]:
        return "imports go down only"
    for order in (GROUND, MATHEMATICS):
        if {importer, imported} <= set(order) and order.index(imported) > order.index(importer):
            return f"the order is {' < '.join(order)}"
    if {importer, imported} <= set(MECHANISM):
        return "mechanisms do not import each other"
    if importer in MECHANISM and imported in MATHEMATICS[MATHEMATICS.index("tree") :]:
        return "a mechanism knows no tree: a mask is a tensor there"
    if importer == "models" and imported not in (*GROUND, "ops"):
        return "models know no cache, no request and no tree"
    return None


def inner_imports(path: Path) -> list[str]:
    return [name for name in imports(path) if name.startswith("specinfer.")]


def test_every_module_has_a_floor() -> None:
    concepts = {concept(module) for module in MODULES if module != "specinfer"}
    assert concepts <= set(FLOORS), "say on which floor it stands"


@pytest.mark.parametrize("module", [module for module in MODULES if module != "specinfer"])
def test_imports_go_down_only(module: str) -> None:
    complaints = [
        f"{module} imports {imported}: {reason}"
        for imported in inner_imports(MODULES[module])
        if (reason := complaint(concept(module), concept(imported)))
    ]
    assert not complaints


@pytest.mark.parametrize("module", MODULES)
def test_the_package_does_not_know_its_tests_and_benchmarks(module: str) -> None:
    outside = {name.split(".")[0] for name in imports(MODULES[module])}
    assert not outside & {"tests", "benchmarks"}


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_what_knows_no_tensor(name: str) -> None:
    assert not {"torch", "transformers"} & {
        imported.split(".")[0]
        for imported in imports(PACKAGE / name)
        # the one slow import of text, made only where a tokenizer has to be converted
        if (name, imported) != ("text/tokenizer.py", "transformers")
    }


def test_no_module_imports_itself_round_a_corner() -> None:
    """No cycles among imports that run; those under TYPE_CHECKING do not."""
    graph = {}
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if not isinstance(node, ast.If)]
        names = {
            node.module
            if f"{node.module}.{alias.name}" not in MODULES
            else f"{node.module}.{alias.name}"
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }
        graph[module] = {name for name in names if name in MODULES}
    while leaves := [module for module, needs in graph.items() if not needs & graph.keys()]:
        for leaf in leaves:
            del graph[leaf]
    assert not graph, "these import each other"


@pytest.mark.parametrize(
    ("importer", "imported", "word"),
    [
        ("cache", "ops", "mechanisms"),
        ("ops", "tree", "mask"),
        ("tree", "sampling", "order"),
        ("errors", "config", "order"),
        ("models", "request", "models"),
        ("models", "cache", "models"),
        ("run", "draft", "down"),
        ("engine", "llm", "down"),
    ],
)
def test_the_rules_refuse_what_they_should(importer: str, imported: str, word: str) -> None:
    assert word in (complaint(importer, imported) or "")
