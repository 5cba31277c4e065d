"""The demo teacher for tests that compare it with transformers: fetched by nobody, exported once, answers kept.

$JAXLIN_DATA is the folder of real data; $JAXLIN_PARITY_CACHE a folder where the answers of the other side are kept
between runs, because on a CPU they take most of the time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from jaxlin import convert, gguf_teacher
from jaxlin.evaluation import haystack
from jaxlin.evaluation.task import read_jsonl, sha256_of
from jaxlin.runs import Teacher


def require_demo() -> str:
    """The demo teacher's file; skips where it is not at hand."""
    cache = Path(os.environ.get("JAXLIN_CACHE") or "~/.cache/jaxlin").expanduser()
    if not os.environ.get("JAXLIN_DEMO_GGUF") and not (cache / Path(gguf_teacher.DEMO_MEMBER).name).is_file():
        pytest.skip("the demo teacher is not in the cache: set JAXLIN_DEMO_GGUF")
    return str(gguf_teacher.demo_file())


def require_data() -> Path:
    """The folder of real data; skips where there is none."""
    if not (folder := os.environ.get("JAXLIN_DATA")):
        pytest.skip("JAXLIN_DATA is not set: no benchmark files")
    return Path(folder)


def essay(data: Path) -> list[str]:
    """A long public-domain text as a haystack's words."""
    stories = read_jsonl(data / "eval/longbench_mini/narrativeqa.jsonl")
    return haystack.split_words(" ".join(row["context"] for row in stories))


def both(folder: Path) -> tuple[Any, Teacher]:
    """The demo teacher in transformers (float32, on a GPU where torch has one) and ours, with the same weights.

    The tokenizer is exported too: without it transformers' model does not know the token that ends a text.
    """
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from transformers import LlamaForCausalLM

    config, params, tokenizer = convert.load_teacher(require_demo(), dtype="float32")
    convert.export_hf(params, config, folder, tokenizer=tokenizer)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    return model, Teacher(config, params, tokenizer)


def parity_cache() -> Path | None:
    """Where the other side's answers are kept; None where they are not."""
    folder = os.environ.get("JAXLIN_PARITY_CACHE")
    return Path(folder) if folder else None


def kept(name: str, requests: Sequence[Any], answer: Callable[[list[Any]], list[Any]], step: int) -> list[Any]:
    """answer(requests), `step` at a time; the answers that the cache has under `name` are not asked for again."""
    folder = parity_cache()
    path = folder / f"{name}.jsonl" if folder else None
    known: dict[str, Any] = {}
    if path is not None and path.is_file():
        known = {entry["request"]: entry["answer"] for entry in read_jsonl(path)}
    keys = [sha256_of(request) for request in requests]
    missing = [i for i, key in enumerate(keys) if key not in known]
    for start in range(0, len(missing), step):
        chosen = missing[start : start + step]
        found = {keys[i]: a for i, a in zip(chosen, answer([requests[i] for i in chosen]), strict=True)}
        known |= found
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.writelines(json.dumps({"request": k, "answer": a}) + "\n" for k, a in found.items())
    return [known[key] for key in keys]
