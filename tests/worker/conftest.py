"""Where there is no GPU, kernels are interpreted."""

from importlib.util import find_spec

from tests.conftest import HAS_GPU

if find_spec("triton") and not HAS_GPU:
    from tests.worker.interpreting import remember_builtins

    remember_builtins()
