"""NLTK's sentence splitter, Punkt, whose data is not in the package: IFEval and RULER split by it."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from jaxlin.config import UserError

INSTALL = "pip install 'jaxlin[eval]'"


def require_punkt(data: Path | None) -> None:
    """Make NLTK find punkt_tab: in nltk_data of `data`, where NLTK looks, or downloaded. Raises UserError else."""
    try:
        import nltk  # pyright: ignore[reportMissingImports] -- of the extra eval
    except ImportError:
        raise UserError(f"this suite needs the package nltk: {INSTALL}") from None
    if data is not None:
        for folder in (data / "nltk_data", data / "eval" / "nltk_data"):
            if folder.is_dir() and str(folder) not in nltk.data.path:
                nltk.data.path.append(str(folder))
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        with contextlib.redirect_stderr(io.StringIO()):  # its errors are four lines
            found = nltk.download("punkt_tab", quiet=True)
        if not found:
            raise UserError(
                "nltk's punkt_tab is missing: put it in DIR/nltk_data of --data DIR, "
                "or run python -m nltk.downloader punkt_tab"
            ) from None
