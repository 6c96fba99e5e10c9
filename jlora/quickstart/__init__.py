"""`jlora quickstart`: a folder with a chat model, rows and a config to train it on, all that a first run takes."""
