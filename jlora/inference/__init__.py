"""Text out of a model: sampling with a cache, and answers to many prompts."""
