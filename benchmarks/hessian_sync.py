"""Below twice the traffic: cheaper ways to average the Hessian over replicas.

    python benchmarks/hessian_sync.py          # 3 min on two CPU cores

With a sample per replica the gradient and h_hat are all-reduced, twice what AdamW
sends. The first table is of compiled programs whose optimizer state is cut over the
replicas (ZeRO), read as common/programs.py says, in the parameters' bytes. In the
others each way to send less trains the same quadratic, whose Hessian diagonal is one
everywhere, on 8 simulated replicas with a mini-batch each; h starts at the truth, so
that they show the noise (root mean square error) and bias of h after all steps.
Averages at every k-th step are included with ``b2**k``; on the other steps ``hess=h``
leaves h as it is, bit for bit.

What to see: accumulated on each device, and averaged every 10th step, h is that of the
exact rule but for some thousandths of its noise, for 1.1 times AdamW's traffic and one
more buffer; in bfloat16 it is 1.05. Without the buffer the noise grows by sqrt(k), and
where it is large so does the bias, because the rule's correction grows with the square
of a step. One shared sample has sqrt(8) times the noise where sampling is all there is,
but hardly more where the mini-batch's noise is larger: that is averaged over the
replicas whoever draws. ZeRO changes nothing: a replica that draws a sample of its own
needs all of h.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from common import flags, programs, results, tables
from common.flags import Count, Positive, Results
from jax.sharding import AxisType, PartitionSpec as P
from tqdm import tqdm

import ivon_jax


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    dimensions: Count = 64
    correlation: float = 0.5  # of neighbours in the Hessian
    replicas: Count = 8
    steps: Count = 10_000
    seeds: Count = 8
    learning_rate: float = 0.1
    ess: Positive = 1e4
    weight_decay: float = 1e-4
    hess_init: Positive = 1.0  # the truth
    parameters: Count = 2**20  # of the programs that are compiled alone
    results: Results = "hessian_sync.json"


def mean(hess):
    """Average over replicas."""
    return hess.mean(0)


def bfloat16_mean(hess):
    """Average over replicas, one after the other, all in bfloat16.

    Casts would not do: XLA may keep more bits than asked for.
    """
    rounded = functools.partial(
        jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=7
    )
    total = functools.reduce(lambda a, b: rounded(a + b), rounded(hess))
    return rounded(total / len(hess))


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One way to average the Hessian estimates of all replicas."""

    traffic: float  # beside AdamW's
    buffers: int = 0  # more, as large as the parameters
    every: int = 1  # steps
    accumulate: bool = False  # what comes in between
    shared: bool = False  # noise
    average: Callable = mean


SCHEMES = {
    "every step": Scheme(2.0),
    "every step, in bfloat16": Scheme(1.5, average=bfloat16_mean),
    "every 2nd step": Scheme(1.5, every=2),
    "every 10th step": Scheme(1.1, every=10),
    "every 2nd step, accumulated": Scheme(1.5, 1, every=2, accumulate=True),
    "every 10th step, accumulated": Scheme(1.1, 1, every=10, accumulate=True),
    "every 10th step, accumulated, in bfloat16": Scheme(
        1.05, 1, every=10, accumulate=True, average=bfloat16_mean
    ),
    "one shared sample": Scheme(1.0, shared=True),
}
# Standard deviation of h_hat by the mini-batch's noise: 0, and 10 times the truth.
DATA_NOISE = (0.0, 10.0)
DECAY_RATES = (0.99999, 0.999)


def create_loss(config):
    """Return a quadratic loss (theta, center) with ones on the Hessian's diagonal."""
    index = jnp.arange(config.dimensions)
    hessian = config.correlation ** jnp.abs(index[:, None] - index)

    def loss_fn(theta, center):
        return 0.5 * (theta - center) @ hessian @ (theta - center)

    return loss_fn


