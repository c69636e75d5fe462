"""Text-to-image families: loading, rendering, encoding, the training loss and the LoRA targets."""
