"""YAML files that run as they are, by modality; `accelerate/` is for hardware."""
