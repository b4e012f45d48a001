"""A real pretrained LLaMA learns from real text, and not a byte of its base changes."""

import jax
import numpy as np
import pytest

from lorax_ft import data, trees
from lorax_ft.inspection import inspect
from lorax_ft.lift import lift
from lorax_ft.methods import LoraConfig, add_methods
from lorax_ft.models import hub
from lorax_ft.quantization import QuantizationConfig, quantize
from lorax_ft.training import OBJECTIVES, OptimizerConfig, build_optimizer, make_train_step
from lorax_ft.training.step import make_eval_step

pytestmark = pytest.mark.usefixtures("optimized_compiles")

STEPS = 20


@pytest.fixture(scope="module")
def shakespeare(shared):
    """The first half of the text, whose last tenth is held out, in windows of 128 tokens."""
    config = data.DataConfig(
        source=data.SourceConfig(train=str(shared / "data" / "shakespeare" / "input.txt")),
        split=data.SplitConfig(validation=0.02),
        task=data.LanguageModelling(length=128),
        loader=data.LoaderConfig(batch_size=16, buckets=(128,)),
    )
    tokenizer = data.load_tokenizer(str(shared / "models" / "stories260K" / "hf"))
    return config.loader, data.load_dataset(config, tokenizer)


@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "qlora"])
def test_a_real_llama_learns_shakespeare_and_its_base_keeps_every_byte(
    shared, shakespeare, quantized
):
    loader, dataset = shakespeare
    model, params = hub.load(shared / "models" / "stories260K" / "hf")
    ids = jax.ShapeDtypeStruct((1, 8), np.int32)
    uses = inspect(model.apply, params, {"input_ids": ids})
    if quantized:
        params = quantize(params, QuantizationConfig(), uses)
    params, trainable = add_methods(params, [LoraConfig()], jax.random.key(0), uses)
    train, frozen = trees.partition(params, trainable)
    before = [np.asarray(array).tobytes() for array in jax.tree.leaves(frozen)]

    apply = lift(model.apply)
    objective = OBJECTIVES[model.task]
    evaluate = make_eval_step(lambda params, inputs, key: apply(params, inputs), objective)

    def held_out(train):
        batches = data.evaluation_batches(dataset.validation, loader, pad_id=dataset.pad_id)
        sums = np.sum([evaluate(train, frozen, batch)[:2] for _, batch in batches], axis=0)
        return float(sums[0] / sums[1])

    start = held_out(train)
    tx = build_optimizer(OptimizerConfig(learning_rate=5e-3), total_steps=STEPS)
    step = make_train_step(lambda params, inputs, key: apply(params, inputs), objective, tx)
    batches = data.TrainBatches(dataset.train, loader, pad_id=dataset.pad_id, seed=0)
    opt_state = tx.init(train)
    for _ in range(STEPS):
        train, opt_state, _ = step(train, opt_state, frozen, next(batches), jax.random.key(0))
    batches.close()

    assert held_out(train) < start - 0.5  # of about 5 nats a token at the start
    assert [np.asarray(array).tobytes() for array in jax.tree.leaves(frozen)] == before
