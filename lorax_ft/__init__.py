"""Parameter-efficient fine-tuning in JAX: adapters and quantisation for any pure function."""
