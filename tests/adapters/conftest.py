"""What tests of the adapters ask for."""

import pytest


@pytest.fixture
def device(request):
    """Where all tensors of the tests are made: the CPU, with ``--require-cuda`` a GPU."""
    import torch

    found = "cpu"
    if request.config.getoption("require_cuda"):
        if not torch.cuda.is_available():
            pytest.fail("--require-cuda: PyTorch finds no GPU")
        found = "cuda"
    torch.set_default_device(found)
    torch.manual_seed(0)
    yield found
    torch.set_default_device(None)
    # PyTorch's test helpers forbid all later changes of its settings.
    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
