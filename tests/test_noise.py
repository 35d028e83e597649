"""The noise: normal, in 24 bits of a hash, without buffers of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import AS_USERS_DO, temp_bytes
from scipy import special
from statistical import assert_at_most

from ivon_jax._arrays.noise import ROUNDS, normal, quantile, threefry

LARGE = 1000, 33
# Key, counter and hash with 13 rounds: the authors' known answers.
KNOWN_ANSWERS = (
    ((0, 0), (0, 0), (0x9D1C5EC6, 0x8BD50731)),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0xFD36D048, 0x2D17272C)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xBA3E4725, 0xF27D669E)),
)


@pytest.fixture(scope="module")
def whole_range():
    """The noise of all 2^24 bit patterns that tell, and its exact x."""
    bits = np.arange(2**24, dtype=np.uint32) << 8
    x = (np.arange(-(2**23), 2**23) + 0.5) / 2**23
    return np.asarray(jax.jit(quantile)(bits), np.float64), x


def test_quantile_is_the_normal_one(whole_range):
    noise, x = whole_range
    exact = special.ndtri((1 + x) / 2)
    assert_at_most(np.abs(noise / exact - 1), 4e-5)


def test_moments_are_the_normal_ones(whole_range):
    """Over all bits there are: no standard error."""
    noise, _ = whole_range
    np.testing.assert_array_equal(noise, -noise[::-1])
    moments = [np.mean(noise**n) for n in (2, 4, 6)]
    np.testing.assert_allclose(moments, (1, 3, 15), rtol=(2e-4))
    assert_at_most(abs(moments[0] - 1), 1e-5)
    assert_at_most(abs(moments[1] / moments[0] ** 2 - 3), 5e-5)


@pytest.mark.parametrize(("key", "counter", "answer"), KNOWN_ANSWERS)
def test_hash_has_the_known_answers(key, counter, answer):
    key, counter = (np.asarray(words, np.uint32) for words in (key, counter))
    with np.errstate(over="ignore"):  # modulo 2^32
        words = threefry(key, counter)
    np.testing.assert_array_equal(words, np.asarray(answer, np.uint32))


def test_noise_is_the_quantile_of_the_hash_of_each_place():
    """In NumPy and SciPy, of the authors' hash, whose two words are combined by xor."""
    key = jax.random.key(7)
    words = np.asarray(jax.random.key_data(key))
    position = np.arange(np.prod(LARGE), dtype=np.uint32)
    with np.errstate(over="ignore"):  # modulo 2^32
        first, second = threefry(words, (np.zeros_like(position), position))
    steps = (first ^ second).astype(np.int64) >> 8
    exact = special.ndtri((steps + 0.5) / 2**24).reshape(LARGE)
    np.testing.assert_allclose(normal(key, LARGE, jnp.float32), exact, rtol=4e-5)


def scores(key, rounds):
    """Standard scores of moments, products of neighbours and equal bits."""
    shape = 2**11, 2**11
    position = jnp.arange(2**22, dtype=jnp.uint32)
    first, second = threefry(jax.random.key_data(key), (np.uint32(0), position), rounds)
    bits = first ^ second
    z = quantile(bits)
    flips = jax.lax.population_count(bits[1:] ^ bits[:-1]).astype(jnp.float32) - 16
    rows, squares = z.reshape(shape), (z**2 - 1).reshape(shape)
    drawn = {"mean": z, "variance": (z**2 - 1) / 2**0.5, "flips": flips / 8**0.5}
    drawn["skewness"] = (z**3 - 3 * z) / 6**0.5
    for lag in (1, 2, 64):
        drawn[f"lag {lag}"] = z[lag:] * z[:-lag]
        drawn[f"squares, lag {lag}"] = squares[:, lag:] * squares[:, :-lag] / 2
    drawn["rows"] = rows[1:] * rows[:-1]
    return {name: jnp.mean(x) * x.size**0.5 for name, x in drawn.items()}


