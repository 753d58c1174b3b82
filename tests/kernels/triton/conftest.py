"""Triton decides at import whether it interprets, so interpreted tests run in a process of their own.

`test_interpreter.py` starts it; without TRITON_INTERPRET the folder is not collected.
"""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
