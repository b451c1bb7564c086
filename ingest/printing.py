"""What the commands of ``ingest`` print for people to read."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from ingest.consoles import console, errors, print_line
from ingest.dictionary import Variable
from ingest.inspection import StoreSummary
from ingest.report import ReportSummary
from ingest.settings import IngestSummary
from ingest.verify import VerifyReport
from ingest.withdraw import AuditRecord

_SHOWN_FAILURES = 20

_NO_END = 100_000  # columns


def print_ingest(summary: IngestSummary, out: str) -> None:
    """Print what a run did; failures and warnings go to stderr."""
    counts = ", ".join(f"{count} {status}" for status, count in summary.status.items())
    done = f"{summary.new} new, {summary.changed} changed, {summary.retried} tried again"
    if summary.left:
        done += f", {summary.left} left from before"
    if summary.new < summary.scans:
        counts += f"; {done}"
    print_line(
        f"{out}: {summary.scans} scans ({counts}) in {summary.seconds:.1f} s, "
        f"{summary.volumes_per_second:.1f} volumes/s"
        + (f", {decimal(summary.bytes)} read" if summary.bytes else "")
        + (", simulated data" if summary.simulated else "")
    )
    for source, status, reason in summary.failures[:_SHOWN_FAILURES]:
        print_line(f"{status}: {source}: {reason}", errors)
    if len(summary.failures) > _SHOWN_FAILURES:
        more = f"... and {len(summary.failures) - _SHOWN_FAILURES} more; see the column scans/error of {out}"
        print_line(more, errors)
    for warning in summary.warnings:
        print_line(f"warning: {warning}", errors)


def print_store(summary: StoreSummary, store: str) -> None:
    """Print what is in a store."""
    depth, height, width = summary.grid["shape_zyx"]
    print_line(str(store))
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("grid", f"{width} x {height} x {depth} voxels (x, y, z) of {summary.grid['voxel_mm']:g} mm, RAS")
    table.add_row("space", summary.grid["space"])
    table.add_row("scans", f"{summary.scans} of {summary.participants} participants")
    for status, count in summary.status.items():
        table.add_row(f"  {status}", str(count))
    ratio = "" if summary.ratio != summary.ratio else f", compressed {summary.ratio:.2f} times"
    table.add_row("stored", f"{summary.stored_bytes / 1e6:,.1f} MB{ratio}")
    table.add_row("slabs", f"{summary.slab} planes, LZ4")
    table.add_row("simulated", "yes" if summary.simulated else "no")
    for name, counts in summary.phenotypes.items():
        table.add_row(f"phenotype {escape(name)}", f"{counts['missing']} missing")
    console.print(table, highlight=False)


def print_dictionary(variables: Sequence[Variable]) -> None:
    """Print the variables that are known."""
    table = Table("variable", "field, source, units", "task", "codes", padding=(0, 2, 1, 0), box=None)
    for variable in variables:
        visits = ", ".join(map(str, variable.instances))
        lines = [f"{variable.ukb_field} {variable.title}", f"{variable.source}; instances {visits}"]
        codes = [f"{code} {label}" for code, label in (variable.labels | variable.missing).items()]
        table.add_row(
            variable.name + ("\n(confound)" if variable.confound else ""),
            "\n".join([*lines, f"unit: {variable.units}"] if variable.units else lines),
            variable.task,
            "\n".join([*codes, f"(data-coding {variable.coding})"]) if variable.coding else "",
        )
    console.print(table, width=min(console.width, 100), highlight=False, markup=False)
    console.print("Codes below 0 are missing. Instances 2 and 3 are the imaging visits.", highlight=False)


def print_verify(report: VerifyReport, store: str) -> None:
    """Print what was checked, and the first findings."""
    compared = f", {report.compared} compared with their source" if report.compared else ""
    repaired = f", {report.repaired} repaired" if report.repaired else ""
    print_line(
        f"{store}: {report.scans} scans, {report.checked} volumes checked{compared} in {report.seconds:.1f} s "
        f"({report.bytes / 1e9 / max(report.seconds, 1e-3):.2f} GB/s); {len(report.findings)} findings{repaired}"
    )
    if not report.findings:
        return
    table = Table("row", "participant", "session", "finding", "detail", "source", box=None, padding=(0, 2, 0, 0))
    for finding in report.findings[:_SHOWN_FAILURES]:
        row = "" if finding.row is None else str(finding.row)
        cells = (row, finding.participant, finding.session, finding.kind, finding.detail, finding.source)
        table.add_row(*(escape(cell) for cell in cells))
    wide = console if console.is_terminal else Console(width=_NO_END)  # nothing is cut for a file or another program
    wide.print(table, highlight=False)
    if len(report.findings) > _SHOWN_FAILURES:
        console.print(f"... and {len(report.findings) - _SHOWN_FAILURES} more; --json lists all", highlight=False)


def print_report(summary: ReportSummary) -> None:
    """Print what a page shows; damaged scans go to stderr."""
    print_line(
        f"{summary.report}: {summary.scans} scans, {summary.outlier_scans} outliers, {summary.pictures} pictures, "
        f"{summary.bytes / 1e6:,.1f} MB in {summary.seconds:.1f} s"
    )
    for outlier in summary.outliers:
        print_line(f"  {outlier.source}: {outlier.why}")
    if summary.outlier_scans > len(summary.outliers):
        console.print(f"  ... and {summary.outlier_scans - len(summary.outliers)} more in the page", highlight=False)
    for row, source, reason in summary.reasons[:_SHOWN_FAILURES]:
        print_line(f"damaged: row {row}, {source}: {reason}", errors)
    if summary.damaged > _SHOWN_FAILURES:
        errors.print(f"... and {summary.damaged - _SHOWN_FAILURES} more in the page", highlight=False)


def print_withdrawal(record: AuditRecord) -> None:
    """Print what was removed; it names nobody."""
    print_line(
        f"{record.date}: {record.people_on_list} people on {record.list_name} (sha256 {record.list_sha256[:16]})"
    )
    for removal in record.removals:
        print_line(
            f"{removal.store}: removed {removal.people} people, {removal.scans} scans, "
            f"{removal.bytes_deleted / 1e6:,.1f} MB of {removal.kind}"
        )
    console.print("Make reports that show brains again, and look for copies elsewhere.", highlight=False)
    for warning in record.warnings:
        print_line(f"warning: {warning}", errors)
