"""Opens PEFT's other types of adapters: PEFT merges one layer at a time, and the change is kept."""
