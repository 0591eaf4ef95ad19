"""The saved introduction.ipynb: whole, run from top to bottom, with public names only. `make notebook` runs it."""

import ast
import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "introduction.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def source_of(cell):
    return "".join(cell["source"])


def private_names_of_idl(source):
    """Return underscore names that a source imports, and those that it reads of anything."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            found.append(node.attr)
    return [name for name in found if re.search(r"(^|\.)_(?!_)", name)]


def test_every_cell_was_run_once_and_in_order():
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell["id"])
def test_a_cell_has_the_outputs_that_it_makes_and_no_other(cell):
    kinds = {output["output_type"] for output in cell["outputs"]}
    assert "error" not in kinds
    assert not [output for output in cell["outputs"] if output.get("name") == "stderr"]  # no warnings, no bars
    source = source_of(cell)
    assert ("print(" in source) == ("stream" in kinds)
    assert ("plt.show()" in source) == ("display_data" in kinds)


def test_the_notebook_reads_public_names_only():
    assert [name for cell in CELLS for name in private_names_of_idl(source_of(cell))] == []


def test_a_private_name_would_be_found():
    assert private_names_of_idl("import idl._a") == ["idl._a"]
    assert private_names_of_idl("from idl.linalg import _b") == ["idl.linalg._b"]
    assert private_names_of_idl("model._c + model.__class__") == ["_c"]


def test_every_import_from_idl_is_in_the_list_of_its_module():
    for node in ast.walk(ast.parse("\n".join(map(source_of, CELLS)))):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "idl":
            module = pytest.importorskip(node.module)
            assert [alias.name for alias in node.names if alias.name not in module.__all__] == []


def test_the_file_is_small_and_says_nothing_of_the_machine_that_wrote_it():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 1_500_000
    assert not re.search(r"/tmp/|/home/|/root/|site-packages", text)
    notebook = json.loads(text)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert all(cell["metadata"] == {} for cell in notebook["cells"])  # no times of execution
