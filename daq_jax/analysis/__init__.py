"""What a quantized tree keeps of a change, and what it would keep: numbers, no pictures."""
