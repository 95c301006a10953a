"""Trains on a rule's reward with TRL's GRPOTrainer; the KL's reference is the model with its adapters off."""

import os

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import veneer
from veneer.embedded import folder
from veneer.integrations.trainer import adapter_trainer


def digits(completions, **rest):
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


model = AutoModelForCausalLM.from_pretrained(folder(), dtype="float32")
veneer.attach(model, "lora", rank=8)
trainer = adapter_trainer(GRPOTrainer)(
    model=model,
    reward_funcs=digits,
    args=GRPOConfig(
        output_dir=os.environ.get("OUT", "runs/grpo"),
        max_steps=int(os.environ.get("STEPS", 20)),
        learning_rate=3e-3,
        beta=0.01,
        num_generations=8,
        max_completion_length=8,
        bf16=torch.cuda.is_available(),
        report_to=[],
    ),
    train_dataset=Dataset.from_list([{"prompt": f"x_{i} = "} for i in range(64)]),
    processing_class=AutoTokenizer.from_pretrained(folder()),
)
trainer.train()
