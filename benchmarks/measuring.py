"""Time by turns, memory to the byte, and what the figures were measured on."""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Turns:
    """How often each contestant is run.

    Attributes:
        seconds: Rounds are begun until this much time is spent ...
        fewest: ... but at least so many,
        most: and at most so many.
        warm: Runs at the beginning of a turn that do not count: the others have emptied the caches.
        timed: Runs of a turn that count.
    """

    seconds: float
    fewest: int
    most: int
    warm: int
    timed: int


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a number of measurements."""

    median: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(values: list[float]) -> "Spread":
        """Return those of ``values``, two or more."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high, len(values))

    def json(self) -> dict[str, float]:
        """Return the numbers by name."""
        return asdict(self)


@dataclass(frozen=True)
class Times:
    """Milliseconds of each contestant, run by run, the runs of a round at the same place."""

    runs: Mapping[str, list[float]]

    def spread(self, name: str) -> Spread:
        """Return median and quartiles of one contestant."""
        return Spread.of(self.runs[name])

    def ratio(self, one: str, other: str) -> Spread:
        """Return median and quartiles of ``one / other``, both from the same round."""
        return Spread.of([a / b for a, b in zip(self.runs[one], self.runs[other], strict=True)])

    def json(self) -> dict[str, Any]:
        """Return median and quartiles of all contestants."""
        return {name: self.spread(name).json() for name in self.runs}


def timed_by_turns(contestants: Mapping[str, Callable[[], Any]], turns: Turns) -> Times:
    """Run the contestants in turn, round after round, each round beginning with another of them.

    Whatever the machine does meanwhile hits all of them alike.
    """
    names = list(contestants)
    runs: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        contestants[name]()
    begin = time.perf_counter()
    for k in range(turns.most):
        if k >= turns.fewest and time.perf_counter() - begin > turns.seconds:
            break
        first = k % len(names)
        for name in names[first:] + names[:first]:
            for _ in range(turns.warm):
                contestants[name]()
            for _ in range(turns.timed):
                start = time.perf_counter()
                contestants[name]()
                runs[name].append(1e3 * (time.perf_counter() - start))
    return Times(runs)


def peak_bytes(step: Callable[[], Any]) -> int:
    """Return the most CPU memory that torch held during ``step`` beyond what it held before, to the byte.

    Every allocation and release of torch's CPU allocator is in the profiler's trace, temporaries inside of
    operations too.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def graph_bytes(model: nn.Module, u: Tensor) -> int:
    """Return the bytes that the graph of ``model(u)`` keeps for the backward, beyond the parameters and ``u``."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (u, *model.parameters())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(u)  # held, so that no two storages of the graph have the same address
    del output
    return sum(kept.values())


def environment(packages: Iterable[str]) -> dict[str, Any]:
    """Return what the figures depend on and the settings do not say."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mkl": torch.backends.mkl.is_available(),
        "packages": {name: version(name) for name in packages},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
