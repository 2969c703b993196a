"""Ways to make a copy of a network forget its clean task and keep a backdoor, one file each."""
