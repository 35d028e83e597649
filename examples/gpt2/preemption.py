"""Being told to end: Slurm and preempted TPUs send SIGTERM, and kill somewhat later.

with preemption.notice() as told:
    for step in ...:
        if told(step):  # the same step in all processes
            ...  # save, and end
"""

import contextlib
import signal

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def notice():
    """Yield ``told(step)``, to be called at every step; True when it is time to end.

    Of several processes one is told first. They agree on a step that none is beyond.
    """
    if jax.process_count() > 1:  # `jax.distributed` listens to the signal itself
        yield multihost_utils.reached_preemption_sync_point
        return
    signals = []
    before = signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    try:
        yield lambda _: bool(signals)
    finally:
        signal.signal(signal.SIGTERM, before)
