"""Measure the code of one or more folders, to compare it over time and with other projects.

    python -m tools.measure [--json] [FOLDER ...]          default: emkd

What is counted, over all *.py files below a folder:

    files             lines of a file, blank lines and comments included
    functions         lines from `def` to the last line of the body, without decorators and the function's docstring;
                      methods and nested functions count separately, and as a part of what holds them
    circles           groups of modules that import each other, directly or through others, as grimp sees them: imports
                      inside functions count, those under `if TYPE_CHECKING` do not. Of the folder's own modules; null
                      if the folder is no package
    type_ignores      comments with `type: ignore`, for each 1,000 lines
    annotated         share of functions that annotate what they return
    docstrings        share of public functions, classes and methods that have a docstring. Public: neither the name nor
                      that of the class around it starts with an underscore; nested functions are not public
    errors_named      share of those public docstrings whose function raises (`raise X` in its own body) that say
                      "Raises", or name an error (a word that ends in Error)
    shapes_named      share of those public docstrings whose signature has an array or a tensor (NDArray, ndarray,
                      Tensor) that have something in square brackets, or speak of a shape or a scalar

Medians and 90th percentiles are values of the sample (the lower median; nearest rank). A share of nothing is null.
"""

import argparse
import ast
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path

import grimp

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef

ARRAYS = re.compile(r"\b(NDArray|ndarray|Tensor)\b")
ERRORS = re.compile(r"\bRaises\b|\b\w*Error\b")
SHAPES = re.compile(r"\[[^\]\n]+\]|\bshapes?\b|\bscalars?\b")


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long things are, in lines. longest: (name, lines) of the three longest ones, the longest first"""

    count: int
    median: int
    p90: int
    longest: list[tuple[str, int]]

    @classmethod
    def of(cls, lines: Sequence[tuple[str, int]]) -> "Lengths":
        """From (name, lines) of each."""
        ordered = sorted(n for _, n in lines) or [0]
        at = {share: ordered[max(0, ceil(share * len(ordered)) - 1)] for share in (0.5, 0.9)}
        longest = sorted(lines, key=lambda entry: (-entry[1], entry[0]))[:3]
        return cls(count=len(lines), median=at[0.5], p90=at[0.9], longest=longest)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was found below a folder; the module's docstring defines each number."""

    files: Lengths
    functions: Lengths
    circles: list[list[str]] | None
    type_ignores: float | None
    annotated: float | None
    docstrings: float | None
    errors_named: float | None
    shapes_named: float | None


@dataclass(frozen=True, kw_only=True)
class Defined:
    """A function or class of a file. public: see the module's docstring"""

    name: str
    node: Definition
    public: bool


def measure(folder: Path) -> Measured:
    """Measure all files below a folder. SyntaxError if one of them is not Python."""
    texts = {file: file.read_text(encoding="utf-8") for file in sorted(folder.rglob("*.py"))}
    named = {file.relative_to(folder.parent).as_posix(): text for file, text in texts.items()}
    found = [entry for name, text in named.items() for entry in defined(ast.parse(text), f"{name}:")]
    functions = [entry for entry in found if isinstance(entry.node, Function)]
    documented = [entry for entry in found if entry.public and ast.get_docstring(entry.node)]
    n_lines = {name: len(text.splitlines()) for name, text in named.items()}
    ignores = sum(n_type_ignores(text) for text in named.values())
    return Measured(
        files=Lengths.of(list(n_lines.items())),
        functions=Lengths.of([(entry.name, n_code_lines(entry.node)) for entry in functions]),
        circles=circles(folder),
        type_ignores=1000 * ignores / sum(n_lines.values()) if any(n_lines.values()) else None,
        annotated=_share([entry.node.returns is not None for entry in functions if isinstance(entry.node, Function)]),
        docstrings=_share([ast.get_docstring(entry.node) is not None for entry in found if entry.public]),
        errors_named=_share([says(entry.node, ERRORS) for entry in documented if raises(entry.node)]),
        shapes_named=_share([says(entry.node, SHAPES) for entry in documented if has_arrays(entry.node)]),
    )


def defined(node: ast.AST, prefix: str, public: bool = True) -> Iterator[Defined]:
    """All functions and classes in a node. prefix: of their names;  public: whether the code around them is"""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            own = public and not child.name.startswith("_")
            yield Defined(name=f"{prefix}{child.name}", node=child, public=own)
            inner = own and isinstance(child, ast.ClassDef)
            yield from defined(child, f"{prefix}{child.name}.", inner)
        else:
            yield from defined(child, prefix, public)


