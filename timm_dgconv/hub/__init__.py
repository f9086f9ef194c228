"""Checkpoints and the Hugging Face Hub: read, convert, publish, inspect."""
