"""The paper's networks: their numbers of parameters, parts, and steps of IVON."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from flax import nnx
from jax.flatten_util import ravel_pytree
from zoo import competition, densenet, gru, layers, resnet

import ivon_jax

pytestmark = pytest.mark.usefixtures("implicit_ranks")

IMAGES = {"resnet50": (64, 64, 3), "lenet": (28, 28, 3)}


def inputs(name, count, make):
    if name == "gru":
        return make((count, 7), jnp.int32)
    return make((count, *IMAGES.get(name, (32, 32, 3))), jnp.uint8)


@pytest.mark.parametrize(
    ("name", "num_classes", "expected"),
    [
        ("resnet20", 10, 274_042),
        ("resnet20", 100, 279_892),
        ("resnet20", 200, 286_392),
        ("resnet18", 10, 11_178_762),
        ("preresnet110", 10, 3_899_146),
        ("densenet121", 10, 1_016_278),
        ("resnet50", 1000, 25_583_592),
        ("alexnet", 10, 1_488_202),
        ("lenet", 7, 61_751),
        ("gru", 2, 14_000 * 128 + 198_402),
    ],
)
def test_networks_have_the_papers_number_of_parameters(name, num_classes, expected):
    """They map examples to logits; no array is made."""

    def init_and_apply(x):
        model = zoo.create(name, num_classes, nnx.Rngs(0))
        return model(x), nnx.state(model, nnx.Param)

    x = inputs(name, 3, jax.ShapeDtypeStruct)
    logits, params = jax.eval_shape(init_and_apply, x)
    assert (logits.shape, logits.dtype) == ((3, num_classes), jnp.float32)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


def test_the_table_of_the_docstring_has_each_network():
    rows = [line for line in zoo.__doc__.splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == list(zoo.NETWORKS)


def test_a_name_of_no_network_is_refused():
    with pytest.raises(ValueError, match="must be one of resnet20, resnet18, pre"):
        zoo.create("resnet21", 10, nnx.Rngs(0))


SMALL = {
    "resnet20": lambda rngs: resnet.ResNet(8, 2, 10, rngs),
    "resnet18": lambda rngs: resnet.WideResNet(2, 10, rngs, counts=(1, 1, 1, 1)),
    "preresnet110": lambda rngs: resnet.PreResNet(8, 2, 10, rngs),
    "densenet121": lambda rngs: densenet.DenseNet(2, 10, rngs, counts=(1, 1, 1, 1)),
    "resnet50": lambda rngs: resnet.ImageNetResNet(2, 10, rngs, counts=(1, 1)),
    "alexnet": lambda rngs: competition.AlexNet(10, rngs),
    "lenet": lambda rngs: competition.LeNet(10, rngs),
    "gru": lambda rngs: gru.TextClassifier(20, 4, 10, rngs),
}


@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_steps_of_ivon_lower_the_loss_of_a_batch(name):
    """With few channels and layers, and as one vector, which is sooner compiled."""
    graphdef, params = nnx.split(SMALL[name](nnx.Rngs(0)))
    params, unravel = ravel_pytree(params)
    x = inputs(name, 4, lambda shape, dtype: jnp.asarray(pattern(shape), dtype))
    tx = ivon_jax.ivon(0.05, ess=1e4, rescale_lr=False)

    def loss_fn(params):
        logits = nnx.merge(graphdef, unravel(params))(x)
        labels = jnp.arange(4)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(carry, key):
        params, opt_state = carry
        theta = ivon_jax.sample(key, params, opt_state)
        loss, grads = jax.value_and_grad(loss_fn)(theta)
        updates, opt_state = tx.update(grads, opt_state, params, sample=theta)
        return (optax.apply_updates(params, updates), opt_state), loss

    carry, losses = (params, tx.init(params)), []
    for key in jax.random.split(jax.random.key(0), 10):
        carry, loss = step(carry, key)
        losses.append(loss)
    assert np.all(np.isfinite(losses))
    assert losses[-1] < losses[0]


def pattern(shape):
    """Numbers of four different examples."""
    example = np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    rest = np.arange(np.prod(shape[1:])).reshape(shape[1:])
    return (example + 1) * rest % 17


def test_filter_response_norm_is_its_formula(key):
    """max(gamma x / sqrt(nu^2 + eps) + beta, tau), nu^2 the mean of x^2 over H, W."""
    norm = layers.FilterResponseNorm(3)
    keys = jax.random.split(key, 4)
    norm.scale[...], norm.bias[...], norm.threshold[...] = (
        jax.random.normal(k, (3,)) for k in keys[:3]
    )
    x = jax.random.normal(keys[3], (2, 4, 6, 3))
    x64 = np.asarray(x, np.float64)
    x_hat = x64 / np.sqrt((x64**2).mean(axis=(1, 2), keepdims=True) + 1e-6)
    y = np.asarray(norm.scale[...]) * x_hat + np.asarray(norm.bias[...])
    expected = np.maximum(y, np.asarray(norm.threshold[...]))
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5, atol=1e-6)


def test_filter_response_norm_takes_each_image_alone(key):
    """Unlike batch normalisation, which belongs to no one sample."""
    norm, x = layers.FilterResponseNorm(3), jax.random.normal(key, (2, 4, 6, 3))
    alone = jnp.concatenate([norm(image[None]) for image in x])
    np.testing.assert_allclose(norm(x), alone, rtol=1e-6)


def test_filter_response_norm_begins_as_a_rectifier_of_unit_power(key):
    x = jax.random.normal(key, (2, 8, 8, 3))
    y = layers.FilterResponseNorm(3)(x)
    np.testing.assert_array_equal(y == 0, x <= 0)
    power = jnp.mean((y - layers.FilterResponseNorm(3)(-x)) ** 2, axis=(1, 2))
    np.testing.assert_allclose(power, 1, rtol=1e-4)


def test_convolution_of_stride_two_pads_right_and_bottom(key):
    """XLA's and TensorFlow's SAME for an even size; PyTorch's padding=1 pads left."""
    conv, _ = resnet.conv_norm(2, 3, size=3, stride=2, rngs=nnx.Rngs(key)).layers
    x = np.asarray(jax.random.normal(key, (1, 6, 6, 2)))
    padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    kernel, bias = np.asarray(conv.kernel[...]), np.asarray(conv.bias[...])
    expected = np.empty((1, 3, 3, 3))
    for i, j in np.ndindex(3, 3):
        patch = padded[0, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        expected[0, i, j] = np.einsum("hwi,hwio->o", patch, kernel) + bias
    np.testing.assert_allclose(conv(x), expected, rtol=1e-5, atol=1e-5)


def test_shortcut_of_stride_two_takes_every_other_pixel(key):
    conv, _ = resnet.Block(2, 4, stride=2, rngs=nnx.Rngs(key)).shortcut.layers
    x = jax.random.normal(key, (1, 6, 6, 2))
    expected = x[:, ::2, ::2] @ conv.kernel[0, 0] + conv.bias[...]
    np.testing.assert_allclose(conv(x), expected, rtol=1e-5, atol=1e-6)


def test_block_adds_its_input_and_has_no_activation_after(key):
    block = resnet.Block(2, 2, stride=1, rngs=nnx.Rngs(key))
    x = jax.random.normal(key, (1, 4, 4, 2))
    np.testing.assert_array_equal(block(x), x + block.second(block.first(x)))


def test_weights_and_biases_begin_uniform(key):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): within, and by 1 - 0.9**16 up to the end."""
    conv, _ = resnet.conv_norm(16, 16, 3, stride=1, rngs=nnx.Rngs(key)).layers
    bound = (16 * 3 * 3) ** -0.5
    for values in (conv.kernel[...], conv.bias[...]):
        assert 0.7 * bound < jnp.max(jnp.abs(values)) <= bound


def test_images_are_normalized_with_imagenets_statistics():
    images = np.stack([np.zeros((32, 32, 3)), np.full((32, 32, 3), 255)])
    black, white = layers.normalize(images.astype(np.uint8))[:, 0, 0]
    mean, stddev = np.array([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)])
    np.testing.assert_allclose(black, -mean / stddev, rtol=1e-6)
    np.testing.assert_allclose(white, (1 - mean) / stddev, rtol=1e-6)


def test_preactivation_block_normalises_once_for_both_ways(key):
    """A plain shortcut is the input itself; a projected one begins at the norm."""
    x = jax.random.normal(key, (1, 4, 4, 2))
    block = resnet.PreActivationBlock(2, 2, stride=1, rngs=nnx.Rngs(key))
    y = block.second(block.norms[1](block.first(block.norms[0](x))))
    np.testing.assert_allclose(block(x), x + y, rtol=1e-6)
    block = resnet.PreActivationBlock(2, 4, stride=2, rngs=nnx.Rngs(key))
    y = block.norms[0](x)
    expected = block.shortcut(y) + block.second(block.norms[1](block.first(y)))
    np.testing.assert_allclose(block(x), expected, rtol=1e-6)


def test_wide_block_rectifies_the_sum_and_has_no_biases(key):
    block = resnet.WideBlock(2, 4, stride=2, rngs=nnx.Rngs(key))
    x = jax.random.normal(key, (1, 4, 4, 2))
    y = block.shortcut(x) + block.second(block.first(x))
    np.testing.assert_allclose(block(x), np.maximum(y, 0), rtol=1e-6)
    assert block.first.layers[0].bias is None


def test_stride_two_of_the_wide_network_pads_on_all_sides(key):
    """PyTorch's padding=1, where SAME would pad right and bottom alone."""
    block = resnet.WideBlock(1, 2, stride=2, rngs=nnx.Rngs(key))
    conv = block.first.layers[0]
    x = jax.random.normal(key, (1, 4, 4, 1))
    corner = np.einsum("hwi,hwio->o", x[0, :2, :2], conv.kernel[...][1:, 1:])
    np.testing.assert_allclose(conv(x)[0, 0, 0], corner, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("network", [resnet.WideResNet, densenet.DenseNet])
def test_the_head_sees_each_square_of_32_pixels(network):
    def logits(images):
        model = network(4, 10, nnx.Rngs(0), counts=(1, 1, 1, 1), size=64)
        return model(images)

    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.uint8)
    assert jax.eval_shape(logits, images).shape == (2, 10)


