"""Text to image and its relatives: encode, sample, decode."""
