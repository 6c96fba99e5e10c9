"""Another tool's configuration as one of ours."""
