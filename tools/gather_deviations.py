"""Collect the deviations of all methods from their pages on one page.

Run ``python -m tools.gather_deviations`` to update ``documentation/deviations.md``; a test checks that the page is up to date.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from nnssl.methods import METHODS

DOCUMENTATION = Path(__file__).parent.parent / "documentation"
PAGE = DOCUMENTATION / "deviations.md"
INTRODUCTION = """# Deviations

Where a method computes something different from its paper or its authors' code, and why. This page is generated from
the [method pages](methods.md) by `python -m tools.gather_deviations` in a checkout, so edit the method pages instead.
The docstring at the top of each method's file cites the equations. The deviations of fine-tuning as a mean teacher are
listed in `trainers/finetuning/mean_teacher.py`.
"""


def section_of(text: str, heading: str) -> str:
    """Return the text of a page between a second-level heading and the next one."""
    (section,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    return str(section).strip("\n")


def links_from_above(text: str, name: str) -> str:
    """Return text of ``methods/<name>.md`` with its links rewritten for the folder above."""

    def from_above(match: re.Match[str]) -> str:
        target = match.group(1)
        if target.startswith(("http://", "https://")):
            return match.group(0)
        if target.startswith("#"):
            return f"](methods/{name}.md{target})"
        return f"]({target.removeprefix('../')})" if target.startswith("../") else f"](methods/{target})"

    return re.sub(r"\]\(([^)\s]+)\)", from_above, text)


def gather(documentation: Path = DOCUMENTATION) -> str:
    """Return the page: one section per method, in the order of ``METHODS``."""
    parts = [INTRODUCTION]
    for name in METHODS:
        text = (documentation / "methods" / f"{name}.md").read_text()
        title = text.partition("\n")[0].removeprefix("# ")
        link = f"From the [page of {title}](methods/{name}.md#deviations)."
        parts.append(f"## {title}\n\n{link}\n\n{links_from_above(section_of(text, 'Deviations'), name)}\n")
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    PAGE.write_text(gather())


if __name__ == "__main__":
    main()
