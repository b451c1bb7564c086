"""What the ``probe`` command prints for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from extract.embeddings import Embeddings
from extract.probing.compare import Difference, Probed
from extract.probing.method import NO_INTERVAL
from extract.probing.numbers import SHORT_NAMES, finite, in_digits
from extract.probing.phenotypes import Joined
from extract.probing.results import Interval, TargetResult
from ingest.consoles import console, errors, print_line

_WIDE = 200  # columns


def print_embeddings(path: Path, embeddings: Embeddings) -> None:
    """Print one line about what was probed."""
    print_line(f"{path}: {embeddings.in_words()}")


def print_phenotypes(joined: Joined) -> None:
    """Print one line about the table that phenotypes are of."""
    print_line(f"phenotypes of {joined.table}: {', '.join(joined.variables)}")


def print_results(results: Sequence[TargetResult]) -> None:
    """Print a table of all metrics, and one of what else was asked for: confounds, permutations, draws of people."""
    probed = [result for result in results if result.status == "ok"]
    table = _table(["target", "task", "n", "metric", "score", "95 % interval", "chance"])
    for result in probed:
        who = [escape(result.name), result.task, str(result.n)]
        for name, found in result.metrics.items():
            numbers = in_digits(found.score, name), _ends(found, name), in_digits(found.chance, name)
            table.add_row(*who, SHORT_NAMES.get(name, name), *numbers)
            who = ["", "", ""]
    if probed:
        _print(table)
    _print_more(probed)


def _print_more(probed: Sequence[TargetResult]) -> None:
    """Print headline scores against those of the confounds alone, with p values and intervals of the bootstrap."""
    confounds = any(result.confound_metrics for result in probed)
    permuted = any(result.p_value is not None for result in probed)
    drawn = any(result.headline.boot_low is not None for result in probed)
    if not (confounds or permuted or drawn):
        return
    headings = ["target", "metric", "score", *(["bootstrap"] if drawn else []), *(["p"] if permuted else [])]
    table = _table([*headings, *(["confounds alone", "score minus that"] if confounds else [])])
    for result in probed:
        found = result.headline
        row = [escape(result.name), SHORT_NAMES.get(result.metric, result.metric), in_digits(found.score)]
        if drawn:
            ends = found.boot_low, found.boot_high
            row.append(" to ".join(in_digits(end) for end in ends if end is not None))
        if permuted:
            row.append("" if result.p_value is None else f"{result.p_value:.2g}")
        if confounds:
            alone, gain = result.confound_metrics.get(result.metric), result.gains.get(result.metric)
            row.append("" if alone is None else in_digits(alone.score))
            row.append("" if gain is None else f"{in_digits(gain.score)} ({_ends(gain)})")
        table.add_row(*row)
    _print(table)


def print_comparison(probed: Sequence[Probed], found: Sequence[Difference]) -> None:
    """Print a table of headline scores, one row for each target and embedding, with differences from the first."""
    by_pair = {(difference.target, difference.name): difference for difference in found}
    results = [{result.name: result for result in one.results if result.status == "ok"} for one in probed]
    permuted = any(result.p_value is not None for of in results for result in of.values())
    headings = ["target", "n", "embeddings", "metric", "score", "95 % interval", "chance"]
    table = _table([*headings, f"minus {probed[0].name}", *(["p"] if permuted else [])])
    for target in dict.fromkeys(name for of in results for name in of):
        who = [escape(target), str(next(of[target].n for of in results if target in of))]
        for one, of in zip(probed, results, strict=True):
            if target not in of:
                continue
            result = of[target]
            headline, difference = result.headline, by_pair.get((target, one.name))
            row = [*who, escape(one.name), SHORT_NAMES.get(result.metric, result.metric), in_digits(headline.score)]
            row += [_ends(headline), in_digits(headline.chance)]
            row.append(
                "" if difference is None else f"{in_digits(difference.interval.score)} ({_ends(difference.interval)})"
            )
            if permuted:
                row.append("" if result.p_value is None else f"{result.p_value:.2g}")
            table.add_row(*row)
            who = ["", ""]
    if table.row_count:
        _print(table)
    if any(result.confound_metrics or result.headline.boot_low is not None for of in results for result in of.values()):
        for one, of in zip(probed, results, strict=True):
            print_line(f"{one.name}:")
            _print_more(list(of.values()))


def print_curves(probed: Sequence[Probed]) -> None:
    """Print learning curves: one row for each target and embedding, one column for each number of people."""
    curves = [(one.name, curve) for one in probed for curve in one.curves.values()]
    if not curves:
        return
    sizes = sorted({point.people for _, curve in curves for point in curve.points[:-1]})
    if not sizes:
        most = max(curve.points[-1].people for _, curve in curves)
        print_line(
            f"no learning curve: at most {most} people can be trained on in each fold; give fewer: --curve=10", errors
        )
        return
    several = len(probed) > 1
    table = _table(["trained on", *(["embeddings"] if several else []), "metric", *map(str, sizes), "all"])
    targets = list(dict.fromkeys(curve.target for _, curve in curves))
    for name, curve in sorted(curves, key=lambda pair: targets.index(pair[1].target)):
        scores = {point.people: in_digits(point.interval.score) for point in curve.points[:-1]}
        row = [escape(curve.target), *([escape(name)] if several else []), SHORT_NAMES.get(curve.metric, curve.metric)]
        last = curve.points[-1]
        whole = f"{in_digits(last.interval.score)} ({last.people})"
        table.add_row(*row, *(scores.get(size, "") for size in sizes), whole)
    _print(table)


def print_skipped(probed: Sequence[Probed]) -> None:
    """Name on stderr what is missing: targets that could not be probed, intervals, p values, and points of curves."""
    for one in probed:
        prefix = f"{one.name}: " if len(probed) > 1 else ""
        for result in one.results:
            if result.status == "skipped":
                print_line(f"skipped: {prefix}{result.name}: {result.reason}", errors)
            elif result.permutations and result.p_value is None:
                print_line(f"{prefix}{result.name}: {result.null}", errors)
            if NO_INTERVAL in result.method:
                print_line(f"{prefix}{result.name}: {NO_INTERVAL}", errors)
        for curve in one.curves.values():
            for size, reason in curve.missing.items():
                print_line(f"no point at {size} people: {prefix}{curve.target}: {reason}", errors)


def print_json(document: Mapping[str, Any]) -> None:
    """Print a document for machines; attributes of files may hold numbers that JSON has not, which become null."""
    print(json.dumps(finite(document), allow_nan=False), flush=True)


def print_written(what: str, path: Path) -> None:
    """Print where a file is."""
    print_line(f"{what}: {path}")


def _print(table: Table) -> None:
    """Print a table; one that is not read on a terminal may be as wide as it is."""
    (console if console.is_terminal else Console(width=_WIDE)).print(table, highlight=False)


def _table(headings: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    left = ("target", "task", "metric", "embeddings", "trained on")
    for heading in headings:
        wraps = heading in ("target", "embeddings")
        justify: Literal["left", "right"] = "left" if heading in left else "right"
        table.add_column(escape(heading), justify=justify, no_wrap=not wraps, min_width=8 if wraps else None)
    return table


def _ends(interval: Interval, metric: str = "") -> str:
    return f"{in_digits(interval.low, metric)} to {in_digits(interval.high, metric)}"
