"""The offline world: scenes of everyday objects, their captions and questions, and the small models trained on them."""
