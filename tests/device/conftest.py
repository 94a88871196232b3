"""One session has one accelerator: the machine's, or where it has none, the fake one."""

import pytest
from fake import ACCELERATOR, SUPPORTED, register


@pytest.fixture(scope="session", autouse=True)
def _register() -> None:
    # Before any backward pass: the first one makes autograd's queues, one for each device there is then.
    if ACCELERATOR is None and SUPPORTED:
        register()
