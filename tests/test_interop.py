"""Adapters written by Hugging Face PEFT give PEFT's numbers here, train as they do there, and go
back whole."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_ft import trees
from lorax_ft.interop import load_peft, save_peft
from lorax_ft.lift import lift
from lorax_ft.methods import merge, select, stack_adapters
from lorax_ft.models import hub
from lorax_ft.training.objectives import OBJECTIVES
from lorax_ft.training.optimizers import OptimizerConfig, build_optimizer
from lorax_ft.training.step import make_train_step

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
CASES = [
    ("bert_seqcls", name)
    for name in (
        "lora",
        "lora_all_linear",
        "rslora",
        "dora",
        "lora_patterns",
        "lora_layer1",
        "lora_bias_only",
        "lora_embedding",
        "ia3",
        "prompt",
        "prefix",
        "ptuning",
        "prefix_projection",
    )
] + [(name, adapter) for name in ("llama_gqa", "gpt2") for adapter in ("lora", "lora_all_linear")]
ATOL, RTOL = 2e-4, 1e-4  # the manifest's, for every case here


@pytest.fixture(scope="module")
def golden(shared):
    return shared / "golden"


def load(golden, name, scan_layers=True):
    return hub.load(golden / name, scan_layers=scan_layers)


def batch_of(golden, name, which, extra=()):
    with np.load(golden / name / "io.npz") as file:
        keys = [k for k in (*INPUTS, *extra) if f"{which}.{k}" in file]
        return {k: jnp.asarray(file[f"{which}.{k}"], jnp.int32) for k in keys}


def assert_close_at_tokens(got, want, mask):
    if got.ndim == 3:
        got, want = got[mask == 1], want[mask == 1]
    np.testing.assert_allclose(got, want, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize(("name", "adapter"), CASES)
def test_an_adapter_of_peft_gives_its_logits_and_its_merged_logits(
    golden, name, adapter, scan_layers
):
    model, base = load(golden, name, scan_layers)
    params, _ = load_peft(golden / name / "adapters" / adapter, model, base)
    apply = jax.jit(lift(model.apply))
    with np.load(golden / name / "adapters" / adapter / "expected.npz") as expected:
        for which in ("full", "right", "left"):
            if f"{which}.adapter_logits" not in expected:
                continue
            batch = batch_of(golden, name, which)
            mask = np.asarray(batch["attention_mask"])
            assert_close_at_tokens(apply(params, batch), expected[f"{which}.adapter_logits"], mask)
            if f"{which}.merged_logits" in expected:
                got = apply(merge(params), batch)
                assert_close_at_tokens(got, expected[f"{which}.merged_logits"], mask)


@pytest.mark.parametrize(("name", "adapter"), CASES)
def test_an_adapter_comes_back_from_our_export_as_it_went(golden, name, adapter, tmp_path):
    model, base = load(golden, name)
    source = golden / name / "adapters" / adapter
    params, trained = load_peft(source, model, base)
    config = json.loads((source / "adapter_config.json").read_text())
    options = {}
    if config["peft_type"] == "LORA":
        options = {"rslora": config["use_rslora"], "dropout": config["lora_dropout"]}
    save_peft(tmp_path / "adapter", model, params, trained, **options)
    assert tensors_of(tmp_path / "adapter") == tensors_of(source)
    again, _ = load_peft(tmp_path / "adapter", model, base)
    for got, want in zip(jax.tree.leaves(again), jax.tree.leaves(params)):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def tensors_of(directory):
    """Every tensor's bytes by name; PEFT may save a head of ours that it does not train."""
    from safetensors.numpy import load_file

    tensors = load_file(directory / "adapter_model.safetensors")
    return {name: tensor.tobytes() for name, tensor in tensors.items()}


TRAINING = [
    ("bert_seqcls", case)
    for case in (
        "lora",
        "lora_all_linear",
        "rslora",
        "dora",
        "lora_bias_only",
        "ia3",
        "prompt",
        "prefix",
    )
]


