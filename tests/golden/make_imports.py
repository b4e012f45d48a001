"""Makes adapters/imports: what PEFT and loralib compute with adapters that are read in tests.

Run with torch 2.13 (CPU), transformers 5.24, peft 0.21.2 and loralib 0.1.2, which the project
itself does not need, and the directory of real adapters:

    python -m tests.golden.make_imports ADAPTERS

logits.npz: `mlp.*` are the weights of PEFT's regression model, from its seed; `<case>` are logits
on `IDS` with `MASK` of `random_weights`, and `<base>.base` those without an adapter. Beside it
stand an AdaLoRA directory, whose ranks were cut, and a checkpoint of loralib.
"""

import json
import pathlib
import shutil
import sys
import tempfile

import loralib
import numpy as np
import peft
import torch
import transformers

from tests.golden.random_weights import CONFIGS, IDS, MASK, array

OUT = pathlib.Path(__file__).parent / "adapters" / "imports"
PROMPT = {
    "peft_type": "PROMPT_TUNING",
    "task_type": "CAUSAL_LM",
    "num_virtual_tokens": 8,
    "token_dim": 64,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_transformer_submodules": 1,
}


def base(name: str) -> torch.nn.Module:
    raw = dict(CONFIGS[name])
    config = transformers.AutoConfig.for_model(**raw)
    model = getattr(transformers, raw["architectures"][0])(config).eval()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    state = {n: t for n, t in model.state_dict().items() if n not in tied}
    filled = {n: torch.tensor(array(n, tuple(t.shape))) for n, t in state.items() if t.ndim}
    model.load_state_dict(
        state | {n: t for n, t in filled.items() if t.dtype == state[n].dtype}, strict=False
    )
    return model


def logits(model: torch.nn.Module) -> np.ndarray:
    with torch.inference_mode():
        ids, mask = torch.tensor(IDS, dtype=torch.long), torch.tensor(MASK, dtype=torch.long)
        return model(input_ids=ids, attention_mask=mask).logits.float().numpy()


def real(adapters: pathlib.Path) -> dict[str, np.ndarray]:
    folders = {"bert": "bert_base_lora_vykhvan", "gpt2": "gpt2_lora_seqcls_deepbiolab"}
    arrays = {}
    for name, folder in folders.items():
        arrays[f"{name}.base"] = logits(base(name))
        arrays[name] = logits(peft.PeftModel.from_pretrained(base(name), adapters / folder).eval())
    with tempfile.TemporaryDirectory() as folder:
        source = adapters / "tinyllama_prompt_ibm" / "adapter_model.safetensors"
        shutil.copyfile(source, f"{folder}/adapter_model.safetensors")
        pathlib.Path(f"{folder}/adapter_config.json").write_text(json.dumps(PROMPT))
        arrays["llama.base"] = logits(base("llama"))
        model = peft.PeftModel.from_pretrained(base("llama"), folder).eval()
        arrays["llama"] = logits(model)[:, PROMPT["num_virtual_tokens"] :]
    return arrays


def regression() -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    layers = {"lin0": torch.nn.Linear(10, 20), "lin1": torch.nn.Linear(20, 2)}
    return {
        f"mlp.{name}.{part}": getattr(layer, part).detach().numpy()
        for name, layer in layers.items()
        for part in ("weight", "bias")
    }


def adalora() -> np.ndarray:
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, lora_alpha=12, target_modules=["q_proj", "v_proj"]
    )
    model = peft.get_peft_model(base("llama"), config)
    kept = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            parameter.data = 0.5 * torch.randn(parameter.shape)
        if name.endswith("lora_E.default"):
            mask = [(number + i) % 3 != 0 for i in range(4)]
            parameter.data[~torch.tensor(mask)] = 0
            kept[name.removeprefix("base_model.model.")] = mask
    model.peft_config["default"].rank_pattern = kept
    expected = logits(model.eval())
    model.save_pretrained(OUT / "adalora")
    (OUT / "adalora" / "README.md").unlink()
    again = peft.PeftModel.from_pretrained(base("llama"), OUT / "adalora").eval()
    np.testing.assert_allclose(logits(again), expected, atol=1e-6)
    return expected


def merged_linear() -> np.ndarray:
    """GPT-2 with loralib's layers: queries and values of its fused kernel, and the output."""
    torch.manual_seed(0)
    model = base("gpt2_tiny")
    fused = {"fan_in_fan_out": True, "lora_alpha": 6, "r": 2}
    for block in model.transformer.h:
        kernel, out = block.attn.c_attn, block.attn.c_proj
        block.attn.c_attn = loralib.MergedLinear(16, 48, enable_lora=[True, False, True], **fused)
        block.attn.c_proj = loralib.Linear(16, 16, **fused)
        for new, old in ((block.attn.c_attn, kernel), (block.attn.c_proj, out)):
            new.weight.data, new.bias.data = old.weight.data, old.bias.data
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape)
        if name.endswith("c_attn.bias"):
            parameter.data += 0.1
    loralib.mark_only_lora_as_trainable(model)
    torch.save(loralib.lora_state_dict(model.train(), bias="lora_only"), OUT / "loralib.bin")
    return logits(model.eval())


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    arrays = regression() | real(pathlib.Path(sys.argv[1]))
    arrays |= {"adalora": adalora(), "loralib": merged_linear()}
    np.savez_compressed(OUT / "logits.npz", **arrays)
