"""What the commands do: wires data, adapters, training and evaluation together."""
