"""Models of our own. Their code travels with their weights: nothing here imports anything of ours.

A file imports its neighbours relatively: transformers copies those along.
"""
