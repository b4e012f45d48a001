"""Paged optimizers: the unpaged one's bits, states in the host's memory, one page on the device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lorax_ft import planning, trees
from lorax_ft.methods.adalora import AdaLoraConfig
from lorax_ft.training import checkpoints, host_memory, paging
from lorax_ft.training.allocation import allocate_budget
from lorax_ft.training.objectives import OBJECTIVES
from lorax_ft.training.optimizers import OptimizerConfig, build_optimizer
from lorax_ft.training.paging import page, pages, start_optimizer, state_shardings
from lorax_ft.training.sharding import MeshConfig, Rule, make_mesh, shard, shardings_of
from lorax_ft.training.step import make_train_step
from tests.compilers import needs_tpu_compiler

pytestmark = pytest.mark.usefixtures("optimized_compiles")  # a law of bits

VOCABULARY, WIDTH, LAYERS = 96, 512, 2  # half a row is a block of eight-bit states
OBJECTIVE = OBJECTIVES["causal_lm"]
KEY = jax.random.key(0)
HOST = "pinned_host"
OPTIONS = {"learning_rate": 0.01, "weight_decay": 0.01, "no_decay": (".*bias",), "clip_norm": 0.1}
BOTH = OptimizerConfig(paged=True, state_dtype="int8", **OPTIONS)


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    """Pages and arrays of which a toy has several: of its embedding, three pages."""
    monkeypatch.setattr(paging, "PAGE", 2**14)
    monkeypatch.setattr(paging, "SMALLEST", 20_000)


def apply(params, inputs, key):
    """A toy language model: layers stacked, an embedding, a head."""
    del key
    x = params["embedding"][inputs["input_ids"]]
    x, _ = jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer["kernel"]), None), x, params["layers"])
    return x @ params["head"]["kernel"] + params["head"]["bias"].reshape(1, 1, -1)


def make_params(layers: int = LAYERS):
    keys = jax.random.split(jax.random.key(1), 3)
    normal = lambda key, *shape: 0.05 * jax.random.normal(key, shape)
    return {
        "embedding": normal(keys[0], VOCABULARY, WIDTH),
        "layers": {"kernel": normal(keys[1], layers, WIDTH, WIDTH)},
        "head": {"kernel": normal(keys[2], WIDTH, VOCABULARY), "bias": jnp.zeros(VOCABULARY)},
    }


def make_batch(step: int):
    ids = np.random.default_rng(step).integers(0, VOCABULARY, (8, 6)).astype(np.int32)
    weight = np.float32(np.inf if step == 1 else 1.0)  # the step after the first has no finite loss
    return {"input_ids": ids, "labels": ids, "weights": np.full(8, weight)}


RULES = [
    Rule(pattern="embedding", spec=PartitionSpec("tensor", "fsdp")),
    Rule(pattern=".*layers/kernel", spec=PartitionSpec("fsdp", "tensor")),
    Rule(pattern=".*", spec=PartitionSpec()),
]


LYING = {  # by RULES; rows of codes are in groups of eight
    "parameter": {
        "embedding": PartitionSpec("tensor", "fsdp"),
        "layers/kernel": PartitionSpec(None, "fsdp", "tensor"),
    },
    "int8": {
        "embedding": PartitionSpec("tensor", None, "fsdp"),
        "layers/kernel": PartitionSpec(None, "fsdp", None, "tensor"),
    },
}


@functools.cache
def begin(config: OptimizerConfig, on_mesh: bool = False):
    """(train, frozen, opt_state, step) of a run that has not begun."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)) if on_mesh else None
    params = make_params() if mesh is None else shard(make_params(), mesh, RULES)
    train, frozen = trees.partition(params, ".*")
    tx = build_optimizer(config, total_steps=10)
    opt_state = start_optimizer(tx, train, mesh)
    lies = shardings_of(train), shardings_of(opt_state)
    return train, frozen, opt_state, make_train_step(apply, OBJECTIVE, tx, out_shardings=lies)


def copied(tree):
    return jax.tree.map(lambda x: jax.device_put(np.asarray(x), x.sharding), tree)


def run(config: OptimizerConfig, steps: int = 4, on_mesh: bool = False):
    train, frozen, opt_state, step = begin(config, on_mesh)
    train, opt_state = copied((train, opt_state))
    metrics = []
    for number in range(steps):
        train, opt_state, found = step(train, opt_state, frozen, make_batch(number), KEY)
        metrics.append(found)
    return train, opt_state, metrics


def check_same_bits(left, right):
    differing = [p for p, (one, other) in pairs(left, right) if one.tobytes() != other.tobytes()]
    assert not differing


def pairs(left, right):
    left, right = (trees.flatten_arrays(jax.device_get(tree)) for tree in (left, right))
    assert list(left) == list(right)
    return [(path, (left[path], right[path])) for path in left]


