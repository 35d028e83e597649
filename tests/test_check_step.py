"""A dry run of a training step tells its mistakes, and lets a healthy one pass."""

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import ivon_jax
from ivon_jax import diagnostics
from ivon_jax.diagnostics import _advice

SIZE, NUM_EXAMPLES = 16, 1000
INPUT_KEY, FIRST_KEY, LAST_KEY, TRAIN_KEY = jax.random.split(jax.random.key(0), 4)
INPUTS = jax.random.normal(INPUT_KEY, (SIZE, 4))
LABELS = (INPUTS[:, 0] * INPUTS[:, 1] > 0).astype(int)
PARAMS = {
    "first": 0.5 * jax.random.normal(FIRST_KEY, (4, 12)),
    "last": 0.3 * jax.random.normal(LAST_KEY, (12, 2)),
}
SETTINGS = {"learning_rate": 0.3, "ess": float(NUM_EXAMPLES), "b2": 0.999}


def hidden(params, inputs):
    return jnp.tanh(inputs @ params["first"])


def normalised(params, inputs):
    """Batch normalisation."""
    units = hidden(params, inputs)
    centred = units - units.mean(0, keepdims=True)
    return centred / jnp.sqrt(units.var(0, keepdims=True) + 1e-3)


def dropped(params, inputs, key):
    units = hidden(params, inputs)
    return jnp.where(jax.random.bernoulli(key, 0.8, units.shape), units / 0.8, 0.0)


def losses(params, inputs, labels, units=hidden):
    loss = optax.losses.softmax_cross_entropy_with_integer_labels
    return loss(units(params, inputs) @ params["last"], labels)


class Given(NamedTuple):
    """What a step has at hand."""

    params: dict
    theta: dict
    other: dict  # another draw
    opt_state: tuple
    updates: dict | None = None
    new_state: tuple | None = None


def mean(given):
    return given.params


def theta(given):
    return given.theta


