"""What does a Python file import, wherever in the file it does so?"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Import:
    module: str  # absolute dotted name; `from a import b` gives "a.b", since b may be a module
    line: int
    eager: bool  # runs when the file is imported: not inside a function, not under `if TYPE_CHECKING`


def source_files() -> dict[str, Path]:
    """Every module of the engine by its import name, the files of `kernels/` as `dpo_engine.kernels`."""
    files = {}
    for path in sorted((ROOT / "dpo_engine").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        files[".".join(("dpo_engine", *path.relative_to(ROOT).with_suffix("").parts))] = path
    return files


def imports_of(source: str, module: str, *, is_package: bool = False) -> list[Import]:
    """Every import in `source`, the text of the module named `module`, with relative names made absolute.

    Counts `import`, `from ... import`, and `import_module("...")` and `__import__("...")` with a literal name.
    """
    return [
        Import(module=name, line=node.lineno, eager=eager)
        for node, eager in _walk(ast.parse(source), eager=True)
        for name in _names(node, module, is_package)
    ]


def _walk(node: ast.AST, *, eager: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        yield child, eager
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _walk(child, eager=False)
        elif isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for statement in child.body:
                yield statement, False
                yield from _walk(statement, eager=False)
            for statement in child.orelse:
                yield statement, eager
                yield from _walk(statement, eager=eager)
        else:
            yield from _walk(child, eager=eager)


def _names(node: ast.AST, module: str, is_package: bool) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = module.split(".")
            parents = parts[: len(parts) - node.level + is_package]
            base = ".".join([*parents, *([base] if base else [])])
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = ast.unparse(node.func).rsplit(".", 1)[-1]
        if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            return [node.args[0].value]
    return []
