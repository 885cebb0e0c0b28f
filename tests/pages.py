"""Snippets of the documentation, so that tests run what a page shows."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def block_after(page: str, marker: str) -> str:
    """The code block of `page` (a path from the root) that follows `marker`, an HTML comment on a line of its own."""
    found = re.search(
        rf"^<!-- {re.escape(marker)} -->\n```\w+\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE
    )
    assert found is not None, f"{page} has no block after <!-- {marker} -->"
    return found[1]
