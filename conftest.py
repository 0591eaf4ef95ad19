"""Which modules have no doctests to run where an extra is not installed, as transformers is not on Python 3.10."""

from importlib.util import find_spec

_CONVERSION = "src/idl/nn/conversion"
collect_ignore = [] if find_spec("transformers") else [f"{_CONVERSION}/convert.py", f"{_CONVERSION}/huggingface.py"]
