import types

import blockscale


def test_all_is_what_is_public():
    public = {
        name
        for name, value in vars(blockscale).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public | {"__version__", "nn"} == set(blockscale.__all__)


def test_every_export_resolves():
    assert [name for name in blockscale.__all__ if not hasattr(blockscale, name)] == []
