"""The change that tools keep on the way back into 4-bit formats, side by side."""
