"""What single defenses are made of: losses, masks, transport plans, and what they find out about a network."""
