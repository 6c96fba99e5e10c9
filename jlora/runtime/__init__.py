"""The process: how it starts, joins a job, is watched, and ends. Knows nothing of models or data."""
