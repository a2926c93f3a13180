"""A fine-tuned BERT teaches a DistilBERT its classes and the maps of all heads; padding has no part in it.

python examples/bert_to_distilbert.py SENTENCES.csv     (columns: text, label)
"""

import csv
import sys

import torch
from loop import train
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from attnkd.methods.head_kd import HeadKD

TEACHER = "textattack/bert-base-uncased-SST-2"


def models() -> tuple[nn.Module, nn.Module]:
    auto = AutoModelForSequenceClassification
    return auto.from_pretrained("distilbert-base-uncased", num_labels=2), auto.from_pretrained(TEACHER)


def method(student: nn.Module, teacher: nn.Module) -> HeadKD:
    # Student block i of 6 learns from the teacher's block 2i + 1 of 12. divergence="logit_mse" is TinyBERT's attention loss.
    return HeadKD(student, teacher, kd_weight=1.0, verbose=False)


if __name__ == "__main__":
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)

    def collate(rows: list[dict]):
        words = tokenizer([row["text"] for row in rows], padding=True, truncation=True, return_tensors="pt")
        return words, torch.tensor([int(row["label"]) for row in rows])

    with open(sys.argv[1], encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    train(method(*models()), DataLoader(rows, batch_size=32, shuffle=True, collate_fn=collate), lr=5e-5)
