"""The model card of exported weights, which a model hub shows."""

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
        spec: Description of the weights, as in ``config.json``.
        table: Lines of the table with the transfer of each part.
        citations: Publications to cite.
        results: Results of fine-tuning: ``dataset``, ``labels``, ``steps``, ``arm`` and ``dice`` of each.
        remark: Remark on the adaptation plan; empty for none.
    """
    template = (files("nnssl.weights") / "model_card.md").read_text()
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(
        spec=spec, table=table, citations=citations, results=results, remark=remark
    )
