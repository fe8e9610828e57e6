"""The rows as a table, and what follows from several of them."""

from __future__ import annotations

from typing import Any

COLUMNS = {
    "ms": ("ms", "{:,.2f}"),
    "tokens_per_second": ("tok/s", "{:,.0f}"),
    "mfu": ("MFU", "{:.1%}"),
    "peak_gib": ("peak GiB", "{:.2f}"),
    "planned_gib": ("planned", "{:.2f}"),
    "ratio": ("ratio", "{:.2f}"),
    "error_of_fp32": ("error", "{:.1e}"),
    "seconds": ("s", "{:.0f}"),
}


def line(row: dict[str, Any]) -> str:
    """A row as text, while the run goes on."""
    numbers = [f"{title} {form.format(row[key])}" for key, (title, form) in COLUMNS.items() if key in row]
    return "  ".join([f"{row['section']}: {row['name']}", *numbers, remark(row)]).rstrip()


def remark(row: dict[str, Any]) -> str:
    """What a row says in words; what failed comes first."""
    if "failed" in row:
        return f"FAILED: {row['failed']}"
    return row.get("left_out") or row.get("note") or ""


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `ratio` (see the tool's docstring) and, of training, planned by resident memory."""
    return [row | _ratio(row, rows) | _planned(row) for row in rows]


def _planned(row: dict[str, Any]) -> dict[str, float]:
    both = "planned_gib" in row and "peak_gib" in row
    return {"planned_of_resident": row["planned_gib"] / row["peak_gib"]} if both else {}


def _ratio(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float]:
    section, name = row["section"], row["name"]
    if section in ("training", "decoding") and "tokens_per_second" in row and not name.endswith("HF"):
        other = find(rows, section, f"{name.rpartition(', ')[0]}, HF" if section == "training" else f"{name}, HF")
        return _quotient(row, other, "tokens_per_second")
    if section == "losses" and name.endswith("ours"):
        return _quotient(find(rows, section, name.replace("ours", "Liger")), row, "ms")
    if section == "attention" and "ms" in row:
        best = min((r for r in rows if r["section"] == section and "no segments" in r["name"] and "ms" in r),
                   key=lambda r: r["ms"], default=None)  # fmt: skip
        return _quotient(best, row, "ms")
    return {}


def find(rows: list[dict[str, Any]], section: str, name: str) -> dict[str, Any] | None:
    return next((row for row in rows if row["section"] == section and row["name"] == name), None)


def _quotient(a: dict[str, Any] | None, b: dict[str, Any] | None, key: str) -> dict[str, float]:
    if a is None or b is None or not a.get(key) or not b.get(key):
        return {}
    return {"ratio": a[key] / b[key]}


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table; without rich, as lines."""
    rows = with_ratios(rows)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("\n".join(line(row) for row in rows))
        return
    console = Console(width=None if Console().is_terminal else 200, highlight=False)
    for section in dict.fromkeys(row["section"] for row in rows):
        some = [row for row in rows if row["section"] == section]
        keys = [key for key in COLUMNS if any(key in row for row in some)]
        table = Table(title=section, title_justify="left", title_style="bold", box=None, padding=(0, 1))
        table.add_column("")
        for key in keys:
            table.add_column(COLUMNS[key][0], justify="right", no_wrap=True)
        table.add_column("")
        for row in some:
            cells = [COLUMNS[key][1].format(row[key]) if key in row else "" for key in keys]
            table.add_row(row["name"], *cells, remark(row), style="red" if "failed" in row else None)
        console.print(table)