def other(given):
    return given.other


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step in pieces, each of which a user may get wrong."""

    losses: Any = losses
    reduce: Any = jnp.mean
    key: Any = lambda key: key
    batch: Any = lambda *batch: batch
    gradient_at: Any = theta
    loss_of: Any = lambda weights, _: weights
    told: Any = theta
    moved: Any = lambda given: added(given.params, given.updates)
    kept: Any = lambda given: given.new_state
    family: Any = ivon_jax.ivon
    settings: dict = dataclasses.field(default_factory=dict)

    def tx(self):
        return self.family(**(SETTINGS | self.settings))

    def arguments(self):
        return PARAMS, self.tx().init(PARAMS), INPUTS, LABELS, TRAIN_KEY

    def __call__(self, params, opt_state, inputs, labels, key):
        key = self.key(key)
        drawn = [
            ivon_jax.sample(k, params, opt_state)
            for k in (key, jax.random.fold_in(key, 1))
        ]
        given = Given(params, *drawn, opt_state)

        def loss_fn(weights):
            weights = self.loss_of(weights, given)
            return self.reduce(self.losses(weights, *self.batch(inputs, labels)))

        grads = jax.grad(loss_fn)(self.gradient_at(given))
        sample = self.told(given)
        updates, state = self.tx().update(grads, opt_state, params, sample=sample)
        given = given._replace(updates=updates, new_state=state)
        return self.moved(given), self.kept(given)


def copied(tree):
    return jax.tree.map(lambda x: x + 0.0, tree)


def half(tree):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)


def added(tree, updates, scale=1.0):
    return jax.tree.map(lambda p, u: p + scale * u, tree, updates)


# What is wrong, and the sentence that says so.
MISTAKES = {
    "summed_loss": (Step(reduce=jnp.sum), "SUMMED"),
    "gradient_at_the_mean": (Step(gradient_at=mean), "AT_MEAN"),
    "gradient_at_another_draw": (Step(gradient_at=other), "OTHER_SAMPLE"),
    "another_draw_told": (Step(told=other), "OTHER_SAMPLE"),
    "copy_of_the_mean_told": (
        Step(told=lambda given: copied(given.params)),
        "NO_NOISE",
    ),
    "one_key_for_all": (Step(key=lambda _: jax.random.key(7)), "ONE_KEY"),
    "updated_from_theta": (
        Step(moved=lambda given: added(given.theta, given.updates)),
        "FROM_THETA",
    ),
    "updates_subtracted": (
        Step(moved=lambda given: added(given.params, given.updates, -1.0)),
        "UPHILL",
    ),
    "params_not_moved": (Step(moved=mean), "SLOW"),
    "learning_rate_too_small": (Step(settings={"learning_rate": 1e-6}), "SLOW"),
    "learning_rate_too_large": (Step(settings={"learning_rate": 1e3}), "UNSTABLE"),
    "state_not_returned": (Step(kept=lambda given: given.opt_state), "STATE_LOST"),
    "state_forgotten": (Step(kept=lambda _: None), "STATE_LOST"),
    "batch_normalisation": (
        Step(losses=functools.partial(losses, units=normalised)),
        "COUPLED",
    ),
    "a_batch_from_outside": (Step(batch=lambda *_: (INPUTS, LABELS)), "NO_BATCH"),
    "loss_of_the_mean": (Step(loss_of=lambda _, given: given.params), "NO_GRADIENT"),
    "number_of_batches": (Step(settings={"ess": NUM_EXAMPLES / SIZE}), "BATCHES"),
    "params_in_another_dtype": (
        Step(moved=lambda given: half(added(given.params, given.updates))),
        "RECOMPILED",
    ),
    "loss_is_nan": (Step(reduce=lambda x: jnp.sqrt(-x.mean())), "DIVERGED"),
}


def check(step, *args, **options):
    options = {"num_examples": NUM_EXAMPLES, "num_steps": 1000} | options
    return diagnostics.check_step(step, *(args or step.arguments()), **options)


def is_sentence(text, name):
    """Whether `text` is the sentence of this name with its numbers filled in."""
    pieces = re.split(r"\{.*?\}", getattr(_advice, name))
    return re.fullmatch(".*".join(map(re.escape, pieces)), text)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "name"), MISTAKES.values(), ids=MISTAKES)
def test_each_mistake_gets_its_sentence_and_no_other(step, name):
    [sentence] = check(step).advice
    assert is_sentence(sentence, name)
    assert "{" not in sentence


def test_every_sentence_about_steps_is_provoked_and_its_number_explained():
    sentences = {sentence for _, _, _, sentence in diagnostics.HEALTHY_STEP}
    tested = {getattr(_advice, name) for _, name in MISTAKES.values()}
    assert sentences | {_advice.DIVERGED, _advice.BATCHES} == tested
    for name, *_ in diagnostics.HEALTHY_STEP:
        assert f"``{name}``" in diagnostics.__doc__


def with_dropout(params, opt_state, batch, key):
    """A carry-like signature, with dropout and clipping before IVON."""
    sample_key, dropout_key = jax.random.split(key)
    theta = ivon_jax.sample(sample_key, params, opt_state)

    def loss_fn(theta):
        units = functools.partial(dropped, key=dropout_key)
        return losses(theta, batch["inputs"], batch["labels"], units).mean()

    loss, grads = jax.value_and_grad(loss_fn)(theta)
    tx = CLIPPED
    updates, opt_state = tx.update(grads, opt_state, params, sample=theta)
    return loss, (optax.apply_updates(params, updates), opt_state)


CLIPPED = optax.chain(optax.clip_by_global_norm(0.1), ivon_jax.ivon(**SETTINGS))


def with_micro_batches(carry, batch):
    """As `jax.lax.scan` takes it: all that is carried in one argument."""
    params, opt_state, key = carry
    key, step_key = jax.random.split(key)
    grad_fn = ivon_jax.value_and_grad(mean_loss, mc_samples=2, microbatches=2)
    loss, estimate = grad_fn(step_key, params, opt_state, *batch)
    tx = ivon_jax.ivon(**SETTINGS)
    updates, opt_state = estimate.update(tx, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state, key), loss


def mean_loss(params, inputs, labels):
    return losses(params, inputs, labels).mean()


def donated():
    return jax.jit(lambda *args: Step()(*args), donate_argnums=(0, 1))


def of_trainer(params, opt_state, inputs, labels):
    """A trainer that knows nothing of samples, with `sampled`."""
    grads = jax.grad(mean_loss)(params, inputs, labels)
    updates, opt_state = SAMPLED.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


SAMPLED = ivon_jax.sampled(ivon_jax.ivon(**SETTINGS), jax.random.key(3))


def keys_of_the_count(params, opt_state, inputs, labels):
    """A step that makes its keys of the count of steps."""
    [state] = ivon_jax.find_states(opt_state)
    key = jax.random.fold_in(TRAIN_KEY, state.count)
    return Step()(params, opt_state, inputs, labels, key)


def in_part(params, opt_state, inputs, labels, key):
    theta = ivon_jax.sample(key, params, opt_state)
    grads = jax.grad(mean_loss)(theta, inputs, labels)
    updates, opt_state = PARTS.update(grads, opt_state, params, sample=theta)
    return optax.apply_updates(params, updates), opt_state


PARTS = optax.partition(
    {"bayes": ivon_jax.ivon(**SETTINGS), "point": optax.sgd(0.1)},
    {"first": "bayes", "last": "point"},
)
PRIOR = ivon_jax.Posterior.isotropic(PARAMS, 1.0)
BATCH = {"inputs": INPUTS, "labels": LABELS}
HEALTHY = {
    "plain": (Step(), Step().arguments()),
    "long_average": (Step(settings={"b2": 0.99999}), Step().arguments()),
    "warmed_up": (
        Step(
            settings={
                "learning_rate": optax.warmup_cosine_decay_schedule(0.0, 0.3, 50, 1000)
            }
        ),
        None,
    ),
    "clip_radius": (Step(settings={"clip_radius": 1e-2}), None),
    "prior": (Step(settings={"prior": PRIOR}), None),
    "dropout_and_clipping": (
        with_dropout,
        (PARAMS, CLIPPED.init(PARAMS), BATCH, TRAIN_KEY),
    ),
    "micro_batches": (
        with_micro_batches,
        ((PARAMS, Step().tx().init(PARAMS), TRAIN_KEY), (INPUTS, LABELS)),
    ),
    "sampled": (of_trainer, (PARAMS, SAMPLED.init(PARAMS), INPUTS, LABELS)),
    "keys_of_the_count": (keys_of_the_count, Step().arguments()[:-1]),
    "partition": (in_part, (PARAMS, PARTS.init(PARAMS), INPUTS, LABELS, TRAIN_KEY)),
}


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(("step", "args"), HEALTHY.values(), ids=HEALTHY)
def test_nothing_is_said_of_a_healthy_step(step, args):
    assert check(step, *(args or step.arguments())).advice == []


IN_BASES = (
    *("summed_loss", "gradient_at_the_mean", "another_draw_told", "one_key_for_all"),
    *("updated_from_theta", "updates_subtracted", "batch_normalisation"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_BASES)
def test_mistakes_are_told_in_bases_of_evon_too(name):
    step, sentence = MISTAKES[name]
    step = dataclasses.replace(step, family=ivon_jax.evon)
    [advice] = check(jax.jit(lambda *args: step(*args)), *step.arguments()).advice
    assert is_sentence(advice, sentence)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"), [("basis_every", 1), ("hess_clip", 2.0), ("prior", PRIOR)]
)
def test_nothing_is_said_of_a_healthy_step_of_evon(name, value):
    """Also of a later one, in other bases. With a prior there are few numbers."""
    step = Step(family=ivon_jax.evon, settings={name: value})
    args = step.arguments()
    for _ in range(3):
        diagnosis = check(jax.jit(lambda *args: step(*args)), *args)
        assert diagnosis.advice == []
        assert ("descent" in diagnosis.numbers) == (name != "prior")
        if name == "basis_every":  # the gradient is where the sample was told to be
            assert diagnosis.numbers["sample_error"] < 1e-3
        args = *step(*args), *args[2:]


def test_arguments_that_a_jitted_step_donates_stay():
    args = Step().arguments()
    step = donated()
    assert check(step, *args).advice == []
    for array in jax.tree.leaves(args):
        assert not array.is_deleted()


def test_one_noise_for_all_is_seen_where_the_step_makes_its_keys():
    def step(params, opt_state, inputs, labels):
        return Step()(params, opt_state, inputs, labels, TRAIN_KEY)

    [sentence] = check(step, *Step().arguments()[:-1]).advice
    assert is_sentence(sentence, "ONE_KEY")


def test_a_diagnosis_reads_well():
    text = str(diagnostics.Diagnosis({"loss_scale": 2.0, "reach": 1.5}, ["Do this."]))
    assert text == "Do this.\n  loss_scale 2\n  reach      1.5"


def several_steps(params, opt_state, inputs, labels, key):
    for _ in range(2):
        params, opt_state = Step()(params, opt_state, inputs, labels, key)
    return params, opt_state


MULTI = optax.MultiSteps(ivon_jax.ivon(**SETTINGS), 2)
BAD = {
    "several": (
        (several_steps, *Step().arguments()),
        {},
        ValueError,
        "`step` must take one step, got one that takes 2. Check the function inside",
    ),
    "multi_steps": (
        (Step(), PARAMS, MULTI.init(PARAMS), INPUTS, LABELS, TRAIN_KEY),
        {},
        ValueError,
        "`step` must take a step of IVON at each call, got the state of an ",
    ),
    "no_state": (
        (Step(), PARAMS, INPUTS),
        {},
        ValueError,
        "`opt_state` must contain the state of `ivon_jax.ivon`",
    ),
    "no_params": (
        (Step(), Step().tx().init(PARAMS), INPUTS),
        {},
        ValueError,
        "`args` must have the parameters that the optimizer's state was made for, got ",
    ),
    "no_function": (
        (PARAMS, Step().tx().init(PARAMS)),
        {},
        TypeError,
        "`step` must be your training step, a function, got dict. Call ",
    ),
    "no_examples": (
        (Step(), *Step().arguments()),
        {"num_examples": 0},
        ValueError,
        "`num_examples` must be at least 1, got 0.",
    ),
    "no_steps": (
        (Step(), *Step().arguments()),
        {"num_steps": 0},
        ValueError,
        "`num_steps` must be at least 1, got 0.",
    ),
}


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_checked_is_named(args, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        diagnostics.check_step(*args, **options)


def test_what_a_step_raises_is_raised():
    """A forgotten `sample=` is an error of IVON's own."""

    def step(params, opt_state, inputs, labels):
        grads = jax.grad(mean_loss)(params, inputs, labels)
        updates, opt_state = Step().tx().update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    with pytest.raises(ValueError, match="exactly one source of the Hessian"):
        diagnostics.check_step(step, *Step().arguments()[:-1])
