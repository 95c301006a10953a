"""LoHa, LoKr and diag-OFT in files of kohya and LyCORIS, by their own tensors."""
