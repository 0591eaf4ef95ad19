import json
import subprocess
import sys

HEAVY = ["sklearn", "matplotlib", "rich", "typer", "pooch", "scipy", "torch._dynamo"]


def test_importing_idl_imports_none_of_the_extras():
    # What torch itself brings along is not ours to answer for.
    program = (
        "import json, sys, torch; before = set(sys.modules); import idl; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    imported = json.loads(done.stdout)
    assert "idl.nn.implicit_model" in imported
    assert [m for m in imported if any(m == heavy or m.startswith(heavy + ".") for heavy in HEAVY)] == []
