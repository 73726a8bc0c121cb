"""What a program talks to: sessions over a loaded model and the typed events they yield."""
