"""The rooms of the package: imports point one way, each outside framework has one seam, and files stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "exlm_dist"
FILES = sorted(PACKAGE.rglob("*.py"))

#: The floors of the house, lowest first. A room imports from floors below its own, of those what `MAY_IMPORT` says.
FLOORS = (
    {"utils"},
    {"config"},
    {"checkpoint", "kernels", "launch", "tables", "tokenizers", "tracking"},
    {"data", "parallel"},
    {"model", "prepare"},
    {"inference"},
    {"evaluation", "export", "finetuning", "planning", "training"},
    {"suites"},
    {"analysis", "doctor"},
    {"cli"},
)
BASE = {"config", "utils"}
MAY_IMPORT = {
    "utils": set(),
    "config": {"utils"},
    "checkpoint": BASE,
    "kernels": BASE,
    "launch": BASE,
    "tables": {"utils"},
    "tokenizers": BASE,
    "tracking": BASE,
    "data": BASE | {"tokenizers"},
    "parallel": BASE | {"checkpoint", "kernels"},
    "prepare": BASE | {"data", "tables", "tokenizers"},
    "model": BASE | {"kernels", "data", "parallel"},
    "inference": BASE | {"checkpoint", "data", "kernels", "model", "tables", "tokenizers"},
    "planning": BASE | {"data", "model"},
    "training": BASE | {"checkpoint", "data", "launch", "model", "parallel", "tokenizers", "tracking"},
    "evaluation": BASE | {"checkpoint", "data", "inference", "model", "tokenizers", "tracking"},
    "finetuning": BASE | {"checkpoint", "data", "inference", "kernels", "model", "tables", "tokenizers", "tracking"},
    "export": BASE | {"checkpoint", "data", "model", "tokenizers", "tracking"},
    "suites": BASE
    | {"checkpoint", "data", "evaluation", "finetuning", "inference", "model", "tables", "tokenizers", "tracking"},
    "analysis": BASE
    | {"checkpoint", "data", "evaluation", "finetuning", "inference", "kernels", "model", "suites", "tables"}
    | {"tokenizers", "tracking"},
    "doctor": BASE | {"checkpoint", "data", "launch", "model", "parallel", "planning", "tracking"},
    "cli": BASE
    | {"analysis", "checkpoint", "doctor", "evaluation", "export", "finetuning", "inference", "launch", "planning"}
    | {"prepare", "suites", "tables", "tracking", "training"},
}
#: What `exlm_dist` itself offers in Python comes from the rooms that use checkpoints.
MAY_IMPORT_AT_THE_TOP = {"finetuning", "inference", "utils"}
#: Each outside framework has one seam.
SEAMS = {
    "megatron": ("parallel/tensor.py",),
    "deepspeed": ("parallel/pipeline.py", "training/engine/"),
    "triton": ("kernels/",),
    "webdataset": ("data/",),
    "braceexpand": ("data/shard_patterns.py",),
    "fsspec": ("data/remote.py",),
    "mlflow": ("tracking/",),
    "transformers": ("export/",),
    "rdkit": ("tokenizers/molecules.py", "prepare/", "evaluation/", "analysis/"),
    "matplotlib": ("analysis/",),
    "sentencepiece": ("tokenizers/",),
    "safetensors": ("export/", "finetuning/model_folder.py"),
    "sklearn": (
        "finetuning/",
        "suites/fingerprints.py",
        "suites/linear_probe.py",
        "suites/bag_of_words.py",
        "analysis/finetuning_figures.py",
    ),
    "scipy": ("suites/suite_table.py", "suites/bag_of_words.py"),
    "pyarrow": ("tables/",),
    "zstandard": ("tables/",),
    "torch": ("kernels/", "parallel/", "model/", "training/", "inference/", "evaluation/", "export/", "analysis/")
    + ("finetuning/",)
    + ("checkpoint/reader.py", "doctor/probe.py", "tracking/system.py"),
}
#: Code that is copied into an exported folder and never imported here; there it imports its neighbours.
COPIED = {path for path in FILES if path.parent == PACKAGE / "export" / "hf" and path.stem.endswith("_exlm")}
#: Kernels are long and untyped by nature; their tests are stricter instead.
KERNELS = {path for path in FILES if path.name == "triton.py" or "triton" in path.parts}
LONGEST_FILE = 400
LONGEST_FUNCTION = 60
#: Files of these names mean the same in every folder.
SAME_MEANING = {"__init__", "__main__"}
#: Former places of modules, which only say where they are now.
FORMER = {PACKAGE / "data" / "tokenizer.py"}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import in the file, also those inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path in COPIED, f"{path}:{node.lineno}: relative import"
            found.append((node.lineno, node.module or ""))
    return found


def imported_modules(path: Path, known: Iterable[str]) -> set[str]:
    """The modules of the package that the file imports, in functions too, but not for type checkers alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & set(known)
            found |= inner if len(inner) == len(node.names) else inner | {node.module or ""}
    return found & set(known)


def test_rooms_import_from_lower_floors_only():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    rooms = {path.relative_to(PACKAGE).parts[0] for path in FILES if path.parent != PACKAGE}
    assert floor.keys() == MAY_IMPORT.keys() == rooms
    for own, allowed in MAY_IMPORT.items():
        assert all(floor[other] < floor[own] for other in allowed), f"{own} may import from its own floor or above"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way_and_frameworks_stay_behind_their_seam(path):
    own, inside = room(path), str(path.relative_to(PACKAGE))
    allowed = MAY_IMPORT_AT_THE_TOP if path.parent == PACKAGE else MAY_IMPORT[own]
    for line, module in imported(path):
        parts = module.split(".")
        if parts[0] == "exlm_dist" and len(parts) > 1 and parts[1] != own:
            assert parts[1] in allowed, f"{path}:{line}: {own} may not import {parts[1]}"
        if parts[0] in SEAMS:
            assert inside.startswith(SEAMS[parts[0]]), f"{path}:{line}: {parts[0]} belongs in {SEAMS[parts[0]]}"


def test_what_is_copied_into_exports_needs_torch_and_transformers_alone():
    assert len(COPIED) == 3
    copied = {path.stem for path in COPIED}
    for path in COPIED:
        assert {module.split(".")[0] for _, module in imported(path)} <= {"torch", "transformers", *copied}
    for path in set(FILES) - COPIED:
        modules = {part for _, module in imported(path) for part in module.split(".")}
        assert not modules & copied, f"{path} imports what is only copied"


def test_no_module_imports_itself_by_way_of_others():
    modules = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in FILES}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    graph = {name: imported_modules(path, modules.keys()) - {name} for name, path in modules.items()}
    while free := [name for name, needs in graph.items() if not needs]:
        for name in free:
            del graph[name]
        for needs in graph.values():
            needs.difference_update(free)
    assert not graph, f"among these modules there is a circle: {sorted(graph)}"


def test_no_file_name_has_two_meanings():
    places: dict[str, list[str]] = {}
    for path in FILES:
        if path.stem not in SAME_MEANING and "kernels" not in path.parts and path not in FORMER:
            places.setdefault(path.stem, []).append(str(path.relative_to(PACKAGE)))
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_torch_stays_torch_in_the_packages_of_kernels():
    """Importing `kernels/<operation>/torch.py` sets the attribute `torch` of its package."""
    for path in FILES:
        if path.name == "__init__.py" and (path.parent / "torch.py").exists():
            assert not any(
                isinstance(node, ast.Import) and any(alias.name.startswith("torch") for alias in node.names)
                for node in ast.walk(ast.parse(path.read_text()))
            ), f"{path}: take names from torch (`from torch import Tensor`), not torch itself"


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
