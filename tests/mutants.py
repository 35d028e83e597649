"""Break the package in one place at a time, and see that a test notices.

``make mutants`` does it, or ``python tests/mutants.py _update_rules metrics`` for a
part. Each mutant is a copy of the package with one expression changed: what a function
returns is NaN, negated or doubled; of a sum or product one operand is lost, or it is a
difference or quotient; a step that replaces a value by a function of it is left out.
The exit status is 1 if one survives, or if `EQUIVALENT` has one that is not there.
"""

import argparse
import ast
import contextlib
import dataclasses
import functools
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import types
import zlib
from pathlib import Path

import chex  # noqa: F401, here once, not in each process
import flax.nnx  # noqa: F401
import jax
import jax.numpy as jnp
import numpy as np
import optax  # noqa: F401
import orbax.checkpoint  # noqa: F401
import pytest
import sklearn.metrics  # noqa: F401

TESTS = {  # for each module the files that must notice; its doctests come first
    "_update_rules": ["update_rules", "reference"],
    "_arrays.dtypes": ["transform", "gaussian"],
    "_arrays.loops": [
        "loops",
        "predictive",
        "gradients",
        "sensitivity",
        "calibration",
        "metrics",
    ],
    "_arrays.noise": ["noise", "gaussian"],
    "_arrays.ranks": ["pruning", "diagnostics"],
    "_distributions.basis": ["rotated"],
    "_distributions.divergences": ["gaussian", "posterior"],
    "_distributions.gaussian": ["gaussian", "posterior", "prior", "rotated"],
    "_distributions.mixture": ["mixture", "rotated"],
    "_distributions.natural": ["gaussian"],
    "_distributions.rotated": ["rotated", "mixture"],
    "_evaluation.jacobian": ["sensitivity", "predictive"],
    "_evaluation.likelihood": ["calibration", "diagnostics"],
    "_evaluation.objective": ["objective"],
    "_evaluation.samples": ["predictive", "mixture", "calibration"],
    "_optimizer.batches": ["gradients"],
    "_optimizer.eigenbasis": ["evon"],
    "_optimizer.evon": ["evon"],
    "_optimizer.gradients": ["gradients", "contract", "parallel", "sampled"],
    "_distributions.parts": ["prior", "posterior", "flax", "evon"],
    "_optimizer.state": [
        "posterior",
        "prior",
        "sampled",
        "transform",
        "evon",
        "diagnostics",
    ],
    "_optimizer.posterior": ["posterior", "prior", "sampled"],
    "_optimizer.transform": [
        "reference",
        "transform",
        "prior",
        "sampled",
        "posterior",
        "flax",
    ],
    "_optimizer.sampled": ["sampled"],
    "calibration": ["calibration"],
    "settings": ["settings"],
    "tuning": ["tuning"],
    "merging": ["merging"],
    "metrics._classification": ["metrics"],
    "metrics._ranking": ["metrics", "metrics_selective"],
    "metrics._regression": ["metrics_regression"],
    "predictive": ["predictive", "mixture"],
    "pruning": ["pruning"],
    "sensitivity": ["sensitivity"],
}
EVERY_KIND = (
    "_update_rules.",
    *(f"_optimizer.gradients._{x}" for x in ("re", "sq", "ga")),
)
EQUIVALENT = {  # name of a mutant: why no test can notice it
    "_distributions.parts.over: return type(prior)(*[params] * len(prior)) -> 2": (
        "it has no leaves"
    ),
    "_distributions.basis.without: return jax.tree.map(lambda _: Basis(), tree) -> "
    "nan": "it has no leaves",
    "_distributions.basis._relative: return _transposed(p) if q is None else "
    "matmul(_transposed(p), q) -> -1": "the same Gaussian in a basis of other sign",
    "_distributions.gaussian.Posterior.noise.draw: return normal_like(leaf_key, mean, "
    "precision.dtype) -> -1": "as likely with the other sign",
    "calibration._temperature_scaling.slope: return jnp.mean(expected - own, "
    "where=where) -> 2": "its sign alone counts",
    "merging._curvature.fill: return part if unknown(h) else h -> -1": (
        "its structure and shapes alone count"
    ),
    "pruning._whole_mask.whole: return param if param is None or single else keep -> "
    "nan": "its structure and shapes alone count",
    "tuning.tune.scores_of: return _one_score(score(posterior_of(*run), score_key)) "
    "-> 2": "their order alone counts",
    "_arrays.ranks._smallest_with.value_of: magnitude = jnp.where(jnp.abs(order) < "
    "normal, 0.0, magnitude) -> pass": "for devices without denormals, not CPUs",
    "_arrays.loops.scan_mean.start: return _Sum(zero, zero if _averaged(zero) and "
    "count > PLAIN_TERMS else None) -> -1": "zeros",
    "_distributions.mixture.Mixture.strata: first + jnp.arange(num_samples) -> "
    "(first) - (jnp.arange(num_samples))": "the other way round a circle",
    "_distributions.rotated.RotatedPosterior.coordinates.zeros: return jnp.zeros_like("
    "mean, dtype=wide_dtype(mean, precision)) -> -1": "zeros",
    "_optimizer.eigenbasis.no_statistic: return Statistic(*(None if q is None else "
    "jnp.zeros_like(q) for q in basis)) -> 2": "zeros",
    "_optimizer.eigenbasis.next_statistic: return statistic -> 2": "it has no leaves",
    "sensitivity._cross_entropy: outputs * jnp.where(valid, 1, jnp.nan) -> "
    "(outputs) / (jnp.where(valid, 1, jnp.nan))": "by one or by NaN",
}
SECONDS = 600  # of the processor: a mutant that takes longer hangs
SWAPPED = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.Pow: "*"}


