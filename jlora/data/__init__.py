"""Rows -> tokenised examples -> packed rows -> batches, with a position that can be saved.

Knows nothing of models or devices.
"""
