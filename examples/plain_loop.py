"""Trains an adapter in a plain PyTorch loop."""

import os

from transformers import AutoModelForCausalLM, AutoTokenizer

import veneer
from veneer.embedded import folder
from veneer.integrations.optimisers import build_optimiser

tokenizer = AutoTokenizer.from_pretrained(folder())
model = AutoModelForCausalLM.from_pretrained(folder(), dtype="float32")
veneer.attach(model, "lora", rank=8, init="pissa")
optimiser = build_optimiser(model, "loraplus", lr=5e-4, ratio=4)
ids = tokenizer("def area(width, height):\n    return width * height\n", return_tensors="pt")["input_ids"]

for step in range(int(os.environ.get("STEPS", 50))):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
veneer.save(model, os.environ.get("OUT", "runs/plain"))