def mutants_of(module, source):
    """Return the mutants' sources by name, ``module.function: before -> after``."""
    code = source.encode()  # as the parser counts columns
    starts = [0]
    for line in code.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def span(node):
        start, end = starts[node.lineno - 1], starts[node.end_lineno - 1]
        return start + node.col_offset, end + node.end_col_offset

    def text(node):
        return code[slice(*span(node))].decode()

    found = {}
    for function, node in _nodes(ast.parse(source), module):
        for label, after in _changes(function, node, text):
            start, end = span(node)
            name = " ".join(f"{function}: {text(node)} -> {label}".split())
            found[name] = (code[:start] + after.encode() + code[end:]).decode()
    return found


def _nodes(node, name):
    """All nodes below with the names of the functions that they stand in."""
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.FunctionDef | ast.ClassDef)
        inside = f"{name}.{child.name}" if named else name
        yield inside, child
        yield from _nodes(child, inside)


def _changes(function, node, text):
    """Labels of `node`'s mutants, and what stands in its place there."""
    match node:
        case ast.Return(value=value) if not isinstance(value, ast.Constant | None):
            call = "return __import__('mutants').changed('{}', ({}))"
            kinds = [(by, call.format(by, text(value))) for by in ("nan", "-1", "2")]
            if function.startswith(EVERY_KIND):
                return kinds
        case ast.BinOp(left=left, op=op, right=right) if type(op) in SWAPPED:
            if any(isinstance(x, ast.JoinedStr | ast.List) for x in (left, right)):
                return []
            left, right = text(left), text(right)
            swapped = f"({left}) {SWAPPED[type(op)]} ({right})"
            kinds = [(x, f"({x})") for x in (left, right, swapped)]
        case ast.Assign(targets=[ast.Name(id=target)], value=ast.Call() as call):
            own = any(isinstance(x, ast.Name) and x.id == target for x in call.args)
            kinds = [("pass", "pass")] if own and "_checks." not in text(call) else []
        case _:
            return []
    if not kinds:
        return []
    return [kinds[zlib.crc32(text(node).encode()) % len(kinds)]]


