"""TREC and CoLA with transformers and PEFT, by the settings of run.py: rows of peer.csv.

    python experiments/methods/peer.py --data=DATA --model=MINILM --seeds=0,1,2

Needs torch, transformers and peft, and nothing of lorax_ft. `MINILM` is the folder of the model.
"""

from __future__ import annotations

import argparse
import csv
import pathlib
import re

import numpy as np
import peft
import torch
import transformers
from sklearn import metrics

HERE = pathlib.Path(__file__).resolve().parent
TREC_LINE = re.compile(r"(\w+):\w+ (.*)")
METHODS = {  # learning rate on each task, epochs
    "full": ({"trec": 1e-4, "cola": 1e-4}, 4),
    "lora": ({"trec": 1e-3, "cola": 3e-4}, 5),
}
LENGTHS = {"trec": 32, "cola": 48}
BATCH = 32


def read(task: str, data: pathlib.Path) -> list[tuple[list[str], list[str]]]:
    """Texts and labels, of training and of the split that is scored."""
    if task == "trec":
        paths = [data / "trec" / name for name in ("train_5500.label", "TREC_10.label")]
        lines = [path.read_text("latin-1").splitlines() for path in paths]
        found = [[TREC_LINE.fullmatch(line.rstrip()) for line in part] for part in lines]
        return [([m[2] for m in part if m], [m[1] for m in part if m]) for part in found]
    paths = [data / "cola" / name for name in ("train.tsv", "dev.tsv")]
    rows = [[line.split("\t") for line in path.read_text().splitlines()] for path in paths]
    return [([row[3] for row in part], [row[1] for row in part]) for part in rows]


def train(task: str, method: str, seed: int, options: argparse.Namespace) -> tuple[float, int]:
    """One run; the model's score and its trainable parameters."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    (texts, labels), (held_texts, held_labels) = read(task, options.data)
    names = sorted(set(labels))
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        options.model, num_labels=len(names)
    )
    if method == "lora":
        config = peft.LoraConfig(
            task_type="SEQ_CLS", r=options.rank, lora_alpha=16, target_modules="all-linear"
        )
        model = peft.get_peft_model(model, config)
    model.to(device).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    rates, epochs = METHODS[method]
    rate = options.learning_rate or rates[task]
    steps = min(options.steps, epochs * -(-len(texts) // BATCH))
    optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.01)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, int(0.06 * steps), steps)

    def batch(rows, texts):
        chosen = [texts[i] for i in rows]
        return tokenizer(
            chosen, truncation=True, max_length=LENGTHS[task], padding=True, return_tensors="pt"
        ).to(device)

    targets = torch.tensor([names.index(label) for label in labels], device=device)
    order, done = np.random.default_rng(seed), 0
    while done < steps:
        rows = order.permutation(len(texts))
        for start in range(0, len(rows), BATCH):
            chosen = rows[start : start + BATCH]
            loss = model(**batch(chosen, texts), labels=targets[chosen]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
            if done == steps:
                break
    model.eval()
    found = []
    with torch.no_grad():
        for start in range(0, len(held_texts), 128):
            rows = range(start, min(start + 128, len(held_texts)))
            found += model(**batch(rows, held_texts)).logits.argmax(-1).tolist()
    truth = [names.index(label) for label in held_labels]
    score = metrics.accuracy_score if task == "trec" else metrics.matthews_corrcoef
    return float(score(truth, found)), sum(p.numel() for p in trainable)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("data"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--tasks", default="trec,cola")
    parser.add_argument("--methods", default="lora,full")
    parser.add_argument("--steps", type=int, default=10**9, help="no more than so many")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA")
    parser.add_argument("--learning_rate", type=float, help="instead of the task's own")
    parser.add_argument("--output", type=pathlib.Path, default=HERE / "peer.csv")
    options = parser.parse_args()
    rows = []
    for task in options.tasks.split(","):
        for method in options.methods.split(","):
            for seed in map(int, options.seeds.split(",")):
                score, trainable = train(task, method, seed, options)
                row = {"task": task, "method": method, "seed": seed, "score": round(score, 4)}
                rows.append(row | {"trainable": trainable})
                print(rows[-1], flush=True)
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
