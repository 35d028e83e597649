"""How the tests compile: in a third of the time, and as users do where that counts.

Tests run a program once or twice, and compile it for far longer. So conftest.py turns
the optimisations off. What is said of a compiled program itself, of its memory or its
operations, is asked of ``lowered.compile(AS_USERS_DO)``; whole runs, whose numbers
depend on rounding, take the fixture `optimized`.
"""

import os

import jax

FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
AS_USERS_DO = {}  # but for the machine code, which moves no buffer and no operation
# Later versions don't know this one, and an unknown flag ends the process.
if jax.__version_info__ < (0, 11):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
    AS_USERS_DO["xla_cpu_use_fusion_emitters"] = True
MACHINE_CODE_TOO = AS_USERS_DO | {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
}
# For a process of its own; neither has the number of devices that the caller may set.
QUICK_PROCESS = {"XLA_FLAGS": " ".join(FLAGS), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
OPTIMIZED_PROCESS = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}


def temp_bytes(lowered):
    """Memory for a program's temporaries, compiled as users do."""
    return lowered.compile(AS_USERS_DO).memory_analysis().temp_size_in_bytes


def quicken():
    """Here, and in the processes that this one starts."""
    for name, value in QUICK_PROCESS.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_disable_most_optimizations", True)
