"""Long work that can be killed at any moment: the engine under quantize, convert and dequantize.

A job writes into `DST.unfinished/` and renames it to DST when all is there, so DST is either absent or complete.

    job.json               what was asked, and of which source
    <shard>.<pid>.partial  being written; renamed when its bytes are on the disk
    records/<shard>.json   checksums of a finished shard and the report of its steps
    manifest               all records, once every shard is finished: from here on only the renaming is left

A second run with the same request keeps the shards whose content still has its recorded checksum and makes the rest.
The result does not depend on kills, the number of workers or the clock.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .byteio import keep_freed_memory
from .config import load_json
from .errors import DestinationError
from .fingerprint import fingerprint, require_same
from .report import error_summary, left_alone
from .shards import Shard
from .steps import Step
from .writer import ShardWriter, index_of, shard_checksums, sync_folder, write_json

MANIFEST = "blockscale_manifest.json"
UNFINISHED = ".unfinished"
_RECORDS, _REQUEST, _LOCK = "records", "job.json", ".lock"
_TELL = 1 << 24
"""Bytes of a source between two "advance" events."""

Event = Mapping[str, Any]
"""What progress bars and --json lines are made of: {"event": "start", shards, bytes}, {"event": "advance", name,
bytes}, {"event": "shard", name, bytes}, {"event": "done", …} (`scaleout.carry_out`). bytes are the source's."""
Listener = Callable[[Event], None]


@dataclass(frozen=True)
class Job:
    """Everything that fixes the result.

    tool, options: the request, JSON-able. source: the folder or file read. files: its files, for `fingerprint`.
    finish: writes config and other small files into the folder it is given, from all step records.
    strict: option values that only refuse (`nan="error"`): what was written under them holds under any other value,
    so a run that was refused can go on with the refusal lifted.
    """

    tool: str
    source: Path
    dst: Path
    options: Mapping[str, Any]
    files: tuple[Path, ...]
    shards: tuple[Shard, ...]
    finish: Callable[[Path, Sequence[Mapping[str, Any]]], None]
    strict: Mapping[str, Any] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        return self.dst.with_name(self.dst.name + UNFINISHED)

    @property
    def request(self) -> dict[str, Any]:
        return {"tool": self.tool, "options": dict(self.options), "source": fingerprint(self.files)}


@dataclass(frozen=True)
class Result:
    """path: the checkpoint written. existed: it was complete already. kept: shards of an earlier run that were used.

    records: of every step, in order.
    """

    path: Path
    existed: bool
    kept: int
    shards: int
    records: tuple[Mapping[str, Any], ...]


def run_job(job: Job, listen: Listener = lambda event: None) -> Result:
    """Do what is not done yet, in this process.

    Raises DestinationError when DST (or its unfinished folder) is something else; OSError when the disk is full or
    read-only, with the unfinished folder left for the next run.
    """
    if finished := already_done(job):
        return finished
    with prepared(job):
        tell_start(job.shards, listen)
        kept = run_shards(job, job.shards, listen)
        return conclude(job, kept)


def already_done(job: Job) -> Result | None:
    """The result if DST is complete and of the same request. Raises DestinationError when it is anything else."""
    if not job.dst.exists() and not job.dst.is_symlink():
        return None
    if job.dst.is_dir() and not any(job.dst.iterdir()):
        return None
    if not (job.dst / MANIFEST).is_file():
        raise DestinationError(f"{job.dst}: exists and was not made by blockscale; it is left as it is")
    manifest = load_json(job.dst / MANIFEST)
    steps = tuple(step for record in manifest["shards"] for step in record["steps"])
    _check_same(job, manifest, job.dst, steps)
    return Result(job.dst, True, len(job.shards), len(job.shards), steps)


def _check_same(job: Job, old: Mapping[str, Any], where: Path, recorded: Iterable[Mapping[str, Any]]) -> None:
    steps = (step for shard in job.shards for step in shard.steps)
    require_same(job.request, old, where, strict=job.strict, recorded=recorded, steps=steps)


