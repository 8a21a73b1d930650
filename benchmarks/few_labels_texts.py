"""Sentences from docstrings of installed libraries, and the module each stands in.

A text task that needs no download: the first sentence of a function's or class's docstring is to
tell its subpackage, such as `scipy.sparse` or `sympy.matrices`. The libraries are ones that hfft
itself brings. Subpackages are chosen to lie close to one another: statistics three times, matrices
three times, polynomials twice. Files are parsed, not imported.

What would give a label away is cut out: the words that stand in any label, names of libraries and
dotted names. A sentence that two labels share, or that is too short after the cuts, is left out.

Usage:
    python benchmarks/few_labels_texts.py    # how many sentences each label has, and examples
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

PACKAGES = {
    "numpy": ["lib", "ma", "polynomial"],
    "pandas": ["core"],
    "scipy": ["interpolate", "linalg", "optimize", "signal", "sparse", "stats"],
    "sklearn": ["ensemble", "linear_model", "metrics"],
    "sympy": ["combinatorics", "geometry", "matrices", "physics", "polys", "stats"],
    "torch": ["distributed", "distributions", "fx", "nn", "onnx"],
}
LABELS = [f"{library}.{package}" for library, own in PACKAGES.items() for package in own]
FEWEST_WORDS = 5

_IN_LABELS = {word for label in LABELS for part in label.split(".") for word in part.split("_")}
_ALIASES = {"np", "pd", "pytorch", "scikit", "learn", "sympy's", "torch's", "aten"}
_GIVEAWAY = re.compile(
    rf"\b(?:\w+\.)+\w+|\b(?:{'|'.join(sorted(_IN_LABELS | _ALIASES))})\b", re.IGNORECASE
)
_MARKUP = re.compile(r":\w+:|[`*~_>\\|]+")
_SENTENCE_END = re.compile(r"(?<=\w[.?!])\s|\n\s*\n")


def find_texts(fewest: int) -> dict[str, list[str]]:
    """Collect the sentences of every label, in an order that depends on the sentences alone.

    Args:
        fewest: a label with fewer sentences is left out; versions of libraries differ.

    Returns:
        Label to its sentences.
    """
    found: dict[str, set[str]] = {}
    for label in LABELS:
        for sentence in _sentences(label):
            found.setdefault(sentence, set()).add(label)
    texts: dict[str, list[str]] = {label: [] for label in LABELS}
    for sentence in sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest()):
        if len(found[sentence]) == 1:
            texts[min(found[sentence])].append(sentence)
    return {label: own for label, own in texts.items() if len(own) >= fewest}


def first_sentence(docstring: str) -> str:
    """Return a docstring's first sentence without what gives its module away."""
    sentence = _SENTENCE_END.split(docstring.strip(), maxsplit=1)[0]
    return " ".join(_GIVEAWAY.sub(" ", _MARKUP.sub(" ", sentence)).split())


def _sentences(label: str) -> Iterator[str]:
    for file in _files(label):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's escapes
            tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                sentence = first_sentence(ast.get_docstring(node) or "")
                if len(re.findall(r"[A-Za-z]{2,}", sentence)) >= FEWEST_WORDS:
                    yield sentence


def _files(label: str) -> list[Path]:
    library, _, package = label.partition(".")
    spec = importlib.util.find_spec(library)
    if spec is None or spec.origin is None:
        return []
    folder = Path(spec.origin).parent / package
    files = (file.relative_to(folder) for file in folder.rglob("*.py"))
    return [folder / file for file in sorted(files) if "tests" not in file.parts]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what there is."""
    parser = argparse.ArgumentParser(description="Count the docstrings of each label.")
    parser.add_argument("--examples", type=int, default=1, help="printed a label (default: 1)")
    options = parser.parse_args(arguments)
    texts = find_texts(fewest=0)
    for label, own in texts.items():
        print(f"{label:<22}{len(own):>5}", *own[: options.examples], sep="  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
