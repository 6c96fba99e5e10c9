"""Pages and pictures, made from plain figures."""