@pytest.mark.parametrize(
    ("name", "state_dtype", "clip_norm"),
    [("adamw", "parameter", 0.1), ("adamw", "int8", 0.1), ("sgd", "parameter", None)],
)
def test_paged_equals_unpaged_bit_for_bit(name, state_dtype, clip_norm):
    options = OPTIONS | {"name": name, "state_dtype": state_dtype, "clip_norm": clip_norm}

    unpaged = run(OptimizerConfig(**options))
    paged = run(OptimizerConfig(paged=True, **options))

    assert [float(m["finite"]) for m in paged[2]] == [1, 0, 1, 1]
    check_same_bits(unpaged, paged)


@pytest.mark.parametrize("state_dtype", ["parameter", "int8"])
def test_on_a_mesh_too_and_paged_states_lie_on_the_host_as_their_parameters(state_dtype):
    options = OPTIONS | {"state_dtype": state_dtype}

    unpaged = run(OptimizerConfig(**options), on_mesh=True)
    paged = run(OptimizerConfig(paged=True, **options), on_mesh=True)

    check = check_same_bits if state_dtype == "parameter" else check_same_but_for_neighbours
    check(unpaged, paged)
    mu = next(part for part in paged[1] if hasattr(part, "mu")).mu
    states = {"embedding": mu["embedding"], "layers/kernel": mu["layers"]["kernel"]}
    if state_dtype == "int8":
        states = {path: blocks.codes for path, blocks in states.items()}
    assert {x.sharding.memory_kind for x in states.values()} == {HOST}
    assert {path: x.sharding.spec for path, x in states.items()} == LYING[state_dtype]


def check_same_but_for_neighbours(left, right):
    """XLA goes over the shards of a whole array in another order than over a page's, and joins
    another product of a moment to its sum: a moment halfway between two codes may take either."""
    for path, (one, other) in pairs(left, right):
        if one.dtype == np.uint8:
            apart = np.abs(one.astype(int) - other)
            assert apart.max() <= 1, path
            assert apart.sum() <= 1e-4 * one.size, path
        else:  # a neighbour is a hundredth away, and moves a number by a hundredth of a step
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=2e-4, err_msg=path)


def test_what_is_paged_stays_in_the_hosts_memory_and_nothing_else_goes_there():
    _, opt_state, _ = run(BOTH, steps=1)

    kinds = {path: x.sharding.memory_kind for path, x in trees.flatten_arrays(opt_state).items()}
    host = {path for path, kind in kinds.items() if kind == HOST}
    assert host == {p for p in kinds if p.endswith("/codes")}
    assert len(host) == 2 * 3  # embedding, layers and head; the bias is small


def test_states_of_vectors_and_of_layers_that_are_no_whole_groups_of_rows_stay_on_the_device():
    params = {
        "layers": {
            "scale": jnp.ones((8, 4096)),
            "a": jnp.ones((8, 3000, 1)),
            "b": jnp.ones((8, 2, 4096)),
        },
        "head": {"kernel": jnp.ones((1001, 100)), "bias": jnp.ones(30_000)},
    }
    state = start_optimizer(build_optimizer(OptimizerConfig(paged=True), total_steps=10), params)

    kinds = {path: x.sharding.memory_kind for path, x in trees.flatten_arrays(state).items()}
    assert {path.split("/", 2)[-1] for path, kind in kinds.items() if kind == HOST} == {
        "layers/b",
        "head/kernel",
    }


def test_layers_are_turned_together_other_arrays_by_rows_and_the_rest_at_once():
    tx = build_optimizer(BOTH, total_steps=10)

    found = pages(make_params(), tx)

    assert [(sorted(group.paths), group.rows, group.size) for group in found] == [
        (["layers/kernel"], 1, LAYERS),
        (["embedding"], 32, VOCABULARY),
    ]  # the head's rows are no whole blocks, and its bias is small


OTHERS = {
    "rmsprop": (True, [optax.scale_by_rms(), optax.trace(0.9), optax.scale(-0.01)]),
    "lamb": (False, [optax.lamb(0.01, weight_decay=0.01)]),  # by norms of whole arrays
    "shampoo-like": (False, [optax.scale_by_factored_rms(min_dim_size_to_factor=64)]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_any_optimizer_of_optax_can_be_paged(name):
    rowwise, each = OTHERS[name]
    tx, paged = optax.chain(*each), page(each, rowwise=rowwise)
    params, one = make_params(), jnp.asarray(1.0)
    gradients = [
        jax.tree.map(lambda p, step=step: 0.1 * jnp.cos(p + step), params) for step in range(3)
    ]

    def train(tx):
        state = start_optimizer(tx, params)
        lies = (shardings_of(params), shardings_of(state))
        update = jax.jit(lambda *a: paging.update_where(tx, *a), out_shardings=lies)
        found = params
        with jax.numpy_dtype_promotion("standard"):
            for gradient in gradients:
                found, state = update(gradient, one, state, found, one > 0)
        return found, state

    (left, left_state), (right, right_state) = train(tx), train(paged)

    # optax divides by scalars, for which XLA may multiply by their inverse: last bits may differ
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), left, right)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), left_state, right_state)


