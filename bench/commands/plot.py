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
    from bench.records.documents import read_object
    from bench.views.charts import run_charts, save_charts
    from bench.views.layer_charts import layers_charts

    kinds = {
        run.SCHEMA: (run.read_run, run_charts),
        run.OLD_SCHEMA: (run.read_run, run_charts),
        layers.SCHEMA: (layers.read_layers, layers_charts),
    }
    found = []
    for path in files:  # all of them are read before any is drawn
        schema, _ = read_object(path)
        if schema not in kinds:
            raise UsageError(f"{path} has schema {schema!r}; this reads {' and '.join(map(repr, kinds))}")
        read, charts_of = kinds[schema]
        record = read(path)
        found.append((path, record.rows, charts_of(record)))
    for path, rows, charts in found:
        for chart in save_charts(path, rows, out or path.resolve().parent.parent / "charts", charts):
            print(f"chart: {chart}")
