"""Trains an adapter in a loop that accelerate prepares for the devices at hand."""

import os

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

import veneer
from veneer.embedded import folder
from veneer.integrations.accelerated import adapters_only

accelerator = Accelerator()
adapters_only(accelerator)  # save_state and load_state hold the adapter, not the base
tokenizer = AutoTokenizer.from_pretrained(folder())
model = AutoModelForCausalLM.from_pretrained(folder(), dtype="float32")
veneer.attach(model, "lora", rank=8)  # before prepare: wrappers keep the adapters
rows = tokenizer(
    [f"def f_{i}(x):\n    return x + {i}\n" for i in range(64)], return_tensors="pt", padding=True
)
batches = torch.utils.data.DataLoader(rows["input_ids"], batch_size=8)
optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
prepared, optimiser, batches = accelerator.prepare(model, optimiser, batches)

for _, ids in zip(range(int(os.environ.get("STEPS", 50))), batches, strict=False):
    loss = prepared(input_ids=ids, labels=ids).loss
    accelerator.backward(loss)
    optimiser.step()
    optimiser.zero_grad()
    accelerator.print(f"loss {loss.item():.3f}")
accelerator.save_state(os.environ.get("OUT", "runs/accelerated"))
