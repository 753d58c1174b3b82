"""How many threads tests with tiny tensors use."""

from contextlib import contextmanager

import torch


@contextmanager
def one_thread():
    """Layers this small lose more to waking threads than they gain, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