def n_code_lines(node: Definition) -> int:
    """Lines of a function without decorators and without its docstring."""
    end = node.end_lineno or node.lineno
    docstring = 0
    if ast.get_docstring(node) is not None:
        first = node.body[0]
        docstring = (first.end_lineno or first.lineno) - first.lineno + 1
    return end - node.lineno + 1 - docstring


def n_type_ignores(text: str) -> int:
    """Comments with `type: ignore`; strings that contain it do not count."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type == tokenize.COMMENT and "type: ignore" in token.string for token in tokens)


def raises(node: Definition) -> bool:
    """Whether a function raises something by name in its own body, nested functions left out."""
    if isinstance(node, ast.ClassDef):
        return False
    return any(isinstance(inner, ast.Raise) and inner.exc is not None for inner in _own_body(node))


def has_arrays(node: Definition) -> bool:
    """Whether the signature of a function has an array or a tensor."""
    if isinstance(node, ast.ClassDef):
        return False
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    annotations = [argument.annotation for argument in arguments if argument is not None] + [node.returns]
    return any(ARRAYS.search(ast.unparse(annotation)) for annotation in annotations if annotation is not None)


def says(node: Definition, pattern: re.Pattern[str]) -> bool:
    """Whether the docstring has something that fits the pattern."""
    return pattern.search(ast.get_docstring(node) or "") is not None


def circles(folder: Path) -> list[list[str]] | None:
    """The groups of the folder's modules that import each other; None if it is no package."""
    if not (folder / "__init__.py").is_file():
        return None
    root = folder.resolve()
    names = [root.name]
    while (root.parent / "__init__.py").is_file():
        root = root.parent
        names.insert(0, root.name)
    sys.path.insert(0, str(root.parent))
    try:
        graph = grimp.build_graph(names[0], cache_dir=None, exclude_type_checking_imports=True)
    finally:
        sys.path.remove(str(root.parent))
    package = ".".join(names)
    own = sorted({package, *graph.find_descendants(package)})
    reached = {module: _reached(graph, module) for module in own}
    groups = {
        tuple(other for other in own if other == module or (other in reached[module] and module in reached[other]))
        for module in own
    }
    return sorted(list(group) for group in groups if len(group) > 1)


def report(name: str, found: Measured) -> str:
    """What is printed of a folder."""
    circle_text = "unknown (no package)" if found.circles is None else str(len(found.circles))
    lines = [
        name,
        f"  files                    {_lengths(found.files)}",
        f"  functions                {_lengths(found.functions)}",
        *(f"      {length:4} lines  {function}" for function, length in found.functions.longest),
        f"  import circles           {circle_text}",
        *(f"      {' <-> '.join(circle)}" for circle in found.circles or []),
        f"  type: ignore, per 1,000  {'-' if found.type_ignores is None else f'{found.type_ignores:.1f}'}",
        f"  annotated returns        {_percent(found.annotated)}",
        f"  public docstrings        {_percent(found.docstrings)}",
        f"    that name errors       {_percent(found.errors_named)}",
        f"    that name shapes       {_percent(found.shapes_named)}",
    ]
    return "\n".join(lines)


def _own_body(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Definition | ast.Lambda):
            yield child
            yield from _own_body(child)


def _reached(graph: grimp.ImportGraph, module: str) -> set[str]:
    """The modules that a module imports, directly or through others."""
    seen: set[str] = set()
    ahead = [module]
    while ahead:
        for imported in graph.find_modules_directly_imported_by(ahead.pop()) - seen:
            seen.add(imported)
            ahead.append(imported)
    return seen


def _share(answers: Sequence[bool]) -> float | None:
    return sum(answers) / len(answers) if answers else None


def _lengths(found: Lengths) -> str:
    longest = found.longest[0][1] if found.longest else 0
    return f"{found.count:5}   lines: median {found.median}, 90th percentile {found.p90}, longest {longest}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("emkd")], metavar="FOLDER")
    parser.add_argument("--json", action="store_true", help="print one JSON object: folder -> numbers")
    called = parser.parse_args(words)
    for folder in called.folders:
        if not folder.is_dir():
            parser.error(f"{folder}: not a folder")
    found = {str(folder): measure(folder) for folder in called.folders}
    if called.json:
        print(json.dumps({name: asdict(entry) for name, entry in found.items()}, indent=2))
    else:
        print("\n\n".join(report(name, entry) for name, entry in found.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
