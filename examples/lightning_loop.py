"""Trains an adapter with Lightning; its checkpoints hold the adapter and nothing of the base."""

import os

import torch
from pytorch_lightning import LightningModule, Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

import veneer
from veneer.embedded import folder
from veneer.integrations.lightning import AdapterModule
from veneer.integrations.optimisers import build_optimiser


class Adapted(AdapterModule, LightningModule):
    def __init__(self):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(folder(), dtype="float32")
        veneer.attach(self.model, "lora", rank=8)

    def training_step(self, ids, i):
        loss = self.model(input_ids=ids, labels=ids).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return build_optimiser(self.model, "loraplus", lr=5e-4, ratio=4)


tokenizer = AutoTokenizer.from_pretrained(folder())
texts = [f"def f_{i}(x):\n    return x + {i}\n" for i in range(64)]
ids = tokenizer(texts, return_tensors="pt", padding=True)["input_ids"]
out, module = os.environ.get("OUT", "runs/lightning"), Adapted()
trainer = Trainer(default_root_dir=out, max_steps=int(os.environ.get("STEPS", 50)), logger=False)
trainer.fit(module, torch.utils.data.DataLoader(ids, batch_size=8))
veneer.save(module.model, out)
