"""From configs to what is done with them. Nothing else but main.py and configs/ reads a config."""
