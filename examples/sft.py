"""Trains an adapter on prompts and completions with TRL's SFTTrainer."""

import os

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import veneer
from veneer.embedded import folder
from veneer.integrations.trainer import adapter_trainer

model = AutoModelForCausalLM.from_pretrained(folder(), dtype="float32")
veneer.attach(model, "dora", rank=8)
rows = [{"prompt": f"def square_{i}(x):", "completion": f"\n    return x * x  # {i}\n"} for i in range(64)]

trainer = adapter_trainer(SFTTrainer)(
    model=model,
    args=SFTConfig(
        output_dir=os.environ.get("OUT", "runs/sft"),
        max_steps=int(os.environ.get("STEPS", 50)),
        learning_rate=2e-3,
        max_length=64,
        bf16=torch.cuda.is_available(),
        report_to=[],
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=AutoTokenizer.from_pretrained(folder()),
)
trainer.train()
