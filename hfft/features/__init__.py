"""The feature cache: what a frozen front part of a model makes of each example, kept on disk."""