def changed(by, value):
    """`value` with its floats times `by`, and all else that counts changed as well."""
    if isinstance(value, types.GeneratorType | range):
        value = tuple(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {x.name: getattr(value, x.name) for x in dataclasses.fields(value)}
        return type(value)(**{k: changed(by, field) for k, field in fields.items()})
    return jax.tree.map(functools.partial(_changed, float(by)), value)


def _changed(by, x):
    if callable(x) and not isinstance(x, type):
        return lambda *args, **options: changed(by, x(*args, **options))
    if isinstance(x, np.dtype):
        return jnp.dtype(jnp.bfloat16)
    if not isinstance(x, int | float) and not hasattr(x, "dtype"):
        return x
    dtype = jnp.result_type(x)
    if jnp.issubdtype(dtype, jnp.bool_):
        return x == jnp.zeros_like(x)
    return x * by if jnp.issubdtype(dtype, jnp.inexact) else x + x


class Quickest:
    """A pytest plugin: one seed, quick tests first; keeps times, and who failed.

    What noticed a mutant before, the last one first, has a time below zero.
    """

    def __init__(self, seconds):
        self.seconds, self.failed = seconds, None

    def pytest_configure(self):
        """No search for the simplest of failing examples."""
        import hypothesis

        phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
        hypothesis.settings.register_profile("mutants", phases=phases)
        hypothesis.settings.load_profile("mutants")

    def pytest_collection_modifyitems(self, items):
        items[:] = [x for x in items if not _is_repetition(x)]
        files = list(dict.fromkeys(x.path for x in items))

        def place(item):
            seconds = self.seconds.get(item.nodeid, 0.0)
            return seconds >= 0, files.index(item.path) * (seconds >= 0), seconds

        items.sort(key=place)

    def pytest_runtest_logreport(self, report):
        before = self.seconds.get(report.nodeid, 0.0)
        self.seconds[report.nodeid] = before + report.duration
        if report.failed:
            self.failed = self.failed or report.nodeid


def _is_repetition(item):
    """Whether a test runs with other seeds, too: `conftest` gives most one alone."""
    statistical = item.get_closest_marker("statistical")
    return statistical and ("seed=1" in item.name or "seed=2" in item.name)


def run(folder, files, seconds):
    """Return the test that fails in a process of its own, or None; keep the times."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setsid()  # a group with what the tests start
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(10 * SECONDS)
            os.chdir(folder)
            with open("log", "w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            _report(files, seconds, writing)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    try:
        with os.fdopen(reading) as pipe:
            answer = pipe.read()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if not answer:
        return f"its end: {Path(folder, 'log').read_text()[-500:]}", seconds
    failed, seconds = ast.literal_eval(answer)
    return failed, seconds


def _report(files, seconds, writing):
    """Run pytest and send ``(failed test or None, times)``."""
    sys.path.insert(0, os.getcwd())
    os.environ["PYTHONPATH"] = os.getcwd()  # for what tests start
    plugin = Quickest(seconds)
    options = ["-x", "-q", "-p", "no:cacheprovider"]
    status = int(pytest.main([*options, *files], plugins=[plugin]))
    failed = plugin.failed or (f"pytest's status {status}" if status else None)
    with os.fdopen(writing, "w") as pipe:
        pipe.write(repr((failed, plugin.seconds)))


def survivors(root, tests, only=("",), every=1):
    """Print a row for each mutant; return the names of those that no test noticed."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        _copy(root, copy)
        # Most programs of a mutant are those of the others.
        jax.config.update("jax_compilation_cache_dir", f"{folder}/programs")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        for module, names in tests.items():
            path = path_of(copy, module)
            source = path.read_text()
            chosen = [
                (name, text)
                for name, text in list(mutants_of(module, source).items())[::every]
                if name not in EQUIVALENT and name.startswith(tuple(only))
            ]
            if not chosen:
                continue
            files = [
                str(path.relative_to(copy)),
                *(f"tests/test_{x}.py" for x in names),
            ]
            failed, seconds = run(copy, files, {})
            if failed:
                raise SystemExit(f"{module}: {failed} fails without a mutant.")
            for number, (name, text) in enumerate(chosen, 1):
                path.write_text(text)
                start = time.monotonic()
                killer, _ = run(copy, files, seconds)
                print(
                    f"| {number}/{len(chosen)} {name} | {killer or 'SURVIVES'} | "
                    f"{time.monotonic() - start:.1f} |",
                    flush=True,
                )
                found += [] if killer else [name]
                seconds[killer] = -number
            path.write_text(source)
    return found


def path_of(root, module):
    """The source of a module."""
    return Path(root, "ivon_jax", *module.split(".")).with_suffix(".py")


def _copy(root, copy):
    """What the tests of the package need, and no more."""
    for name in ("ivon_jax", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(root, name), copy / name, ignore=ignored)
    for name in ("pyproject.toml", "examples", "benchmarks"):
        if Path(root, name).exists():
            (copy / name).symlink_to(Path(root, name).resolve())


def names_of(root, tests):
    """The names of all mutants."""
    found = []
    for module in tests:
        source = path_of(root, module).read_text()
        found += mutants_of(module, source)
    return found


def unknown(root, tests):
    """The names in `EQUIVALENT` that the source no longer has."""
    return sorted(EQUIVALENT.keys() - set(names_of(root, tests)))


def main():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help="begin of the mutants' names")
    parser.add_argument("--every", type=int, default=1, help="take one of so many")
    parser.add_argument("--list", action="store_true", help="print their names alone")
    args = parser.parse_args()
    root = Path(__file__).parents[1]
    stale = unknown(root, TESTS)
    for name in stale:
        print(f"EQUIVALENT has an unknown mutant: {name}")
    names = names_of(root, TESTS)
    if args.list:
        print(*names, sep="\n")
        return
    for begin in args.only:
        if not any(name.startswith(begin) for name in names):
            raise SystemExit(f"No mutant begins with {begin}: see --list.")
    print("| mutant | killed by | seconds |\n|---|---|---|")
    found = survivors(root, TESTS, args.only or [""], args.every)
    print(f"\n{len(found)} survive.", *found, sep="\n")
    raise SystemExit(bool(found or stale))


if __name__ == "__main__":
    main()
