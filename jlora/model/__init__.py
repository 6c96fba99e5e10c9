"""Arrays and the forward pass. Knows no files and no tokenizers."""
