"""Turning a conversation into model inputs: text, chat prompt, pictures, sound and video."""