def create_run(scheme, b2, data_noise, config):
    """Return the training of one seed: key -> the last h."""
    create = functools.partial(
        ivon_jax.ivon,
        config.learning_rate,
        config.ess,
        weight_decay=config.weight_decay,
        hess_init=config.hess_init,
        rescale_lr=False,
    )
    tx = create(b2=b2**scheme.every)
    grad_fn = ivon_jax.value_and_grad(create_loss(config))
    grad_fn = jax.vmap(grad_fn, in_axes=(0, None, None, 0))
    spread = data_noise / config.ess**0.5

    def step(carry, x):
        params, opt_state, total = carry
        index, key = x
        noise_key, data_key = jax.random.split(key)
        replicas = jnp.arange(config.replicas) * (not scheme.shared)
        keys = jax.vmap(lambda i: jax.random.fold_in(noise_key, i))(replicas)
        centers = spread * jax.random.normal(data_key, total.shape)
        _, (grads, hess) = grad_fn(keys, params, opt_state, centers)
        total = total + hess / scheme.every if scheme.accumulate else hess
        now = (index + 1) % scheme.every == 0
        [state] = ivon_jax.find_states(opt_state)
        hess_hat = jnp.where(now, scheme.average(total), state.hess)
        updates, opt_state = tx.update(mean(grads), opt_state, params, hess=hess_hat)
        total = jnp.where(now, 0.0, total)
        return (params + updates, opt_state, total), None

    def run(key):
        params = jnp.zeros(config.dimensions)
        total = jnp.zeros((config.replicas, config.dimensions))
        steps = jnp.arange(config.steps), jax.random.split(key, config.steps)
        carry, _ = jax.lax.scan(step, (params, tx.init(params), total), steps)
        [state] = ivon_jax.find_states(carry[1])
        return state.hess

    return run


def loss_of_products(theta, x):
    """Return any loss: the compiler is only asked what is sent."""
    return jnp.mean((theta * x).sum() ** 2)


def gather(x):
    """Return the parts of all devices."""
    return jax.lax.all_gather(x, "data", tiled=True)


def gather_rounded(x):
    """Return the parts of all devices, rounded to bfloat16.

    They travel as integers, because the CPU backend would send float32.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return jax.lax.bitcast_convert_type(gather(bits), jnp.bfloat16).astype(x.dtype)


def mean_everywhere(x):
    """Return the mean over devices."""
    return jax.lax.pmean(x, "data")


def mean_shard(x):
    """Return this device's part of the mean over devices."""
    total = jax.lax.psum_scatter(x, "data", tiled=True)
    return total / jax.lax.axis_size("data")


def own_shard(x):
    """Return this device's part of what all have."""
    size = len(x) // jax.lax.axis_size("data")
    return jax.lax.dynamic_slice(x, (jax.lax.axis_index("data") * size,), (size,))


def adamw_step(tx, average, part, whole, key, params, opt_state, x):
    """Train as usual."""
    del key
    grads = average(jax.grad(loss_of_products)(params, x))
    own = part(params)
    updates, opt_state = tx.update(grads, opt_state, own)
    return whole(own + updates), opt_state


def replica_step(tx, average, part, whole, gather_hess, key, params, opt_state, x):
    """Train with a sample per replica, which needs all of sigma."""
    key = jax.random.fold_in(key, jax.lax.axis_index("data"))
    state, *rest = opt_state
    hess = gather_hess(state.hess)
    state = state._replace(momentum=hess, hess=hess), *rest
    grad_fn = ivon_jax.value_and_grad(loss_of_products)
    _, estimate = grad_fn(key, params, state, x)
    grads, hess = map(average, estimate)
    own = part(params)
    updates, opt_state = tx.update(grads, opt_state, own, hess=hess)
    return whole(own + updates), opt_state


def shared_step(tx, key, params, opt_state, x):
    """Train with one sample, of which each device draws a part; it gathers no more."""
    key = jax.random.fold_in(key, jax.lax.axis_index("data"))
    theta = ivon_jax.sample(key, params, opt_state)
    grads = mean_shard(jax.grad(loss_of_products)(gather(theta), x))
    updates, opt_state = tx.update(grads, opt_state, params, sample=theta)
    return params + updates, opt_state


