"""What a recipe takes, before anything runs."""
