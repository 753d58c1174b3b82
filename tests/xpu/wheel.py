"""Whether a wheel of vllm-xpu-kernels still has the ops that our adapters were written for.

    pip download --no-deps vllm-xpu-kernels
    python tests/xpu/wheel.py vllm_xpu_kernels-*.whl

Looks for the registration strings in the wheel's libraries; nothing of it is loaded. Exit 1 with every op that is not
there as `src/blockscale/kernels/xpu/schemas.json` says.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from pathlib import Path

import blockscale

RECORD = Path(blockscale.__file__).parent / "kernels" / "xpu" / "schemas.json"
_SCHEMA = re.compile(rb"(?<![\w.])([a-z]\w+)(\([^()]*(?:\([^()]*\)[^()]*)*\) ?-> ?[\w()\[\], ]+)\0")


def registered(wheel: Path) -> dict[str, str]:
    """Full name of each op -> its schema, one space between words, from the strings of `_C` and `_xpu_C`."""
    found = {}
    with zipfile.ZipFile(wheel) as z:
        for member in z.namelist():
            match = re.search(r"/(_C|_xpu_C)\.[^/]*so$", member)
            if match:
                for name, rest in _SCHEMA.findall(z.read(member)):
                    found[f"{match[1]}::{name.decode()}"] = normal(f"{match[1]}::{(name + rest).decode()}")
    return found


def normal(schema: str) -> str:
    return re.sub(r"\s+", " ", schema).replace("( ", "(").replace(" )", ")").strip()


def main() -> int:
    wheel, record = Path(sys.argv[1]), json.loads(RECORD.read_text())
    found = registered(wheel)
    changed = [op for op, schema in record["schemas"].items() if found.get(op) != normal(schema)]
    for op in changed:
        print(f"{op}\n  on record {record['schemas'][op]}\n  in wheel  {found.get(op, 'is not there')}")
    print(f"{wheel.name}: {len(found)} ops; record of {record['version']}")
    print(f"{len(record['schemas']) - len(changed)} passed, {len(changed)} failed")
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main())
