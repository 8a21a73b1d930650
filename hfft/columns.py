"""Columns of a dataset: what one holds, in words, and putting another in its place."""

from __future__ import annotations

from typing import Any

import datasets


def described(feature: Any) -> str:
    """What a column of this feature holds, for the end of "holds ..."."""
    if isinstance(feature, datasets.ClassLabel):
        return "names of classes"
    if isinstance(feature, datasets.Value):
        return "nothing" if feature.dtype == "null" else str(feature.dtype)
    if isinstance(feature, datasets.Json):
        return "values of mixed types"
    if isinstance(feature, datasets.List | datasets.LargeList):
        return f"lists of {described(feature.feature)}"
    if isinstance(feature, dict):
        return f"records of {', '.join(feature)}"
    return f"{type(feature).__name__} values"


def replace_column(
    dataset: datasets.Dataset, column: str, values: Any, feature: Any
) -> datasets.Dataset:
    """Puts other values, and their feature, in a column's place."""
    new = f"new {column}"  # added first: without any column a dataset has no rows
    longer = dataset.add_column(new, values, feature=feature)
    shorter = longer.remove_columns([column]).rename_column(new, column)
    return shorter.select_columns(dataset.column_names)
