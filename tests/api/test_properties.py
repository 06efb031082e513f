"""What must hold for any data: of NumPy arrays."""

from tests.cases.properties import *  # noqa: F403
