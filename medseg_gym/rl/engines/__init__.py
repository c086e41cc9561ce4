"""Engines that generate a policy's answers: `fake` for tests and benchmarks, `hf` through transformers."""
