"""The Trainer of Hugging Face transformers trains a Hugging Face student by AttnDistill: the task is the Trainer's model.

python examples/transformers_trainer.py FOLDER_OF_IMAGES     (pip install transformers accelerate datasets)
"""

from __future__ import annotations

import sys
from pathlib import Path

from torch import nn
from torch.utils.data import Dataset
from transformers import AutoImageProcessor, AutoModel, Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTModel

from attnkd.methods.attn_distill import AttnDistill
from attnkd.methods.schedule import Schedule


class TellEpoch(TrainerCallback):
    """Tells the epoch to the task, for its schedule."""

    def __init__(self, task: AttnDistill) -> None:
        self.task = task

    def on_step_begin(self, args, state, control, **kwargs):
        self.task.set_epoch(state.epoch)


def distil(student: nn.Module, teacher: nn.Module, images: Dataset, folder: str, **arguments) -> nn.Module:
    """images: items {"images": [3, H, W]}; with a class loss also "targets"."""
    student.gradient_checkpointing_enable()  # or give the Trainer activation_checkpointing=True
    task = AttnDistill(student, teacher, attn_weight=Schedule(0.1, warmup=10), verbose=False)
    options = TrainingArguments(folder, remove_unused_columns=False, ddp_find_unused_parameters=True, **arguments)
    Trainer(task, options, train_dataset=images, callbacks=[TellEpoch(task)]).train()
    task.untap()
    student.save_pretrained(Path(folder) / "student")  # without projector and teacher; from_pretrained takes it
    return student


if __name__ == "__main__":
    from datasets import load_dataset

    teacher = AutoModel.from_pretrained("facebook/dino-vits8")
    processor = AutoImageProcessor.from_pretrained("facebook/dino-vits8")
    student = ViTModel(ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768))
    folder = load_dataset("imagefolder", data_dir=sys.argv[1], split="train")
    images = folder.with_transform(lambda batch: {"images": processor(batch["image"])["pixel_values"]})
    distil(student, teacher, images, "distilled", num_train_epochs=100, per_device_train_batch_size=64)
