"""Who may import whom (the arrows of DECISIONS.md), and that we leave Hugging Face's `kernels` alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEVELS = [
    {"train", "eval", "study", "inspect", "hybrid"},
    {"trainer", "plan"},
    {"learner"},
    {"evaluation", "generate", "chat", "synthesize", "filters", "export", "model_card"},
    {"engine"},
    {"session", "turns", "session_file", "decoding", "sampling", "detokenizer", "prefix_cache"},
    {"runs", "train_step", "model_flops"},
    {"optimizer", "placement"},
    {"distill", "calibrate"},
    {"layer_local"},
    {"training_data", "packing", "conversations", "data", "streams", "split", "sources", "arrays", "checkpoint",
     "convert", "hf_config", "hf_files", "hf_fla", "hf_student", "hf_table", "hf_writer", "gguf_teacher", "student",
     "metrics", "timing"},
    {"losses"},
    {"model"},
    {"mixers"},
    {"ops"},
    {"sequence_parallel", "reductions"},
    {"recurrence", "kernels"},
]  # fmt: skip
LEAVES = {"config", "command_line", "drafts", "mistakes", "pattern", "sharding", "processes"}
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}
FOREIGN = {
    "transformers": {"convert", "data", "evaluation", "gguf_teacher", "hf_files"},
    "torch": {"convert", "hf_files"},
    "datasets": {"data", "sources", "evaluation"},
    "tensorflow_datasets": {"data", "sources"},
    "orbax": {"checkpoint"},
}
SCRIPTS = {
    "bench", "bench_compiled", "bench_ops", "bench_process", "bench_report", "bench_row", "bench_torch",
    "compile_check",
}  # fmt: skip
FILES = [
    *ROOT.glob("*.py"), *(ROOT / "jaxlin").glob("*.py"), *(ROOT / "jaxlin/mixers").glob("*.py"),
    *(ROOT / "jaxlin/evaluation").glob("*.py"), *(ROOT / "jaxlin/study").glob("*.py"),
    *(ROOT / "jaxlin/inspect").glob("*.py"), *(ROOT / "kernels").glob("*.py"),
]  # fmt: skip


def part_of(path: Path) -> str:
    """The name that the arrows know a file by."""
    folder = path.parent.name
    return folder if folder in ("mixers", "evaluation", "study", "inspect", "kernels") else path.stem


def imports(path: Path):
    """(module, at top level) of every import in a file."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", id(node) in top
            if node.module == "jaxlin":
                yield from ((f"jaxlin.{alias.name}", id(node) in top) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_import_direction(path):
    here = part_of(path)
    for module, at_top in imports(path):
        package, *rest = module.split(".")
        if package == "jaxlin" and rest:
            there = rest[0]
            if here in ("recurrence", "kernels") and path.stem not in SCRIPTS:
                assert there == "kernels" == here, f"{here} imports {module}"
            elif there not in LEAVES and there != here and path.stem not in SCRIPTS:
                assert here not in LEAVES or there == "config", f"{here} imports {module}"
                assert LEVEL[here] <= LEVEL[there], f"{here} imports {module}"
        elif package in FOREIGN:
            assert here in FOREIGN[package], f"{here} imports {module}"
            assert not at_top or package == "orbax", f"{path.name} imports {package} before it is needed"
        elif here in ("recurrence", "kernels") and path.stem not in SCRIPTS:
            known = {"jax", "jaxlib", "jaxtyping", "numpy", "__future__"}
            assert package in known or package in sys.stdlib_module_names


def test_only_sharding_names_mesh_axes():
    for path in FILES:
        if path.stem not in ("sharding", "config"):
            names = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
            assert not names & {"fsdp", "tensor"}, path


def test_kernels_is_no_package():
    """A regular top-level package `kernels` would shadow Hugging Face's, which transformers looks for."""
    assert not (ROOT / "kernels/__init__.py").exists()
    code = "import transformers; from transformers import LlamaConfig; import transformers.models.llama as m; print(m)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_file_is_long():
    for path in [*FILES, *(ROOT / "tests").glob("*.py"), *(ROOT / "configs").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 450, path
