"""Networks: the DiT/SiT backbone, the frozen encoders, and reading and writing weights."""
