"""Makes t5/: PEFT's methods on tiny random T5s, in the layout that tests.golden.check reads.

Run with torch 2.13 (CPU), transformers 5.24 and peft 0.21.2, which the project itself does not
need:

    python tests/golden/make_t5_adapters.py

Two bases, of 2 and of 3 layers in each half, since PEFT deals a prefix out otherwise to an even and
to an odd number of them. Every adapter is random. `<set>.labels` are of targets that end early.
"""

import copy
import json
import pathlib

import numpy as np
import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

OUT = pathlib.Path(__file__).parent / "t5"
SIZES = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
BASES = {
    "even": transformers.T5Config(**SIZES, num_layers=2, feed_forward_proj="gated-gelu"),
    "odd": transformers.T5Config(**SIZES, num_layers=3),
}
TASK = {"task_type": "SEQ_2_SEQ_LM"}
ADAPTERS = {
    "even/dora": peft.LoraConfig(**TASK, r=3, target_modules=["q", "v"], use_dora=True),
    "even/ia3": peft.IA3Config(**TASK),
    "even/prompt": peft.PromptTuningConfig(**TASK, num_virtual_tokens=4),
    "even/ptuning": peft.PromptEncoderConfig(**TASK, num_virtual_tokens=4, encoder_hidden_size=8),
    "even/prefix": peft.PrefixTuningConfig(**TASK, num_virtual_tokens=3),
    "odd/prefix": peft.PrefixTuningConfig(**TASK, num_virtual_tokens=3),
}
TRAINED = ("even/ia3", "even/prompt", "odd/prefix", "even/prefix")
STEPS, RATE = 5, 0.002
TOLERANCES = {"atol": 1e-4, "rtol": 1e-4}


def base(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    BASES[name]._attn_implementation = "eager"
    model = transformers.T5ForConditionalGeneration(BASES[name]).eval()
    for path, parameter in model.named_parameters():
        noise = 0.3 * torch.randn(parameter.shape)
        parameter.data = 1 + noise if "layer_norm" in path else noise
    return model


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 40, (3, 10), generator=generator)
    mask = (torch.arange(10)[None] < torch.tensor([10, 6, 3])[:, None]).long()
    labels = torch.randint(2, 40, (3, 7), generator=generator)
    labels[1, 4:] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def write(path: pathlib.Path, **arrays: torch.Tensor | np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{name: np.asarray(array) for name, array in arrays.items()})


def load(name: str) -> torch.nn.Module:
    config = copy.deepcopy(ADAPTERS[name])
    config.inference_mode = False  # where PEFT trains no prompt that it reads
    model = peft.get_peft_model(base(name.split("/")[0]), config)
    tensors = load_file(OUT / name.replace("/", "/adapters/") / "adapter_model.safetensors")
    peft.set_peft_model_state_dict(model, tensors)
    return model.eval()


@torch.no_grad()
def make_base(name: str) -> dict:
    model = base(name)
    model.save_pretrained(OUT / name)
    (OUT / name / "generation_config.json").unlink(missing_ok=True)
    arrays = {f"right.{key}": value for key, value in batch().items()}
    write(OUT / name / "io.npz", **arrays, **{"right.logits": model(**batch()).logits})
    return {"case": name, "type": "base", "model": name, "sets": ["right"], **TOLERANCES}


@torch.no_grad()
def make_adapter(name: str) -> dict:
    model_name = name.split("/")[0]
    folder = OUT / name.replace("/", "/adapters/")
    peft.get_peft_model(base(model_name), ADAPTERS[name]).save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.manual_seed(2)
    for key in sorted(tensors):
        noise = 0.5 * torch.randn(tensors[key].shape)
        is_gain = "ia3" in key or "magnitude" in key
        tensors[key] = 1 + noise if is_gain else noise
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model = peft.PeftModel.from_pretrained(base(model_name), str(folder)).eval()
    arrays = {"right.adapter_logits": model(**batch()).logits}
    if hasattr(model.base_model, "merge_and_unload"):
        arrays["right.merged_logits"] = model.base_model.merge_and_unload()(**batch()).logits
    write(folder / "expected.npz", **arrays)
    return {"case": name, "type": "adapter", "model": model_name, "sets": ["right"], **TOLERANCES}


def make_training(name: str) -> dict:
    model = load(name)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=0.01)
    losses, norms, arrays = [], [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.sqrt(sum((p.grad**2).sum() for p in trained.values())).item())
        if step == 0:
            arrays = {f"grad0.{saved(n)}": p.grad.numpy().copy() for n, p in trained.items()}
        optimizer.step()
    losses.append(model(**batch()).loss.item())
    arrays |= {f"final.{saved(n)}": p.detach().numpy() for n, p in trained.items()}
    model_name, adapter = name.split("/")
    path = OUT / model_name / "train" / f"{adapter}.npz"
    write(path, **arrays, losses=np.array(losses), grad_norms=np.array(norms))
    return {
        "case": f"{model_name}/train/{adapter}",
        "type": "train",
        "model": model_name,
        "adapter": adapter,
        "set": "right",
        "lr": RATE,
        "steps": STEPS,
        "clip": None,
        "schedule": None,
        "atol": {"losses": 2e-4},
        "unstable": [],
    }


def saved(name: str) -> str:
    """A parameter's name in a file."""
    return "prompt_embeddings" if "prompt_encoder" in name else name.replace(".default", "")


if __name__ == "__main__":
    cases = [make_base(name) for name in BASES]
    cases += [make_adapter(name) for name in ADAPTERS]
    cases += [make_training(name) for name in TRAINED]
    (OUT / "manifest.json").write_text(json.dumps({"cases": cases}, indent=1) + "\n")
