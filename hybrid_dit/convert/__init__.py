"""Weights in and out: key tables, readers and writers of safetensors, and whole pipeline folders."""
