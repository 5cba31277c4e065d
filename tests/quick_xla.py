"""XLA's flags for tests, which compile much and compute little: quick compilation, of slower programs."""

from importlib.metadata import version

# The older emitters compile in half the time. Later jaxlibs have no others, and abort at a flag that they do not know.
OLDER = "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""
QUICK = f"--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 {OLDER}".strip()
USUAL = {"xla_cpu_use_fusion_emitters": True} if OLDER else {}  # for a test that reads the compiled program
