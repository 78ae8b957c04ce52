"""PyTorch runs a plan on real ranks and measures it in the simulator's terms."""
