"""The page that a model hub shows of exported weights."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import jinja2


def write_model_card(
    spec: Mapping[str, Any],
    table: Sequence[str],
    citations: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    remark: str,
) -> str:
    """Return the card in Markdown, with the front matter that hubs read.

    Args:
        spec: of the weights, as ``config.json`` has it.
        table: lines that say what became of each part.
        citations: what to cite.
        results: of fine-tuning: ``dataset``, ``labels``, ``steps``, ``arm``, ``dice`` of each.
        remark: on the adaptation plan; empty for none.
    """
    template = (files("nnssl.weights") / "model_card.md").read_text()
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(
        spec=spec, table=table, citations=citations, results=results, remark=remark
    )
