"""Trains an adapter with transformers' Trainer; its checkpoints hold the adapter and nothing of the base."""

import os

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import veneer
from veneer.embedded import folder
from veneer.integrations.trainer import adapter_trainer

tokenizer = AutoTokenizer.from_pretrained(folder())
model = AutoModelForCausalLM.from_pretrained(folder(), dtype="float32")
veneer.attach(model, "lora", rank=8)

text = (folder().parent / "heldout.txt").read_text() * 4
ids = tokenizer(text)["input_ids"]
rows = [{"input_ids": ids[i : i + 64], "labels": ids[i : i + 64]} for i in range(0, len(ids) - 64, 64)]

trainer = adapter_trainer(Trainer, "loraplus", ratio=4)(
    model=model,
    args=TrainingArguments(
        output_dir=os.environ.get("OUT", "runs/trainer"),
        max_steps=int(os.environ.get("STEPS", 50)),
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        report_to=[],
    ),
    train_dataset=rows,
)
trainer.train()
trainer.save_model()  # PEFT's layout; `veneer.load(model, folder)` and PEFT open it