@pytest.mark.parametrize("paged", [True, False])
def test_a_resumed_run_has_the_same_bits_paged_or_not_and_its_states_lie_where_it_says(
    paged, tmp_path
):
    identity = checkpoints.Identity(config="", base="")
    train, opt_state, _ = run(BOTH, steps=3)
    snapshot = checkpoints.Snapshot(
        step=3, train=train, opt_state=opt_state, key=KEY, data=None, progress={}
    )
    with checkpoints.open_store(tmp_path, identity) as store:
        checkpoints.save(store, snapshot)
        checkpoints.wait(store)
        fresh, frozen, empty, step = begin(dataclasses.replace(BOTH, paged=paged))
        found = checkpoints.restore(store, fresh, empty)

    assert found is not None
    assert shardings_of(found.opt_state) == shardings_of(empty)
    last = step(found.train, found.opt_state, frozen, make_batch(3), KEY)
    check_same_bits(last[:2], run(BOTH, steps=4)[:2])


@pytest.mark.parametrize("spec", [(), ("fsdp",), (None, "fsdp")])
def test_a_checksum_is_the_same_wherever_the_array_lies(spec):
    array = {"x": jax.random.normal(KEY, (100, 256))}
    mesh = make_mesh(MeshConfig(fsdp=4))
    there = NamedSharding(mesh, PartitionSpec(*spec), memory_kind=HOST)

    assert checkpoints.checksum(jax.device_put(array, there)) == checkpoints.checksum(array)


def test_a_host_without_room_is_refused_with_both_figures_before_anything_is_made(monkeypatch):
    monkeypatch.setattr(host_memory, "available", lambda: 1000)
    tx = build_optimizer(OptimizerConfig(paged=True), total_steps=10)

    # two float32 states of an embedding, two layers and a head
    with pytest.raises(MemoryError, match=r"4,980,736 bytes .* and 1,000 bytes"):
        start_optimizer(tx, make_params())


@pytest.fixture
def no_cache():
    """Without the compilation cache: what is compiled for no device is not read back."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@needs_tpu_compiler
@pytest.mark.usefixtures("no_cache")
def test_a_tpus_compiler_pages_states_and_has_none_among_its_temporaries():
    target = planning.parse_target("tpu-v5e")
    planning.prepare_process(target)
    mesh = make_mesh(MeshConfig(), planning.compiler(target).devices[:1])
    everywhere = NamedSharding(mesh, PartitionSpec())

    def at(tree, shardings=None):
        shardings = jax.tree.map(lambda _: everywhere, tree) if shardings is None else shardings
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
        )

    params = at(jax.eval_shape(functools.partial(make_params, layers=128)))
    train, frozen = trees.partition(params, ".*")
    given = frozen, at(make_batch(0)), at(jax.eval_shape(lambda: KEY))

    def memory_of(config: OptimizerConfig):
        tx = build_optimizer(config, total_steps=10)
        state = jax.eval_shape(tx.init, train)
        lies = state_shardings(tx, state, train, mesh)
        step = make_train_step(apply, OBJECTIVE, tx, out_shardings=(shardings_of(train), lies))
        return step.lower(train, at(state, lies), *given).compile().memory_analysis()

    full = memory_of(OptimizerConfig(paged=True, **OPTIONS))
    codes = memory_of(BOTH)

    moments = 2 * sum(x.size for x in jax.tree.leaves(train) if x.ndim > 1)
    found = [(x.host_argument_size_in_bytes, x.host_temp_size_in_bytes) for x in (full, codes)]
    assert found == [(4 * moments, 0), (moments, 0)]
    # a page of codes is decoded in more parts than one of float32; all codes would be `moments`
    assert codes.temp_size_in_bytes < full.temp_size_in_bytes + moments / 2


def test_what_is_available_is_the_least_that_the_machine_and_its_container_have(tmp_path):
    assert host_memory.available(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:       7 kB\n")
    assert host_memory.available(tmp_path) == 7 * 1024
    (group := tmp_path / "sys" / "fs" / "cgroup").mkdir(parents=True)
    (group / "memory.current").write_text("5000\n")
    (group / "memory.max").write_text("max\n")
    assert host_memory.available(tmp_path) == 7 * 1024
    (group / "memory.max").write_text("6000\n")
    (group / "memory.stat").write_text("anon 3\ninactive_file 500\n")
    assert host_memory.available(tmp_path) == 1500


def test_what_cannot_be_paged_says_so():
    tx = build_optimizer(OptimizerConfig(paged=True), total_steps=10)
    params = {"kernel": jnp.ones((64, 64))}

    with pytest.raises(TypeError, match="no updates to return"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="a paged optimizer needs out_shardings"):
        make_train_step(apply, OBJECTIVE, tx)
    with pytest.raises(ValueError, match="AdaLoRA looks at all of an update"):
        allocate_budget(tx, AdaLoraConfig(), total_steps=1000)
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=64)
    with pytest.raises(ValueError, match=r"not of the parameters' shapes, such as .*v_row"):
        page([factored], rowwise=True).init(params)
