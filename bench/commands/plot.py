"""``convbench plot``: draw the charts of results files again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.errors import UsageError


def plot_command(
    files: Annotated[list[Path], typer.Argument(help="Files of run and layers.", metavar="FILE...")],
    out: Annotated[Path | None, typer.Option(help="Folder; by default charts/ beside the file's runs/.")] = None,
) -> None:
    """Draw the charts of results files again."""
    from bench.records import layers, run
    from bench.records.documents import read_bytes, schema_of
    from bench.views.charts import draw_charts
    from bench.views.layer_charts import draw_layer_charts

    kinds = {
        run.SCHEMA: (run.read_run, draw_charts),
        run.OLD_SCHEMA: (run.read_run, draw_charts),
        layers.SCHEMA: (layers.read_layers, draw_layer_charts),
    }
    draws = []
    for path in files:  # all of them are read before any is drawn
        schema = schema_of(path, read_bytes(path))
        if schema not in kinds:
            raise UsageError(f"{path} has schema {schema!r}; this reads {' and '.join(map(repr, kinds))}")
        read, draw = kinds[schema]
        read(path)
        draws.append(draw)
    for path, draw in zip(files, draws, strict=True):
        for chart in draw(path, out or path.resolve().parent.parent / "charts"):
            print(f"chart: {chart}")
