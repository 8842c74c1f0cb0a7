"""The histogram of a partition: examples and labels of each client, as text and as counts for the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median_high
from typing import Any

from parablock.data.prompts import Example
from parablock.data.sources import Row
from parablock.printable import counted

WIDTH = 100
MAX_LABELS = 20
OTHER_LABELS = "other"
_BAR, _LABEL, _MOST_CLIENTS, _MOST_BINS = 24, 16, 20, 8


def partition_histogram(parts: Sequence[Sequence[Row]], *, field: str | None = None) -> list[str]:
    """Draw the number of examples of each client, and of the most frequent values of a field if one is given.

    The lines have at most `WIDTH` characters: one line for each client (by client_id; at least one), or a histogram
    of sizes if there are many clients.
    """
    sizes = [len(part) for part in parts]
    lines = _draw_sizes(parts, sizes, field) if len(parts) > _MOST_CLIENTS else _draw_clients(parts, sizes, field)
    return [line.rstrip()[:WIDTH] for line in lines]


def count_examples(parts: Sequence[Sequence[Example]], *, field: str | None = None) -> list[dict[str, Any]]:
    """Count for each client its `examples`, `tokens`, `target_tokens` (those in the loss) and `labels`.

    The labels are the values of `field`, or without a field the sources. All but the `MAX_LABELS` most frequent
    labels count as `OTHER_LABELS`.
    """
    labels = [Counter(_label(example.row, field) for example in part) for part in parts]
    total = Counter[str]()
    for counts in labels:
        total.update(counts)
    named = {label for label, _ in total.most_common(MAX_LABELS)}
    return [
        {
            "examples": len(part),
            "tokens": sum(len(example.input_ids) for example in part),
            "target_tokens": sum(example.num_target_tokens for example in part),
            "labels": _merge_rare(counts, named),
        }
        for part, counts in zip(parts, labels, strict=True)
    ]


def _label(row: Row, field: str | None) -> str:
    if field is None:
        return row.source.rsplit("/", maxsplit=1)[-1]
    return str(row.fields.get(field))[:60]


def _merge_rare(counts: Counter[str], named: set[str]) -> dict[str, int]:
    rest = sum(count for label, count in counts.items() if label not in named)
    shown = {label: count for label, count in counts.items() if label in named}
    return {**shown, OTHER_LABELS: shown.get(OTHER_LABELS, 0) + rest} if rest else shown


def _draw_clients(parts: Sequence[Sequence[Row]], sizes: Sequence[int], field: str | None) -> list[str]:
    lines = [f"{counted(len(parts), 'client')}, {counted(sum(sizes), 'example')}"]
    for client_id, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        line = f"client {client_id:>2} {size:>8} {_bar(size, max(sizes)):<{_BAR}}  "
        lines.append(line + (_only_source(part) if field is None else _labels(part, field, WIDTH - len(line))))
    return lines


def _draw_sizes(parts: Sequence[Sequence[Row]], sizes: Sequence[int], field: str | None) -> list[str]:
    smallest, largest = min(sizes), max(sizes)
    lines = [
        f"{counted(len(parts), 'client')}, {counted(sum(sizes), 'example')}; "
        f"smallest {smallest} (client {sizes.index(smallest)}), "
        f"median {median_high(sizes)}, largest {largest} (client {sizes.index(largest)})"
    ]
    step = (largest - smallest) // _MOST_BINS + 1
    counts = Counter((size - smallest) // step for size in sizes)
    for number in range((largest - smallest) // step + 1):
        low = smallest + number * step
        bar = f"{_bar(counts[number], max(counts.values())):<{_BAR}}"
        lines.append(f"{low:>8} – {low + step - 1:<8} examples {bar}  {counted(counts[number], 'client')}")
    if field is not None:
        kinds = [len({str(row.fields.get(field)) for row in part}) for part in parts]
        lines.append(
            f"values of {field} per client: fewest {min(kinds)}, median {median_high(kinds)}, most {max(kinds)}"
        )
    return lines


def _bar(count: int, largest: int) -> str:
    return "█" * max(round(_BAR * count / max(largest, 1)), min(count, 1))


def _labels(part: Sequence[Row], field: str, room: int) -> str:
    """List as many labels as fit into `room` characters, the most frequent first."""
    counts = Counter(sorted(str(row.fields.get(field)) for row in part))
    top = [f"{_short(label)} {count}" for label, count in counts.most_common()]
    for shown in range(len(top), 0, -1):
        text = ", ".join(top[:shown]) + (f", +{len(top) - shown} more" if shown < len(top) else "")
        if len(text) <= room:
            return text
    return f"{len(top)} labels"


def _short(label: str) -> str:
    """Keep the end of a long label: labels with a common prefix differ there."""
    return label if len(label) <= _LABEL else "…" + label[1 - _LABEL :]


def _only_source(part: Sequence[Row]) -> str:
    sources = {row.source for row in part}
    return sources.pop().rsplit("/", maxsplit=1)[-1] if len(sources) == 1 else ""
