"""The shape of the package: which way its stages lean, and the limits that keep them readable."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "surgery"

STAGES = (
    ("errors", "resources"),
    ("catalogue",),
    ("language",),
    ("algebra",),
    ("arguments", "live", "recipe"),
    ("rating", "naming", "derivation"),
    ("check", "include", "model"),
    ("calls",),
    ("report",),
    ("work", "difference"),
    ("site_class",),
    ("planned",),
    ("fit", "mixture", "sharing"),
    ("totals",),
    ("plan",),
    ("mapping",),
    ("coding",),
    ("nodes", "switch"),
    ("routing",),
    ("calling",),
    ("values",),
    ("lower",),
    ("described",),
    ("rewriting",),
    ("whole",),
    ("observation",),
    ("folding", "recomputing"),
    ("mounted",),
    ("mount", "materialize"),
    ("checksums", "precision", "combining"),
    ("streams",),
    ("corrections", "merge_report", "located", "quantized", "quantized_files"),
    ("merging", "partial"),
    ("merged",),
    ("state",),
    ("distributed", "placement", "trainable"),
    ("grouping", "status"),
    ("switching",),
    ("families",),
    ("bank",),
    ("choices", "freezing", "adapters", "reserving"),
    ("inverse",),
    ("digests", "store", "disk", "headers"),
    ("checkpoint",),
    ("shards", "tensor_diff"),
    ("manifest", "remade"),
    ("artifact",),
    ("swapping",),
    ("low_rank",),
    ("twin", "tensors", "conversion"),
    ("programs", "redistribution", "composed"),
    ("putting", "composition", "composable"),
    ("deriving",),
    ("runtime",),
    ("compiling",),
    ("allocation", "gradients"),
    ("verification", "explanation"),
    ("supported",),
    ("__init__",),
    ("integrations",),
    ("skeleton", "file_ranks", "file_places"),
    ("file_quantized", "joined", "folder_needs"),
    ("loading", "folder_shapes"),
    ("folder_sites", "extraction"),
    ("file_plan", "file_record"),
    ("file_tensors", "file_left"),
    ("file_after",),
    ("file_merge",),
    ("file_unmerge",),
    ("composing",),
    ("compat", "inspection"),
    ("cli",),
)
"""The stages in the order in which a spec flows; what stands together is independent."""

BY_NAME = {
    "__init__.py",
    "artifact.py",
    "model/hooked.py",
    "integrations/factories.py",
    "integrations/transformers.py",
}
"""The modules that import another by its name: what is public and not needed at first; an
integration, when a model or a folder asks for it; a library; and the trusted function that a
caller names for a model or for data."""

LATE = (
    "safetensors",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "torchao",
    "typer",
    "rich",
    "einops",
)
"""What `import surgery` must not import: each costs more than the package itself."""

OF_MODELS = {("model.roles", "bottleneck")}
"""What models call a module of theirs, and a method is called as well."""

METHODS = tuple(sorted(path.stem for path in (ROOT / "specs" / "methods").glob("*.peft")))
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 450, 50


@cache
def modules() -> Mapping[str, Path]:
    """All modules by their dotted name below the package; `__init__` for the package itself."""
    found: dict[str, Path] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"] = path
    return found


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


def imports(name: str) -> set[str]:
    """The package's own modules that a module imports, inside functions too, but not for types."""
    return {target for node in _running(tree(name)) for target in _targets(node)}


def _running(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _running(child)


def _targets(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names):
            yield from (_known(n.name) for n in names if n.name.partition(".")[0] == "surgery")
        case ast.ImportFrom(module=str(module), names=names) if (
            module.partition(".")[0] == "surgery"
        ):
            yield from (_known(f"{module}.{n.name}") for n in names)
        case _:
            return


def _known(dotted: str) -> str:
    """The module that a dotted name is, or is in."""
    name = dotted.removeprefix("surgery").removeprefix(".")
    while name and name not in modules():
        name = name.rpartition(".")[0]
    return name or "__init__"


def stage(name: str) -> int:
    top = name.partition(".")[0]
    return next(i for i, stages in enumerate(STAGES) if top in stages)


def test_every_module_belongs_to_a_stage() -> None:
    known = {name for stages in STAGES for name in stages}
    assert {name.partition(".")[0] for name in modules()} <= known


@pytest.mark.parametrize("name", modules())
def test_a_stage_imports_only_what_stands_before_it(name: str) -> None:
    own = name.partition(".")[0]
    for target in imports(name):
        inside = target.partition(".")[0] == own
        assert inside or stage(target) < stage(name), f"{name} imports {target}"


def test_no_module_imports_itself_in_a_circle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for target in imports(name):
                visit(target, (*path, name))
            done.add(name)

    for name in modules():
        visit(name, ())


def test_few_modules_import_others_by_name() -> None:
    found = {
        str(path.relative_to(PACKAGE))
        for path in modules().values()
        if re.search(r"import_module|__import__", path.read_text(encoding="utf-8"))
    }
    assert found == BY_NAME


@pytest.mark.parametrize("name", modules())
def test_no_method_is_known_by_name(name: str) -> None:
    if name.startswith("compat"):
        return
    text = modules()[name].read_text(encoding="utf-8")
    others = (method for method in METHODS if (name, method) not in OF_MODELS)
    assert not re.findall(rf"\b({'|'.join(others)})\b", text, re.IGNORECASE)


@pytest.mark.parametrize("name", modules())
def test_modules_and_functions_are_short(name: str) -> None:
    text = modules()[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MOST_LINES_OF_A_FUNCTION, node.name


def test_the_package_imports_late_what_is_expensive() -> None:
    code = f"import sys, surgery; print(*[m for m in {LATE!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_nothing_is_evaluated_but_what_torch_wrote() -> None:
    """`exec`, `eval` and `compile` run in one place, on the source of a graph built here."""
    found: dict[str, list[str]] = {}
    for name in modules():
        for node in ast.walk(tree(name)):
            match node:
                case ast.Call(func=ast.Name(id="exec" | "eval" | "compile" as called)):
                    found.setdefault(name, []).append(called)
                case _:
                    continue
    assert found == {"coding": ["exec", "compile"]}
