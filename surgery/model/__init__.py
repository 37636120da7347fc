"""What models are made of: layer kinds, weight storages, and the sites a selector chooses."""
