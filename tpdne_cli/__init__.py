"""tpdne: photographs of people who were never born."""

from __future__ import annotations

__version__ = "0.1.0"
