"""Files of ours written whole, files of others read within bounds. Knows nothing of models or runs."""
