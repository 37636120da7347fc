"""What all tests share: how hypothesis runs."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("surgery", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("surgery")