def test_resnet50_halves_an_image_five_times():
    """A stem of stride two, a pooling, and three stacks."""

    def features(images):
        model = resnet.ImageNetResNet(4, 10, nnx.Rngs(0))
        x = model.stem(layers.normalize(images))
        return x, model.blocks(x[:, ::2, ::2])

    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.uint8)
    stem, last = jax.eval_shape(features, images)
    assert (stem.shape, last.shape) == ((1, 112, 112, 4), (1, 7, 7, 128))


def test_dense_layer_keeps_all_channels(key):
    layer = densenet.DenseLayer(3, 2, nnx.Rngs(key))
    x = jax.random.normal(key, (1, 4, 4, 3))
    y = layer(x)
    assert y.shape == (1, 4, 4, 5)
    np.testing.assert_array_equal(y[..., 2:], x)


def test_gru_is_its_formula(key):
    """PyTorch's: n = tanh(W x + b + r (U s + c)), s' = (1 - z) n + z s."""
    layer = gru.GRU(3, 2, nnx.Rngs(key))
    x = np.asarray(jax.random.normal(key, (2, 5, 3)), np.float64)
    w, b, u, c = (
        np.asarray(array[...], np.float64)
        for part in (layer.of_input, layer.of_state)
        for array in (part.kernel, part.bias)
    )
    state, expected = np.zeros((2, 2)), []
    for t in range(5):
        of_input, of_state = x[:, t] @ w + b, state @ u + c
        r, z = (
            1 / (1 + np.exp(-of_input[:, part] - of_state[:, part]))
            for part in np.s_[:2, 2:4]
        )
        n = np.tanh(of_input[:, 4:] + r * of_state[:, 4:])
        state = (1 - z) * n + z * state
        expected.append(state)
    states = layer(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(states, np.stack(expected, 1), rtol=1e-5, atol=1e-6)
