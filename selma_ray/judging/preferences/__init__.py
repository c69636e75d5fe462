"""Scores of how well an image fits its prompt, or pleases: CLIPScore, PickScore, HPSv2 and 2.1, ImageReward."""
