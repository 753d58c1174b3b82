"""Other people's code meets ours here: one module or folder each, imported only when asked for."""
