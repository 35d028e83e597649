"""A dry run of a training step: the numbers that tell its mistakes."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from .._optimizer.state import EVONState, IVONState
from ._dry_run import DryRun, Taken

NUM_NOISY = 64  # the most entries with noise in the probes of the sample
NOISE = 0.1  # theirs, in root mean squares of the weights
# Sums of squares, probes of the sample among them, are of float32's arithmetic.
ROUNDING = 1e-4


def of_step(
    step: Callable[..., Any], args: tuple[Any, ...], num_steps: int | None
) -> tuple[dict[str, float], DryRun]:
    """Take a step again and again; its numbers, and what was taken."""
    dry = DryRun(step, args)
    leaves = dry.next_leaves(dry.returned)
    if leaves is None:
        return {"state_moves": 0.0}, dry
    moves = _steps_between(dry, leaves)
    numbers = {"state_moves": moves}
    if not moves:
        return numbers, dry
    before, after = dry.carried(dry.leaves), dry.carried(leaves)
    numbers["recompiled"] = _num_changed(before, after)
    numbers["non_finite"] = float(np.mean(~np.isfinite(dry.mean(leaves))))
    if not all(map(_is_known, dry.states(leaves))) or numbers["non_finite"]:
        return numbers, dry
    # Before its first step, `sampled` has no sample yet.
    start = leaves if dry.is_sampled else dry.leaves
    probes = _Probes(dry, start)
    grad = probes.silent().grad
    numbers["no_gradient"] = float(not grad.any())
    if grad.any():
        numbers |= probes.of_batch(grad) | probes.of_length(grad, num_steps)
        if not dry.is_sampled:
            numbers |= probes.of_sample()
    return numbers, dry


def _is_known(state):
    """Tell whether a state is IVON's, or EVON's without a prior in bases of its own."""
    is_evon = isinstance(state, EVONState)
    return isinstance(state, IVONState) or (is_evon and state.own_prior is None)


def _steps_between(dry, leaves):
    """By how many steps the states are further; no more than one."""
    pairs = zip(dry.states(dry.leaves), dry.states(leaves), strict=True)
    moves = [float(new.count) - float(old.count) for old, new in pairs]
    if max(moves) > 1.0:
        raise ValueError(
            f"`step` must take one step, got one that takes {max(moves):.0f}. Check "
            "the function inside of your loop or scan."
        )
    return min(moves)


class _Probes:
    """Steps from one place, with one thing changed at a time."""

    def __init__(self, dry: DryRun, leaves: list[Any]):
        self.dry, self.leaves, self.mean = dry, leaves, dry.mean(leaves)
        self.scale = float(np.sqrt(np.mean(self.mean**2))) or 1.0
        # A batch of one example, again and again: all micro-batches are alike.
        self.row = np.zeros(dry.batch_size, int) if dry.batch_size else None

    def silent(self, **changes) -> Taken:
        """A step without noise; of `sampled`, which draws later, one as it is."""
        if not self.dry.is_sampled:
            hess = np.full_like(self.mean, 1e6 / self.scale**2)
            changes = {"ess": 1e6, "hess": hess} | changes
        return self.dry.take(self.leaves, **changes)

    def of_batch(self, grad: np.ndarray) -> dict[str, float]:
        """Measure how the gradient depends on the rows of a batch."""
        size = self.dry.batch_size
        if size < 2:
            return {}
        numbers = {}
        rows = np.arange(size)
        try:
            twice = self.silent(rows=np.concatenate([rows, rows])).grad
        except (TypeError, ValueError):  # it takes batches of this size alone
            pass
        else:
            numbers["loss_scale"] = float(np.sum(grad * twice) / np.sum(grad**2))
        # Two halves of the batch, in turns at even and odd places. A mean over
        # examples has F(a, b) + F(b, a) = F(a, a) + F(b, b), with dropout, too.
        half = size // 2
        first, second = rows // 2 % half, rows // 2 % half + half
        if self.dry.same_rows(first, second):
            return numbers
        turns = rows % 2 == 0
        aa, ab, ba, bb = (
            self.silent(rows=np.where(turns, *pair)).grad
            for pair in itertools.product((first, second), repeat=2)
        )
        numbers["batch_effect"] = _distance(aa, bb)
        if not numbers["batch_effect"] or _is_clipped(aa):
            return numbers
        # Factors, as of a clipped norm or of weights of examples, are no coupling.
        if _distance(ab, ba) < ROUNDING:
            numbers["batch_coupling"] = _residual(ab, aa, bb)
        else:  # with dropout, places have noise of their own
            numbers["batch_coupling"] = _residual(ab, ba, aa, bb)
        return numbers

    def of_length(self, grad: np.ndarray, num_steps: int | None) -> dict[str, float]:
        """Measure how far steps lead, and whether they go down."""
        dry, leaves, mean = self.dry, self.leaves, self.mean
        state: Any = dry.states(leaves)[0]  # with settings
        horizon = num_steps or 1.0 / float(state.one_minus_b2)
        # Schedules warm up and decay: the longest step counts.
        counts = [None, *sorted({int(horizon * x) for x in (1e-3, 0.03, 0.1, 0.5)})]
        steps = {c: dry.take(leaves, count=c).mean - mean for c in counts}
        longest = max(counts, key=lambda c: _norm(steps[c]))
        step = steps[longest]
        length, weights = _norm(step), self.scale * np.sqrt(len(mean))
        numbers = {"reach": float(horizon * length / weights)}
        if dry.is_sampled or not step.any():
            return numbers
        quiet = dry.take(leaves, count=longest, ess=100.0 * float(state.ess))
        numbers["descent"] = -_cosine(quiet.mean - mean, grad + dry.pull(leaves))
        # A little way along the step, the gradient changes by the curvature.
        share = min(1.0, 0.01 * weights / length)
        after = self.silent(mean=mean + share * step).grad
        before = np.sum(grad * step)
        if before < 0:
            curvature = (1.0 - np.sum(after * step) / before) / share
            b1 = float(state.b1)
            limit = 2.0 * (1.0 + b1) / (1.0 - b1)
            numbers["overshoot"] = float(curvature / limit)
        return numbers

    def of_sample(self) -> dict[str, float]:
        """Compare where the gradient was taken with what the optimizer was told."""
        mean, scale = self.mean, NOISE * self.scale
        # With h so large that steps are short, and all the same noise.
        wide: dict[str, Any] = {
            "hess": np.full_like(mean, 1e8),
            "ess": 1e-8 / scale**2,
        }
        moved = self.dry.take(self.leaves, **wide)
        numbers = {
            "noise_in_params": float(_norm(moved.mean - mean) / _norm(moved.stddev))
        }
        at_mean = self.silent(rows=self.row).grad
        if not at_mean.any():
            return numbers
        some, one, other = self._with_noise(at_mean)
        noise = np.zeros_like(mean)
        noise[some] = one.noise[some]
        size = float(np.sqrt(np.mean((noise / one.stddev)[some] ** 2)))
        numbers["sample_noise"] = size
        numbers["sample_effect"] = _distance(one.grad, at_mean)
        if size > ROUNDING:
            numbers["key_effect"] = _distance(noise[some], other.noise[some])
        if size > 0.4 and numbers["sample_effect"] > ROUNDING:
            there = self.silent(mean=mean + noise, rows=self.row).grad
            error = _norm(there - one.grad) / _norm(one.grad - at_mean)
            numbers["sample_error"] = float(error)
        return numbers

    def _with_noise(self, at_mean):
        """Steps with two keys, and noise of a few entries that have a gradient."""
        dry = self.dry
        count = max(1, min(NUM_NOISY, len(at_mean) // 8))
        some = np.argsort(-np.abs(at_mean))[:count]
        some = some[at_mean[some] != 0]
        # Without a key among the arguments, it is made of the state's count.
        places = self.leaves, self.leaves if dry.rest.keys else dry.again(self.leaves)
        while True:
            noise = self._noise_of(some, at_mean)
            takes = [
                dry.take(place, rows=self.row, mean=self.mean, key=key, **noise)
                for key, place in enumerate(places)
            ]
            # Where noise takes the gradient away, it can't be seen.
            seen = np.all([np.isfinite(taken.noise[some]) for taken in takes], axis=0)
            if seen.all() or not seen.any():
                return some, *takes
            some = some[seen]

    def _noise_of(self, some, grad):
        """Noise of some entries alone, with which h moves by a tenth of itself."""
        state = self.dry.states(self.leaves)[0]
        noise = NOISE * self.scale
        curvature = 10.0 * float(state.one_minus_b2) * np.abs(grad[some]) / noise
        ess = 1.0 / (noise**2 * float(np.median(curvature)))
        hess = np.full_like(self.mean, min(1e12 / (ess * self.scale**2), 1e14))
        hess[some] = np.maximum(curvature - float(state.weight_decay), 0.0)
        return {"hess": hess, "ess": ess}


def _num_changed(before, after):
    """Count arrays that come back with another shape, dtype or weak type."""

    def kind(x):
        weak = getattr(x, "weak_type", not hasattr(x, "dtype"))
        return np.shape(x), jax.dtypes.result_type(x), weak

    pairs = zip(before, after, strict=True)
    return float(sum(kind(x) != kind(y) for x, y in pairs))


def _norm(x):
    return np.sqrt(np.sum(x**2))


def _distance(x, y):
    """The norm of the difference, relative to the mean of both norms."""
    whole = _norm(x) + _norm(y)
    return float(2.0 * _norm(x - y) / whole) if whole else 0.0


def _cosine(x, y):
    norms = _norm(x) * _norm(y)
    return float(np.sum(x * y) / norms) if norms else 0.0


def _residual(target, *columns):
    """Return the residual of the best combination of columns, over the target."""
    if not target.any():
        return 0.0
    matrix = np.stack(columns, axis=1)
    best = np.linalg.lstsq(matrix, target, rcond=None)[0]
    return float(_norm(target - matrix @ best) / _norm(target))


def _is_clipped(grad):
    """Return whether more than two entries have the largest value, as after a clip."""
    return np.sum(np.abs(grad) == np.max(np.abs(grad))) > 2
