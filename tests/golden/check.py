"""Holds this library to a directory of recorded cases: base models, adapters and short trainings.

    python -m tests.golden.check DIR

DIR/manifest.json lists the cases, with their files and tolerances; see `how_to_read` in it. Prints
a row for each case: what was compared, the largest difference as a share of what is allowed, and
`ok`, `FAILED`, or `refused` with the error of what is not handled. Exits with 1 unless all are ok.
"""

from __future__ import annotations

import functools
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_ft import trees
from lorax_ft.interop import files, load_peft, save_peft
from lorax_ft.lift import lift
from lorax_ft.methods import merge
from lorax_ft.models import hub
from lorax_ft.models.model import INPUTS, module_path
from lorax_ft.models.t5 import shift_right
from lorax_ft.models.t5_config import T5Config
from lorax_ft.training.objectives import OBJECTIVES
from lorax_ft.training.optimizers import OptimizerConfig, build_optimizer
from lorax_ft.training.step import make_train_step

Compared = Iterator[tuple[str, float]]

RENAMED = {  # in memory PEFT has other names than in a file
    "_vector.weight": "_vector",
    "prompt_encoder.embedding.weight": "prompt_embeddings",
}


def main(directory: pathlib.Path) -> int:
    cases = cases_of(directory)
    wrong = 0
    for case in cases.values():
        try:
            found = check(directory, case)
        except (ValueError, KeyError) as error:
            found, verdict = [], f"refused: {str(error).splitlines()[0][:150]}"
        else:
            verdict = "ok" if found and max(share for _, share in found) <= 1 else "FAILED"
        wrong += verdict != "ok"
        what = ", ".join(f"{name} {share:.3f}" for name, share in found)
        print(f"{case['case']:44} {verdict:8} {what}", flush=True)
    print(f"{len(cases) - wrong} of {len(cases)} cases ok (differences as a share of the allowed)")
    return int(wrong > 0)


