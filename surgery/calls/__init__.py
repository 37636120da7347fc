"""What a live model's call does with adapters that are no weights."""
