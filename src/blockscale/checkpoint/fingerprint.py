"""Is this the request that an earlier run was given, and is its source still what it was?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import DestinationError
from .names import module_of
from .steps import Step


def fingerprint(files: Sequence[Path]) -> dict[str, Any]:
    """size, time of change and a hash of the header (or of all of a small file) of every source file."""
    return {path.name: _file_fingerprint(path) for path in files}


def _file_fingerprint(path: Path) -> dict[str, Any]:
    stat = path.stat()
    with path.open("rb") as f:
        head = f.read(8)
        claimed = int.from_bytes(head, "little") if path.suffix == ".safetensors" else 1 << 20
        head += f.read(min(claimed, stat.st_size))
    times = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}
    return {**times, "head": hashlib.sha256(head).hexdigest()}


def require_same(
    request: Mapping[str, Any],
    old: Mapping[str, Any],
    where: Path,
    *,
    strict: Mapping[str, Any],
    recorded: Iterable[Mapping[str, Any]],
    steps: Iterable[Step],
) -> None:
    """Raise DestinationError unless `old`, found in `where`, is the same request of the same, unchanged source.

    strict: option values that may have become others (`Job.strict`). recorded: what the earlier run noted of its steps;
    steps: those of this one.

    Files whose times differ (a copied or touched source) are compared by content: every tensor that the earlier run
    has read is read again and must have the checksum that was recorded.
    """
    new = json.loads(json.dumps(request))
    options = dict(old.get("options", {}))
    options |= {key: new["options"][key] for key, strict in strict.items() if options.get(key) == strict}
    for key, value in (("tool", old.get("tool")), ("options", options)):
        if value != new[key]:
            raise DestinationError(f"{where}: holds {_request_text(old)}, asked for {_request_text(new)}; delete one")
    before, now = old.get("source", {}), new["source"]
    for name in sorted(before.keys() | now.keys()):
        if name not in now or name not in before:
            raise DestinationError(f"{where}: the source changed: {name} {'is gone' if name in before else 'is new'}")
        if any(before[name].get(key) != now[name][key] for key in ("size", "head")):
            raise DestinationError(f"{where}: the source changed: {name} is not what it was")
    if before == now:
        return
    sums = {note["name"]: note["checksum"] for note in recorded}
    for step in steps:
        output = step.outputs[0].name
        said = sums.get(output, sums.get(module_of(output)))
        if said is not None and step.checksum() != said:
            raise DestinationError(f"{where}: the source changed: {step.name} has other values than before")


def _request_text(request: Mapping[str, Any]) -> str:
    options = ", ".join(f"{k}={v}" for k, v in request.get("options", {}).items() if v not in (None, [], False))
    return f"{request.get('tool')} ({options})"
