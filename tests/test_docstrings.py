"""Code in docstrings and documents names what there is, and can be run as it stands."""

import ast
import builtins
import itertools
import re

from commands import ROOT

from configs import base

FOLDERS = ("diffusion", "configs", "benchmarks")
FILES = [ROOT / "main.py", *(p for f in FOLDERS for p in sorted((ROOT / f).rglob("*.py")))]
OTHERS = {"torchvision", "safetensors", "diffusers", "transformers"}
"""Packages whose names are their own."""
SECTIONS = {"config", *base.get_config()}
ENDINGS = {"py", "json", "jsonl", "npz", "png", "md", "csv", "txt", "safetensors"}


def defined(tree):
    """Every name that a file defines or imports, attributes included."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


TREES = {path: ast.parse(path.read_text()) for path in FILES}
NAMES = {path: defined(tree) for path, tree in TREES.items()}
KNOWN = set().union(*NAMES.values(), dir(builtins), dir(itertools), ["_replace", "replace"])
MODULES = {}
for path, names in NAMES.items():
    stem = path.parent.name if path.stem == "__init__" else path.stem
    MODULES.setdefault(stem, set()).update(names, [path.stem])
    MODULES.setdefault(path.parent.name, set()).add(path.stem)
    MODULES.setdefault(path.parents[1].name, set()).add(path.parent.name)


def code(text):
    """The pieces of a docstring that are Python: in double backquotes, or lines of their own."""
    for piece in [*re.findall(r"``([^`]+)``", text), *map(str.strip, text.splitlines())]:
        try:
            yield piece, ast.parse(piece)
        except (SyntaxError, ValueError):
            continue


def root(node):
    while isinstance(node, (ast.Attribute, ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return getattr(node, "id", "")


def unknown(tree, quoted):
    """Names that are called, or that a module of ours should have, and that are not there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and root(node.func) not in OTHERS:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name and name not in KNOWN:
                yield name
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and quoted:
            module = node.value.id not in SECTIONS and MODULES.get(node.value.id)
            if module and node.attr not in module | ENDINGS:
                yield f"{node.value.id}.{node.attr}"


def test_docstrings_name_what_there_is():
    wrong = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
                text = ast.get_docstring(node) or ""
                for piece, parsed in code(text):
                    for name in unknown(parsed, f"``{piece}``" in text):
                        wrong.append(f"{path.relative_to(ROOT)}: {name} in {piece}")
    assert not wrong, "\n".join(wrong)


def test_documents_import_what_they_use():
    for path in [ROOT / "README.md", *sorted(ROOT.glob("*/README.md"))]:
        for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
            tree = ast.parse(block)
            used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
            assert used <= defined(tree) | set(dir(builtins)), f"{path.name}: {block}"
            for name in unknown(tree, True):
                raise AssertionError(f"{path.name}: {name} in {block}")