@pytest.mark.parametrize(("name", "case"), [*TRAINING, ("llama_gqa", "lora"), ("gpt2", "lora")])
def test_five_steps_of_adamw_equal_those_of_peft(golden, name, case):
    model, base = load(golden, name)
    params, trained = load_peft(golden / name / "adapters" / case, model, base)
    train, frozen = trees.partition(params, trained)
    batch = batch_of(golden, name, "right", extra=("labels",))
    constant = OptimizerConfig(
        learning_rate=2e-3, weight_decay=0.01, schedule="constant", clip_norm=None
    )
    tx = build_optimizer(constant, total_steps=5)
    step = make_train_step(lift(model.apply), OBJECTIVES[model.task], tx)
    first = jax.tree.map(jnp.copy, train)
    opt_state = tx.init(train)
    losses = []
    for _ in range(6):
        before = jax.tree.map(jnp.copy, train)
        train, opt_state, metrics = step(train, opt_state, frozen, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    with np.load(golden / name / "train" / f"{case}.npz") as expected:
        np.testing.assert_allclose(losses, expected["losses"], atol=2e-4)
        gradient = gradient_of(model, frozen, batch, first)
        assert_arrays_match(model, gradient, frozen, trained, expected, "grad0.", relative=1e-4)
        assert_arrays_match(model, before, frozen, trained, expected, "final.", absolute=5e-4)


@pytest.mark.parametrize(
    ("case", "clip_norm", "schedule", "warmup_steps"),
    [("full", None, "constant", None), ("full_clip_schedule", 0.5, "linear", 2)],
)
def test_full_fine_tuning_equals_torchs_with_clipping_and_a_schedule_or_without(
    golden, case, clip_norm, schedule, warmup_steps
):
    model, params = load(golden, "bert_seqcls")
    train, frozen = trees.partition(params, ".*")
    config = OptimizerConfig(
        learning_rate=1e-3,
        weight_decay=0.01,
        schedule=schedule,
        warmup_steps=warmup_steps,
        clip_norm=clip_norm,
    )
    tx = build_optimizer(config, total_steps=5)
    step = make_train_step(model.apply, OBJECTIVES[model.task], tx)
    batch = batch_of(golden, "bert_seqcls", "right", extra=("labels",))
    opt_state, history = tx.init(train), []
    for _ in range(6):
        train, opt_state, metrics = step(train, opt_state, frozen, batch, jax.random.key(0))
        history.append((float(metrics["loss"]), float(metrics["gradient_norm"])))
    with np.load(golden / "bert_seqcls" / "train" / f"{case}.npz") as expected:
        np.testing.assert_allclose([loss for loss, _ in history], expected["losses"], atol=2e-4)
        norms = [norm for _, norm in history[:5]]
        np.testing.assert_allclose(norms, expected["grad_norms"], rtol=1e-3)


def gradient_of(model, frozen, batch, train):
    def loss(train):
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        logits = lift(model.apply)(trees.combine(train, frozen), inputs, None)
        total, weight, _ = OBJECTIVES[model.task](logits, batch)
        return total / weight

    return jax.grad(loss)(train)


def assert_arrays_match(
    model, train, frozen, trained, expected, prefix, relative=0.0, absolute=0.0
):
    """Compares by PEFT's names, by way of an export."""
    import tempfile

    from safetensors.numpy import load_file

    # in memory PEFT has other names for DoRA's magnitude and for a prompt than in a file
    renamed = {
        "_vector.weight": "_vector",
        "prompt_encoder.embedding.weight": "prompt_embeddings",
    }
    wanted = {}
    for key in expected:
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            for old, new in renamed.items():
                name = name.replace(old, new)
            wanted[name] = expected[key]
    with tempfile.TemporaryDirectory() as folder:
        save_peft(f"{folder}/a", model, trees.combine(train, frozen), trained)
        got = load_file(f"{folder}/a/adapter_model.safetensors")
    assert set(wanted) == set(got)
    for key, want in wanted.items():
        atol = max(absolute, relative * np.abs(want).max(), 1e-6)
        np.testing.assert_allclose(got[key], want, rtol=0, atol=atol, err_msg=key)


@pytest.fixture
def broken(golden, tmp_path):
    """A copy of a good adapter to spoil, its base model and the base's parameters."""
    shutil.copytree(
        golden / "bert_seqcls" / "adapters" / "lora",
        tmp_path / "adapter",
        copy_function=shutil.copyfile,
    )
    (tmp_path / "adapter").chmod(0o755)
    return (tmp_path / "adapter", *load(golden, "bert_seqcls"))


def spoil(directory, change):
    from safetensors.numpy import load_file, save_file

    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(QUERY + "lora_B.weight"), r"layer 0: found \['A'\], not \['A', 'B'\]"),
        (
            lambda t: t.update({QUERY + "lora_C.weight": np.ones(2)}),
            r"lora_C.weight' belongs to no parameter",
        ),
        (
            lambda t: t.update({QUERY.replace("query", "quarry") + "lora_A.weight": np.ones(2)}),
            r"belongs to no parameter .* Nearest modules: bert.*query",
        ),
        (
            lambda t: t.update({QUERY + "lora_A.weight": np.ones((4, 32), np.float32)}),
            r"lora_A \[4, 32\] .* do not fit rank 4 .* \[64, 64\]",
        ),
        (
            lambda t: t.update(
                {"base_model.model.classifier.weight": np.ones((2, 64), np.float32)}
            ),
            r"classifier/kernel is \[64, 3\], the file has \[64, 2\]",
        ),
    ],
)
def test_a_tensor_too_few_too_many_or_misshapen_raises_and_names_it(broken, change, message):
    directory, model, base = broken
    spoil(directory, change)
    with pytest.raises(ValueError, match=message):
        load_peft(directory, model, base)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("peft_type", "LOHA", "peft_type is 'LOHA'"),
        ("lora_bias", True, "lora_bias = True may change the maths"),
        ("layer_replication", [[0, 1]], "layer_replication"),
        ("init_lora_weights", "pissa", "changed the base weights"),
    ],
)
def test_a_config_field_that_is_not_handled_raises_and_names_it(broken, field, value, message):
    directory, model, base = broken
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text()) | {field: value}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_peft(directory, model, base)


def test_a_missing_or_truncated_file_raises_and_names_it(broken):
    directory, model, base = broken
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors cannot be read"):
        load_peft(directory, model, base)
    path.unlink()
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is not there"):
        load_peft(directory, model, base)


def test_an_export_overwrites_nothing(golden, tmp_path):
    model, base = load(golden, "bert_seqcls")
    params, trained = load_peft(golden / "bert_seqcls" / "adapters" / "lora", model, base)
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(ValueError, match="not empty: nothing is overwritten"):
        save_peft(tmp_path, model, params, trained)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_leaf_that_a_peft_directory_cannot_hold_is_refused_and_its_parts_go_out(golden, tmp_path):
    model, base = load(golden, "bert_seqcls")
    source = golden / "bert_seqcls" / "adapters" / "lora"
    params, trained = load_peft(source, model, base)
    adapters = stack_adapters({"one": params})
    with pytest.raises(ValueError, match=r"is a MixedLoRA leaf.*select\(adapters, name\)"):
        save_peft(tmp_path / "mixed", model, adapters.params, trained)
    save_peft(tmp_path / "one", model, select(adapters, "one"), trained)
    assert tensors_of(tmp_path / "one") == tensors_of(source)