@contextmanager
def prepared(job: Job) -> Iterator[None]:
    """The unfinished folder, ours alone for as long as the block runs."""
    work = job.work
    if work.exists() and not work.is_dir():
        raise DestinationError(f"{work}: exists and is no folder")
    try:
        job.dst.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as e:
        raise DestinationError(f"{job.dst}: needs a folder to lie in, {e.filename} is a file") from e
    work.mkdir(exist_ok=True)
    with (work / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise DestinationError(f"{work}: another run is writing here") from e
        if not job.dst.exists() and not work.is_dir():
            raise DestinationError(f"{work}: another run has just finished")
        # at the very end only the latter is there
        asked = [path for path in (work / _REQUEST, work / MANIFEST) if path.is_file()]
        if asked:
            _check_same(job, load_json(asked[0]), work, _known_steps(job))
        elif stray := next((p for p in work.iterdir() if p.name != _LOCK and not p.name.endswith(".partial")), None):
            raise DestinationError(f"{work}: holds {stray.name} and no {_REQUEST}: not an unfinished run")
        for leftover in work.glob("*.partial"):
            leftover.unlink()
        write_json(work / _REQUEST, job.request)  # first: what lies here without it is a stranger's
        (work / _RECORDS).mkdir(exist_ok=True)
        try:
            yield
        except CheckpointError:
            if not any((work / _RECORDS).iterdir()):
                shutil.rmtree(work)  # refused before anything was made: leave no trace
            raise


def tell_start(shards: Sequence[Shard], listen: Listener) -> None:
    """The first event: what is to be done."""
    listen({"event": "start", "shards": len(shards), "bytes": sum(shard.nbytes_in for shard in shards)})


def tell_done(result: Result, listen: Listener) -> None:
    """The last event: what was done (`scaleout.carry_out`)."""
    said = {"path": str(result.path), "existed": result.existed, "shards": result.shards, "kept": result.kept}
    listen(
        {
            "event": "done",
            **said,
            "tensors": len(result.records),
            **error_summary(result.records),
            "left": [left["name"] for left in left_alone(result.records)],
        }
    )


def run_shards(job: Job, shards: Iterable[Shard], listen: Listener) -> int:
    """Make the shards that are not there yet. Returns how many were."""
    keep_freed_memory()
    kept = 0
    for shard in shards:
        if _is_kept(job, shard):
            kept += 1
            listen({"event": "advance", "name": shard.name, "bytes": shard.nbytes_in})
        else:
            _make(job, shard, listen)
        listen({"event": "shard", "name": shard.name, "bytes": shard.nbytes_in})
    return kept


def conclude(job: Job, kept: int) -> Result:
    """Small files, index, manifest, and the rename that makes DST exist. All shards must be finished."""
    work = job.work
    records = [_read_record(job, shard) for shard in job.shards]
    missing = [shard.name for shard, record in zip(job.shards, records, strict=True) if record is None]
    if missing:
        raise CheckpointError(f"{work}: shard {missing[0]} was not finished")
    done = [record for record in records if record is not None]
    steps = tuple(step for record in done for step in record["steps"])
    job.finish(work, steps)
    if len(job.shards) > 1:
        write_json(work / "model.safetensors.index.json", index_of((s.name, s.specs) for s in job.shards))
    write_json(work / MANIFEST, {**job.request, "shards": done})
    shutil.rmtree(work / _RECORDS)
    (work / _REQUEST).unlink(missing_ok=True)
    for leftover in work.glob("*.partial"):
        leftover.unlink()
    (work / _LOCK).unlink(missing_ok=True)
    sync_folder(work)
    work.rename(job.dst)
    sync_folder(job.dst.parent)
    return Result(job.dst, False, kept, len(job.shards), steps)


def _make(job: Job, shard: Shard, listen: Listener) -> None:
    with ShardWriter(job.work / shard.name, shard.specs) as writer:
        steps = []
        for step in shard.steps:
            advance = _Advance(step, listen)
            steps.append(step.run(writer.write, advance))
            advance.finish()
    record = {"shard": shard.name, "size": writer.size, "checksums": writer.checksums(), "steps": steps}
    write_json(_record_path(job, shard), record)


class _Advance:
    """Tells of the bytes of a step that were dealt with, but not a thousand times a second."""

    def __init__(self, step: Step, listen: Listener) -> None:
        self._step, self._listen = step, listen
        self._waiting, self._left = 0, step.nbytes

    def __call__(self, n: int) -> None:
        self._waiting += n
        if self._waiting >= _TELL:
            self._tell(self._waiting)

    def finish(self) -> None:
        """What was not told yet, scales and all."""
        self._tell(self._left)

    def _tell(self, n: int) -> None:
        self._listen({"event": "advance", "name": self._step.name, "bytes": n})
        self._waiting, self._left = 0, self._left - n


def _is_kept(job: Job, shard: Shard) -> bool:
    """Whether the shard is there with the content that its record says."""
    record, path = _read_record(job, shard), job.work / shard.name
    if record is None or not path.is_file() or path.stat().st_size != record["size"]:
        return False
    try:
        return bool(shard_checksums(path) == record["checksums"])
    except CheckpointError:
        return False


def _record_path(job: Job, shard: Shard) -> Path:
    return job.work / _RECORDS / f"{shard.name}.json"


def _read_record(job: Job, shard: Shard) -> dict[str, Any] | None:
    """From records/, or from the manifest when a run was killed between the two."""
    path = _record_path(job, shard)
    if path.is_file():
        return load_json(path)
    if (job.work / MANIFEST).is_file():
        shards = load_json(job.work / MANIFEST)["shards"]
        return next((r for r in shards if r["shard"] == shard.name), None)
    return None


def _known_steps(job: Job) -> Iterator[Mapping[str, Any]]:
    for shard in job.shards:
        if record := _read_record(job, shard):
            yield from record["steps"]
