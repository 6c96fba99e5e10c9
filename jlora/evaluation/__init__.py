"""How good the answers are, and what they cost."""
