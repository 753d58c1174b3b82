"""`quantization_report.json`: what the quantization changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .writer import write_json

REPORT = "quantization_report.json"


def write_report(folder: Path, format: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Per-tensor error and a summary, from the records of a job's steps."""
    tensors = [{k: v for k, v in r.items() if k not in ("step", "checksum")} for r in records if "relative_error" in r]
    worst = sorted(tensors, key=lambda t: -t["relative_error"])
    summary = {
        "format": format,
        "quantized": len(tensors),
        "copied": sum(r["step"] == "copy" for r in records),
        "mean_relative_error": sum(t["relative_error"] for t in tensors) / max(1, len(tensors)),
        "worst": [t["name"] for t in worst[:10]],
    }
    write_json(folder / REPORT, {"summary": summary, "tensors": tensors})
