"""Trains preferences with TRL's DPOTrainer; the reference is the same model with its adapters off."""

import os

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import veneer
from veneer.embedded import folder
from veneer.integrations.trainer import adapter_trainer

model = AutoModelForCausalLM.from_pretrained(folder(), dtype="float32")
veneer.attach(model, "lora", rank=8)
row = {"prompt": "def area(width, height):", "chosen": "\n    return width * height\n"}
rows = [{**row, "rejected": f"\n    return {i}\n"} for i in range(64)]

trainer = adapter_trainer(DPOTrainer)(  # the reference shares the model's weights
    model=model,
    args=DPOConfig(
        output_dir=os.environ.get("OUT", "runs/dpo"),
        max_steps=int(os.environ.get("STEPS", 50)),
        learning_rate=1e-3,
        max_length=64,
        bf16=torch.cuda.is_available(),
        report_to=[],
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=AutoTokenizer.from_pretrained(folder()),
)
trainer.train()
