"""The paper's networks in PyTorch, one file each."""