def create_programs(config):
    """Return {name: (training step, optimizer, specs of parameters and state)}."""
    adamw, ivon = optax.adamw(0.1), ivon_jax.ivon(0.1, config.ess)

    def same(x):
        return x

    one = dict(average=mean_everywhere, part=same, whole=same)
    zero = dict(average=mean_shard, part=own_shard, whole=gather)
    replica = functools.partial(replica_step, ivon)
    rounded = functools.partial(replica, **zero, gather_hess=gather_rounded)
    return {
        "AdamW, all-reduce": (
            functools.partial(adamw_step, adamw, **one),
            adamw,
            P(),
            P(),
        ),
        "AdamW, ZeRO": (
            functools.partial(adamw_step, adamw, **zero),
            adamw,
            P(),
            P("data"),
        ),
        "IVON, a sample per replica, all-reduce": (
            functools.partial(replica, **one, gather_hess=same),
            ivon,
            P(),
            P(),
        ),
        "IVON, a sample per replica, ZeRO": (
            functools.partial(replica, **zero, gather_hess=gather),
            ivon,
            P(),
            P("data"),
        ),
        "the same, h gathered in bfloat16": (rounded, ivon, P(), P("data")),
        "IVON, one sample, ZeRO": (
            functools.partial(shared_step, ivon),
            ivon,
            P("data"),
            P("data"),
        ),
    }


def compile_program(step, tx, params_spec, state_spec, config):
    """Return the compiled step, and the shapes of its parameters."""
    mesh = jax.make_mesh((config.replicas,), ("data",), axis_types=(AxisType.Auto,))
    params = jax.ShapeDtypeStruct([config.parameters], jnp.float32)
    opt_state = jax.eval_shape(tx.init, params)
    specs = jax.tree.map(lambda x: state_spec if x.ndim else P(), opt_state)

    def positional(key, params, opt_state, x):
        return step(key=key, params=params, opt_state=opt_state, x=x)

    mapped = jax.shard_map(
        positional,
        mesh=mesh,
        in_specs=(P(), params_spec, specs, P()),
        out_specs=(params_spec, specs),
        check_vma=False,
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.jit(mapped).lower(key, params, opt_state, params).compile(), params


def traffic(config):
    """Yield what steps with a sharded optimizer state send, of compiled programs."""
    first = None
    for name, program in create_programs(config).items():
        compiled, params = compile_program(*program, config)
        step, unit = programs.read(compiled), 4 * params.size
        first = first or step.ring
        sent = [step.sent.get(kind, 0) / unit for kind in programs.COLLECTIVES]
        row = tables.record({"step": name}, programs.COLLECTIVES, sent)
        row["ring"] = step.ring / unit
        yield row | {"ring / first row": step.ring / first}


def root_mean_square(x):
    """Return one number for each seed."""
    return jnp.sqrt(jnp.mean(x**2, axis=-1))


def errors(data_noise, config, progress):
    """Yield a record of each scheme, in per cent of the truth."""
    keys = jax.random.split(jax.random.key(0), config.seeds)
    first = {}
    for name, scheme in SCHEMES.items():
        row = {"mini-batch noise": data_noise, "h_hat is averaged": name}
        row |= {"traffic / AdamW": scheme.traffic, "more buffers": scheme.buffers}
        for b2 in DECAY_RATES:
            run = create_run(scheme, b2, data_noise, config)
            hess = jax.jit(jax.vmap(run))(keys)
            away = hess - first.setdefault(b2, hess)
            row[f"error of h, b2 = {b2}"] = 100 * root_mean_square(hess - 1.0)
            row[f"its bias, b2 = {b2}"] = 100 * (hess.mean(-1) - 1.0)
            row[f"away from 1st row, b2 = {b2}"] = 100 * root_mean_square(away)
            progress.update()
        yield row


def main():
    """Train with every scheme."""
    config = flags.parse(Config, __doc__)
    jax.config.update("jax_num_cpu_devices", config.replicas)
    study = results.Study(config)
    digits = dict.fromkeys((*programs.COLLECTIVES, "ring", "ring / first row"), 3)
    study.table("programs", traffic(config), digits)
    count = len(DATA_NOISE) * len(SCHEMES) * len(DECAY_RATES)
    with tqdm(total=count) as progress:
        rows = [row for noise in DATA_NOISE for row in errors(noise, config, progress)]
    study.table("errors of h in %", rows)


if __name__ == "__main__":
    main()
