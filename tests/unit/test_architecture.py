"""The rooms of the package: imports point one way, each outside framework has one seam, and files stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "exlm_dist"
FILES = sorted(PACKAGE.rglob("*.py"))

BASE = {"config", "utils"}
MAY_IMPORT = {
    "utils": set(),
    "config": {"utils"},
    "kernels": BASE,
    "data": BASE,
    "parallel": BASE,
    "launch": BASE,
    "tracking": BASE,
    "model": BASE | {"kernels", "data", "parallel"},
    "planning": BASE | {"model"},
    "training": BASE | {"kernels", "data", "parallel", "launch", "tracking", "model"},
    "evaluation": BASE | {"kernels", "data", "parallel", "tracking", "model"},
    "analysis": BASE | {"kernels", "data", "tracking", "model", "evaluation"},
    "export": BASE | {"kernels", "data", "model"},
}
SEAMS = {
    "megatron": ("parallel/",),
    "deepspeed": ("parallel/", "training/"),
    "triton": ("kernels/",),
    "webdataset": ("data/",),
    "mlflow": ("tracking",),
    "transformers": ("export/",),
    "rdkit": ("data/", "evaluation/", "analysis/"),
    "matplotlib": ("analysis/",),
}
#: Kernels are long and untyped by nature; they are held to their tests instead.
KERNELS = {path for path in FILES if path.name == "triton.py" or "triton" in path.parts}
LONGEST_FILE = 400
LONGEST_FUNCTION = 80


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import in the file, also those inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found.append((node.lineno, node.module or ""))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way_and_frameworks_stay_behind_their_seam(path):
    own, inside = room(path), str(path.relative_to(PACKAGE))
    for line, module in imported(path):
        parts = module.split(".")
        if parts[0] == "exlm_dist" and len(parts) > 1 and own in MAY_IMPORT and parts[1] != own:
            assert parts[1] in MAY_IMPORT[own], f"{path}:{line}: {own} may not import {parts[1]}"
        if parts[0] in SEAMS:
            assert inside.startswith(SEAMS[parts[0]]), f"{path}:{line}: {parts[0]} belongs in {SEAMS[parts[0]]}"


@pytest.mark.parametrize(
    "path", [path for path in FILES if path not in KERNELS], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= LONGEST_FILE, f"{path} has more than {LONGEST_FILE} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{path}:{node.lineno}: {node.name} has {length} lines"


@pytest.mark.parametrize(
    "path", [path for path in FILES if path not in KERNELS], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_public_functions_are_documented_and_typed(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if isinstance(node, ast.ClassDef) or node.col_offset == 0:
            assert ast.get_docstring(node), f"{path}:{node.lineno}: {node.name} has no docstring"
        if isinstance(node, ast.FunctionDef) and node.col_offset == 0:
            assert node.returns is not None, f"{path}:{node.lineno}: {node.name} has no return type"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_pickle_is_read(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            safe = (
                keywords.get("weights_only") == "True"
                if "torch" in ast.unparse(node.func)
                else keywords.get("allow_pickle", "False") == "False"
            )
            assert safe, f"{path}:{node.lineno}: may read a pickle"
    assert not any(module.split(".")[0] in ("pickle", "dill", "cloudpickle") for _, module in imported(path))