def cases_of(directory: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The cases of a directory's manifest, by name."""
    cases = json.loads((directory / "manifest.json").read_text())["cases"]
    return {case["case"]: case for case in cases}


def check(
    directory: pathlib.Path, case: dict[str, Any], scan_layers: bool = False
) -> list[tuple[str, float]]:
    """What was compared, with the largest difference as a share of the one allowed.

    Raises ValueError where something of the case is not handled.
    """
    model, params = load(directory / case["model"], scan_layers)
    return list(CHECKS[case["type"]](directory, case, model, params))


def check_base(directory: pathlib.Path, case: dict[str, Any], model: Any, params: Any) -> Compared:
    """Logits of every set of inputs."""
    with np.load(directory / case["model"] / "io.npz") as io:
        for name in case["sets"]:
            batch = batch_of(io, model, name)
            got = run(model, params, batch)
            yield f"{name} logits", share(got, io[f"{name}.logits"], batch, case)


def check_adapter(directory: pathlib.Path, case: dict[str, Any], model: Any, base: Any) -> Compared:
    """Logits with the adapter, and merged where they were recorded."""
    folder = directory / case["model"] / "adapters" / case["case"].split("/")[1]
    params, _ = load_peft(folder, model, base)
    front = case.get("virtual_tokens_in_logits", 0)
    with (
        np.load(directory / case["model"] / "io.npz") as io,
        np.load(folder / "expected.npz") as expected,
    ):
        for name in case["sets"]:
            batch = batch_of(io, model, name)
            want = expected[f"{name}.adapter_logits"]
            yield f"{name} logits", share(run(model, params, batch), want[:, front:], batch, case)
            if f"{name}.merged_logits" in expected:
                got, want = run(model, merge(params), batch), expected[f"{name}.merged_logits"]
                yield f"{name} merged", share(got, want[:, front:], batch, case)


def check_training(
    directory: pathlib.Path, case: dict[str, Any], model: Any, base: Any
) -> Compared:
    """Losses, first gradients and final parameters of a few AdamW steps."""
    path = directory / case["model"] / "train" / f"{case['case'].split('/')[-1]}.npz"
    with np.load(directory / case["model"] / "io.npz") as io:
        batch = batch_of(io, model, case["set"], labels=True)
    with np.load(path) as file:
        expected = {key: file[key] for key in file}
    if case["adapter"] is None:
        is_full = case["case"].split("/")[-1].startswith("full")
        params, trained = base, [".*"] if is_full else trained_paths(model, base, expected)
    else:
        folder = directory / case["model"] / "adapters" / case["adapter"]
        params, trained = load_peft(folder, model, base)
    last, history, gradient = train(model, params, trained, batch, case)
    losses, norms = (np.asarray(values) for values in zip(*history))
    yield "losses", float(np.abs(losses - expected["losses"]).max()) / case["atol"]["losses"]
    if "grad_norms" in expected:  # before clipping
        off = np.abs(norms[:-1] - expected["grad_norms"]) / expected["grad_norms"]
        yield "norms", float(off.max()) / 1e-3
    for prefix, arrays in (("grad0.", gradient), ("final.", last)):
        got = named(model, arrays, trained, case)
        want = {
            rename(key.removeprefix(prefix)): value
            for key, value in expected.items()
            if key.startswith(prefix) and key not in case["unstable"]
        }
        if missing := set(want) - set(got):
            raise ValueError(f"{prefix}: nothing here is called {sorted(missing)[0]}")
        worst = 0.0
        for name, value in want.items():
            limit = 5e-4 if prefix == "final." else max(1e-4 * np.abs(value).max(), 1e-6)
            worst = max(worst, float(np.abs(got[name] - value).max()) / limit)
        if want:
            yield prefix.rstrip("."), worst


def train(model: Any, params: Any, trained: Any, batch: Any, case: dict[str, Any]) -> Any:
    """(last params, losses and gradient norms before each step and after the last, first
    gradient)."""
    schedule = case["schedule"]
    config = OptimizerConfig(
        learning_rate=case["lr"],
        weight_decay=0.01,
        schedule="constant" if schedule is None else "linear",
        warmup_steps=None if schedule is None else 2,  # "linear, 2 warm-up of 5 steps"
        clip_norm=case["clip"],
    )
    half, frozen = trees.partition(params, trained)
    tx = build_optimizer(config, total_steps=case["steps"])
    step = make_train_step(lift(model.apply), OBJECTIVES[model.task], tx)

    def loss(half: Any) -> Any:
        inputs = {name: array for name, array in batch.items() if name != "labels"}
        logits = lift(model.apply)(trees.combine(half, frozen), inputs)
        total, weight, _ = OBJECTIVES[model.task](logits, batch)
        return total / weight

    half = jax.tree.map(jnp.copy, half)  # the step takes its arrays away
    gradient = jax.jit(jax.grad(loss))(half)
    if case["clip"] is not None:
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
        factor = jnp.minimum(1.0, case["clip"] / norm)
        gradient = jax.tree.map(lambda g: g * factor, gradient)
    state, history, last = tx.init(half), [], half
    for _ in range(case["steps"] + 1):
        last = jax.tree.map(jnp.copy, half)
        half, state, metrics = step(half, state, frozen, batch, jax.random.key(0))
        history.append((float(metrics["loss"]), float(metrics["gradient_norm"])))
    return trees.combine(last, frozen), history, trees.combine(gradient, _untrained(frozen))


def _untrained(frozen: Any) -> Any:
    """What PEFT has gradients of zero for: the parts of its prompts that nothing reads."""
    return trees.map_with_path(
        lambda path, value: jnp.zeros_like(value) if path.endswith("/unread") else value, frozen
    )


CHECKS = {"base": check_base, "adapter": check_adapter, "train": check_training}


# --- Names and files ------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def load(folder: pathlib.Path, scan_layers: bool) -> Any:
    return hub.load(folder, scan_layers=scan_layers)


def run(model: Any, params: Any, batch: Any) -> np.ndarray:
    return np.asarray(jax.jit(lift(model.apply))(params, batch))


def batch_of(io: Any, model: Any, name: str, labels: bool = False) -> dict[str, Any]:
    wanted = (*INPUTS[type(model.config)], *(("labels",) if labels else ()))
    keys = [key for key in wanted if f"{name}.{key}" in io]
    batch = {key: jnp.asarray(io[f"{name}.{key}"], jnp.int32) for key in keys}
    if isinstance(model.config, T5Config) and "decoder_input_ids" not in batch:
        given = jnp.asarray(io[f"{name}.labels"], jnp.int32)
        start, padding = model.config.decoder_start_token_id, model.config.pad_token_id or 0
        batch["decoder_input_ids"] = shift_right(given, start, padding)
    return batch


def share(got: np.ndarray, want: np.ndarray, batch: Any, case: dict[str, Any]) -> float:
    """The largest difference at unpadded positions, as a share of `atol + rtol * |want|`."""
    if got.shape != want.shape:
        raise ValueError(f"logits are {got.shape}, recorded were {want.shape}")
    difference = np.abs(got - want) / (case["atol"] + case["rtol"] * np.abs(want))
    half = "decoder_" if "decoder_input_ids" in batch else ""
    if got.ndim == 3 and f"{half}attention_mask" in batch:
        difference = difference[np.asarray(batch[f"{half}attention_mask"]) == 1]
    return float(difference.max())


def trained_paths(model: Any, params: Any, expected: dict[str, Any]) -> list[str]:
    """Patterns of the arrays that a run without an adapter trained, by the names in its file."""
    names = [key.removeprefix("final.") for key in expected if key.startswith("final.")]
    paths = trees.flatten(params)
    found = []
    for name in names:
        module, _, suffix = name.rpartition(".")
        kinds = ("bias",) if suffix == "bias" else ("kernel", "embedding", "scale")
        if module_path(model, module) is None:
            raise ValueError(f"{name} is no parameter of this model")
        found.append(files.our_path(name, module, kinds, model.family.tables, paths)[0])
    return found


def named(model: Any, params: Any, trained: Any, case: dict[str, Any]) -> dict[str, Any]:
    """What is trained, by PEFT's or Hugging Face's names."""
    import tempfile

    from safetensors.numpy import load_file

    if case["adapter"] is None:
        tensors, _ = files.plain_tensors(model.family.tables, params, trained)
        return {name: np.asarray(tensor) for name, tensor in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        save_peft(f"{folder}/adapter", model, params, trained)
        return load_file(f"{folder}/adapter/{files.WEIGHTS}")


def rename(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (pathlib.Path(sys.argv[1]) / "manifest.json").is_file():
        sys.exit(f"{__doc__}\nno manifest.json in {sys.argv[1:] or 'nothing'}")
    sys.exit(main(pathlib.Path(sys.argv[1])))
