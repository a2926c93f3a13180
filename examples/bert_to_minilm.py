"""A BERT teaches a small DistilBERT, before any task, how its queries, keys and values relate (MiniLMv2); no labels.

python examples/bert_to_minilm.py SENTENCES.txt     (one text a line)
"""

import sys

from loop import train
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer, DistilBertConfig, DistilBertModel

from attnkd.methods.minilm import MiniLM

TEACHER = "bert-base-uncased"


def models() -> tuple[nn.Module, nn.Module]:
    # Half the width and half the depth. The vocabulary is the teacher's.
    return DistilBertModel(DistilBertConfig(dim=384, n_heads=12, hidden_dim=1536)), AutoModel.from_pretrained(TEACHER)


def method(student: nn.Module, teacher: nn.Module) -> MiniLM:
    # The last block of both. 48 relation heads: 16 channels each in the teacher, 8 in the student.
    return MiniLM(student, teacher, relation_heads=48, verbose=False)


if __name__ == "__main__":
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)

    def collate(lines: list[str]) -> tuple:
        return (tokenizer(lines, padding=True, truncation=True, max_length=128, return_tensors="pt"),)

    with open(sys.argv[1], encoding="utf-8") as file:
        lines = [line.strip() for line in file if line.strip()]
    train(method(*models()), DataLoader(lines, batch_size=256, shuffle=True, collate_fn=collate), lr=4e-4)