def test_hash_is_random_enough():
    """Of 16 keys the squared scores have a chi-squared distribution; see 6 rounds."""
    keys = jax.random.split(jax.random.key(0), 16)
    limit = special.chdtri(16, 1e-6)

    def largest(rounds):
        draws = jax.jit(jax.vmap(lambda key: scores(key, rounds)))(keys)
        return max(float(jnp.sum(values**2)) for values in draws.values())

    assert_at_most(largest(ROUNDS), limit)
    assert largest(6) > limit


@pytest.mark.parametrize("shape", [(), (1,), (7,), (0, 3), (3, 5), LARGE], ids=str)
def test_noise_has_its_shape_and_other_keys_other_noise(shape, key):
    noise, other = (
        normal(k, shape, jnp.float32) for k in (key, jax.random.fold_in(key, 1))
    )
    assert noise.shape == shape
    assert noise.dtype == jnp.float32
    assert not np.any(np.asarray(noise) == np.asarray(other))


def test_small_arrays_are_nearly_jax_random_normal(key):
    """Of the same bits, but for the 24th of them and the polynomial's error."""
    noise = normal(key, (100, 33), jnp.float32)
    expected = jax.random.normal(key, (100, 33))
    np.testing.assert_allclose(noise, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_other_generators_have_bits_of_their_own(impl):
    key = jax.random.key(0, impl=impl)
    noise = normal(key, LARGE, jnp.float32)
    np.testing.assert_array_equal(noise, quantile(jax.random.bits(key, LARGE)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(3,), (3, 5), LARGE], ids=str)
def test_float32_is_the_same_with_x64(shape, key):
    noise = normal(key, shape, jnp.float32)
    jax.config.update("jax_enable_x64", False)  # the fixture turns it off, too
    expected = normal(key, shape, jnp.float32)
    assert noise.dtype == jnp.float32
    np.testing.assert_array_equal(noise, expected)


@pytest.mark.usefixtures("x64")
def test_float64_is_left_to_jax(key):
    noise = normal(key, LARGE, jnp.float64)
    np.testing.assert_array_equal(noise, jax.random.normal(key, LARGE, jnp.float64))


def test_noise_takes_no_memory_but_its_own(key):
    """Of the parameters' size: jax's loop over rounds has four more such arrays."""
    draw = jax.jit(normal, static_argnums=(1, 2))
    assert temp_bytes(draw.lower(key, (1000, 100), jnp.float32)) < 1000


def test_loop_over_keys_keeps_nothing(key):
    """Positions are the same for all keys: the compiler would keep them."""

    def total(keys):
        def add(total, key):
            return total + normal(key, (1000, 100), jnp.float32), None

        return jax.lax.scan(add, jnp.zeros((1000, 100)), keys)[0]

    keys = jax.random.split(key, 3)
    assert temp_bytes(jax.jit(total).lower(keys)) < 1.1 * 4e5  # the sum


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize(
    ("shape", "barriers"), [((70_000,), 1), ((9, 9), 1), (LARGE, 0)], ids=str
)
def test_large_noise_fuses_with_what_follows(impl, shape, barriers):
    """Of any keys: a barrier behind it would keep it in memory."""
    key = jax.random.key(0, impl=impl)
    text = str(jax.make_jaxpr(lambda key: normal(key, shape, jnp.float32))(key))
    *_, end = text.rpartition("sqrt")
    assert end.count("optimization_barrier") == barriers


@pytest.mark.parametrize("shape", [(70_000,), (1, 10_000)], ids=str)
def test_what_is_broadcast_is_drawn_once(shape, key):
    """A bias is: fused, its noise would be drawn for each row of the activations."""
    *_, size = shape

    def add_bias(key):
        noise = normal(key, shape, jnp.float32)
        return jnp.zeros((8, size)) + noise.reshape(1, size)

    text = jax.jit(add_bias).lower(key).compile(AS_USERS_DO).as_text()
    fused = [c for c in text.split("\n}") if "ENTRY" not in c and f"f32[8,{size}]" in c]
    rotations = [computation.count("shift-left(") for computation in fused]
    assert max(rotations) < 13  # the rounds of one Threefry hash
